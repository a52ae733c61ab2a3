"""docs/troubleshooting.md has every alarm, status, panel and recipe; what docs/afternoon.md gives to type is valid."""

import ast
import doctest
import inspect
import pathlib
import re

import pytest

from rlpr_jax import command_line, errors, validation
from rlpr_jax.config import FIELDS, default
from rlpr_jax.evaluation import config as evaluation_config
from rlpr_jax.report import panels
from rlpr_jax.report.records import Run
from rlpr_jax.runs import guards

ROOT = pathlib.Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "docs").exists(), reason="a source distribution has no docs")


def page(name: str) -> str:
  return (ROOT / f"docs/{name}.md").read_text()


def section(text: str, heading: str) -> str:
  """A section of a page, with those within it."""
  level = heading.split(" ")[0]
  return text.split(f"\n{heading}\n")[1].split(f"\n{level} ")[0]


def rows(text: str) -> list[list[str]]:
  """The cells of the rows of all tables."""
  return [[cell.strip() for cell in row.split("|")] for row in re.findall(r"^\|(.*)\|$", text, re.MULTILINE)]


def signs() -> list[tuple[str, str]]:
  """(metric, text) of each sign in `guards.alarms`."""
  tuples = [node.elts for node in ast.walk(ast.parse(inspect.getsource(guards.alarms))) if isinstance(node, ast.Tuple)]
  parts = [[part.value for part in elts if isinstance(part, ast.Constant)] for elts in tuples if len(elts) == 4]
  return [(values[0], values[-1]) for values in parts if values and str(values[0]).count("/") == 1]


def raised(metric: str, value: float) -> list[tuple[tuple[str, str], str]]:
  """The alarms of a run in which one metric leaves its usual value for another."""
  well = {
    "reward/total": 0.5, "rollout/response_length": 40.0, "update/entropy": 0.3, "reward/format": 0.9,
    "reward/gain": 0.2, "rollout/truncated": 0.1, "answer/length": 1.0, "answer/exact": 0.4, "filter/trained": 8,
  }  # fmt: skip
  history = [dict(well) for _ in range(10)] + [well | {metric: value} for _ in range(10)]
  return list(guards.alarms(history, default().guards).items())


def test_each_alarm_is_on_the_page_in_the_words_in_which_it_is_printed():
  table = rows(section(page("troubleshooting"), "## Alarms"))
  there = {(cells[0].strip("`"), cells[1].strip("`")) for cells in table}
  assert len(signs()) == 11
  seen = set()
  for metric, _ in signs():
    for value in (-1.0 if metric == "reward/gain" else 0.0, 1e6):
      for (name, side), line in raised(metric, value):
        said = re.sub(r"-?\d[\d.]*", "…", line.split(f", {side} ")[0]) + f", {side} …"
        assert (name, said) in there, line
        seen.add((name, said))
  assert {metric for metric, _ in seen} == {metric for metric, _ in signs()}
  assert {metric for metric, _ in signs()} <= {metric for metric, _ in there}


def test_each_limit_of_an_alarm_can_be_found():
  """By its own name, or as that of the metric that it bounds."""
  text = section(page("troubleshooting"), "## Alarms")
  named = {"guards.max_skipped", "guards.patience", "guards.stop", "guards.min_length_share", "guards.min_exact_share"}
  assert named <= FIELDS.keys()
  assert [name for name in named if f"`{name}`" not in text] == []


def test_each_exit_status_is_on_the_page():
  table = rows(section(page("troubleshooting"), "## Errors"))
  there = {cells[0] for cells in table}
  assert {str(status) for status in (0, errors.USAGE, errors.INTERRUPTED, errors.MACHINE, errors.FAULT)} <= there


def test_each_panel_of_the_report_is_on_the_page():
  text = section(page("troubleshooting"), "## How to read the curves")
  run = Run("first", rows={0: {"held_out/accuracy/law": 0.5}}, config={}, rollouts=[], unreadable=0)
  shown = {cells[0] for cells in rows(text)}
  for theme, those in panels.all_themes(run).items():
    assert f"**{theme}.**" in text or f'"{theme}"' in text
    missing = [panel.title for panel in those if not any(panel.title in cell.split(", ") for cell in shown)]
    assert missing == []


def test_each_recipe_that_trains_is_in_the_table_of_settings():
  text = section(page("troubleshooting"), "## Settings by model size")
  recipes = {file.stem for file in (ROOT / "configs").glob("*.py")} - {"evaluate"}
  assert [name for name in sorted(recipes) if f"`{name}`" not in text] == []


def test_settings_in_the_table_are_those_of_the_recipes():
  """Learning rate, prompts x responses, and the limit of a response; own_machine with all parameters and adapters."""
  table = rows(section(page("troubleshooting"), "## Settings by model size"))
  arguments = {"all": ":h100:8/qwen2.5-7b", "LoRA, rank 32": ":h100:1/llama-3.1-8b"}
  checked = 0
  for cells in table[2:]:
    for name in re.findall(r"`(\w+)`", cells[1]):
      config = command_line.load_recipe(name + (arguments[cells[2]] if name == "own_machine" else ""))
      assert float(cells[3]) == config.training.learning_rate, name
      assert f"{config.prompts_per_step} x {config.samples_per_prompt}" in cells[4], name
      assert int(cells[5].replace(",", "")) == config.rollout.max_response_length, name
      assert (cells[2] == "all") == (config.lora.rank == 0), name
      checked += 1
  assert checked >= 10


def test_the_example_of_a_loss_of_0_gives_what_it_says():
  (block,) = re.findall(r"^```pycon\n(.*?)^```", page("troubleshooting"), re.MULTILINE | re.DOTALL)
  runner = doctest.DocTestRunner(verbose=False)
  runner.run(doctest.DocTestParser().get_doctest(block, {}, "troubleshooting", "troubleshooting.md", 0))
  assert runner.summarize(verbose=False).failed == 0
  assert runner.tries >= 5


def test_recipes_and_settings_of_the_afternoon_are_valid():
  lines = page("afternoon").replace("\\\n", " ")
  commands = re.findall(r"^    rlpr train --config=(\S+) (.*)$", lines, re.MULTILINE)
  assert len(commands) == 2
  for recipe, rest in commands:
    config = command_line.load_recipe(recipe)
    for field, value in re.findall(r"--config\.(\S+)=(\S*)", rest):
      group, _, last = field.rpartition(".")
      where = config[group] if group else config
      where[last] = type(where[last])(value)
    validation.validate(config)
  for recipe in re.findall(r"`((?:own_machine|smollm2_135m)[^`]*)`", lines):
    if ":" in recipe or recipe == "smollm2_135m":
      validation.validate(command_line.load_recipe(recipe))


def test_python_of_the_afternoon_runs(tmp_path, monkeypatch):
  """It splits a file of 250 rows, and its recipe of an evaluation is valid."""
  monkeypatch.chdir(tmp_path)
  split, recipe = re.findall(r"^```python\n(.*?)^```", page("afternoon"), re.MULTILINE | re.DOTALL)
  (tmp_path / "questions.csv").write_text("question,answer\n" + "".join(f'"What, {i}?",{i}\n' for i in range(250)))
  exec(split, {})
  parts = [(tmp_path / name).read_text().splitlines() for name in ("held_out.csv", "train.csv")]
  assert [len(lines) for lines in parts] == [101, 151]
  assert len({line for lines in parts for line in lines[1:]}) == 250
  scope = {}
  exec(recipe, scope)
  evaluation_config.validate(scope["get_config"]())
