"""Programs that no other test runs are whole: what they import is there."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PROGRAMS = sorted(path for folder in ("benchmarks", "tools") for path in (ROOT / folder).glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_imports(path):
  code = f"import runpy; runpy.run_path({str(path)!r}, run_name='imported')"
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
  if "No module named 'torch'" in done.stderr:
    pytest.skip("torch is not installed")
  assert done.returncode == 0, done.stderr
