"""A newcomer's afternoon: what docs/afternoon.md gives to type, in an empty directory, from installing to transformers.

The commands are the page's own, with fewer steps. 200 questions, SmolLM2-135M-Instruct, no accelerator.
"""

import csv
import json
import os
import pathlib
import random
import re
import shlex
import subprocess
import sys
import urllib.request

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs/afternoon.md"
MODEL = ROOT / ".cache/smollm2-135m-instruct"
pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(not PAGE.exists(), reason="a source distribution has no docs"),
  pytest.mark.skipif(not (MODEL / "config.json").exists(), reason="no SmolLM2: make smollm2"),
]
THINGS = ("apples", "marbles", "stamps", "books", "shells", "pencils", "coins", "cards")
FEWER = {
  "--config.steps": "3", "--config.evaluation.prompts": "8", "--config.evaluation.every": "3", "--prompts": "4",
}  # fmt: skip


@pytest.fixture(scope="module")
def afternoon(tmp_path_factory) -> pathlib.Path:
  """The directory in which everything happens: questions.csv, and the model where `make smollm2` puts it."""
  directory = tmp_path_factory.mktemp("afternoon")
  (directory / ".cache").symlink_to(ROOT / ".cache")
  drawn = random.Random(0)
  rows = []
  for number in range(200):
    thing, begun, bought = drawn.choice(THINGS), drawn.randint(2, 60), drawn.randint(2, 60)
    question = f"Box {number} holds {begun} {thing}. Somebody adds {bought} more. How many {thing} are in it then?"
    rows.append({"question": question, "answer": f"{begun + bought} {thing}"})
  with (directory / "questions.csv").open("w", newline="") as file:
    writer = csv.DictWriter(file, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
  return directory


def typed(start: str) -> list[str]:
  """The command of the page that begins so, with fewer steps."""
  lines = PAGE.read_text().replace("\\\n", " ")
  (command,) = re.findall(rf"^    ({re.escape(start)}.*?)(?:\s+#.*)?$", lines, re.MULTILINE)
  parts = (part.partition("=") for part in shlex.split(command))
  return [f"{name}{equals}{FEWER.get(name, value)}" for name, equals, value in parts]


def test_an_afternoon(afternoon):
  split, recipe = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
  subprocess.run([sys.executable, "-m", "venv", "own"], cwd=afternoon, check=True)
  binaries = afternoon / "own/bin"
  environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "XLA_FLAGS"))}
  environment |= {"PATH": f"{binaries}:{environment['PATH']}", "HF_HUB_OFFLINE": "1"}

  def say(command: list[str]) -> str:
    done = subprocess.run(command, cwd=afternoon, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout

  pip, install, package = typed("pip install")
  say([pip, install, "--quiet", "-c", str(ROOT / "requirements.txt"), f"{ROOT}{package.removeprefix('.')}"])
  assert "train" in say(typed("rlpr --help"))
  say([sys.executable, "-c", split])
  say(typed("rlpr curate"))
  assert "step 3/3" in say(typed("rlpr train --config=smollm2_135m"))
  metrics = [json.loads(line) for line in (afternoon / "runs/mine/metrics.jsonl").read_text().splitlines()]
  assert [row["step"] for row in metrics if "reward/total" in row] == [1, 2, 3]
  assert metrics[-1]["reward/format"] > 0.3  # the supervised steps brought the tags

  view = typed("rlpr view")
  with subprocess.Popen(view, cwd=afternoon, env=environment, stdout=subprocess.PIPE, text=True) as viewer:
    said = next(line for line in viewer.stdout if "http://" in line)
    with urllib.request.urlopen(re.search(r"http://\S+", said)[0], timeout=60) as answer:
      assert "<title>" in answer.read().decode()
    viewer.terminate()

  (afternoon / "MINE.py").write_text(recipe.replace("samples=4", "samples=1, limit=20"))
  say(typed("rlpr evaluate"))
  summary = (afternoon / "evaluation/summary.md").read_text()
  assert "before" in summary
  assert "after" in summary
  say(typed("rlpr diagnose"))
  assert (afternoon / "runs/mine/diagnosis.html").exists()
  assert "wrote the policy of step 3" in say(typed("rlpr export"))
  transformers = pytest.importorskip("transformers")
  pytest.importorskip("torch")
  tokenizer = transformers.AutoTokenizer.from_pretrained(afternoon / "model")
  model = transformers.AutoModelForCausalLM.from_pretrained(afternoon / "model")
  chat = [{"role": "user", "content": "How many apples are 3 apples and 4 apples?"}]
  asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
  written = model.generate(**asked, max_new_tokens=8, do_sample=False)
  assert written.shape[1] > asked["input_ids"].shape[1]
