"""A sweep as a user starts it: commands, runs, a table, and going on where it stopped."""

import json
import os
import pathlib
import runpy
import shlex
import signal
import subprocess
import sys
import threading
import time

import pytest

from rlpr_jax import command_line
from rlpr_jax.runs.children import Children
from tests.tiny_run import RECIPE

ROOT = pathlib.Path(__file__).parents[2]
SWEEP = """
def get_sweep():
  return {"mean": {}, "random": {"reward.kind": "random", "log.rollouts": 2}, "larger": {"model.embed_dim": 64}}
"""


@pytest.fixture
def files(tmp_path):
  (tmp_path / "recipe.py").write_text(RECIPE)
  (tmp_path / "sweep.py").write_text(SWEEP)
  return tmp_path


def sweep(files, *arguments, recipe="recipe.py", status=0):
  done = subprocess.run(
    [
      sys.executable, str(ROOT / "launch/sweep.py"), f"--sweep={files / 'sweep.py'}", f"--config={files / recipe}",
      f"--workdir={files / 'runs'}", *arguments,
    ],
    capture_output=True, text=True, check=False, cwd=ROOT, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
  )  # fmt: skip
  assert done.returncode == status, done.stdout + done.stderr
  return done


SHORT = ("--config.steps=1", "--config.warm_start.steps=2", "--config.evaluation.samples=1")


def test_a_dry_run_prints_a_command_a_run(files):
  lines = sweep(files, "--seeds=3,4", "--dry_run", *SHORT).stdout.splitlines()
  assert len(lines) == 2 + 6
  assert not (files / "runs").exists()
  policy = files / "runs" / "warm_start-3-policy"
  train, export = lines[0].split(" && ")
  assert {"--config.steps=0", "--config.seed=3"} <= set(shlex.split(train))
  assert shlex.split(export)[2:] == [
    "rlpr_jax.export", f"--workdir={files / 'runs' / 'warm_start-3'}", f"--out={policy}", "--dtype=float32",
  ]  # fmt: skip
  shared = {f"--config.model.path={policy}", "--config.warm_start.steps=0"}
  assert [shared <= set(shlex.split(line)) for line in lines[2:5]] == [True, True, False]  # another model starts alone
  parts = shlex.split(lines[3])
  assert parts[1:3] == ["-m", "rlpr_jax.train"]
  assert f"--workdir={files / 'runs' / 'random-3'}" in parts
  assert {"--config.steps=1", "--config.reward.kind=random", "--config.seed=3"} <= set(parts)
  assert "--config.seed=4" in shlex.split(lines[5])


@pytest.mark.parametrize("file", sorted((ROOT / "configs/sweeps").glob("*.py")), ids=lambda file: file.stem)
def test_sweeps_of_ours_can_run_and_no_variant_has_anothers_changes(tmp_path, file):
  module, recipe = runpy.run_path(str(ROOT / "launch/sweep.py")), command_line.load_recipe("quickstart")
  before = recipe.to_json()
  variants = module["load_sweep"](str(file))
  starts, jobs = module["make_jobs"](variants, recipe, [], ["0"], tmp_path)
  assert (len(starts), [job.name for job in jobs]) == (1, list(variants))
  assert recipe.to_json() == before


def test_some_variants(files):
  lines = sweep(files, "--seeds=3", "--variants=larger,mean", "--dry_run", *SHORT).stdout.splitlines()
  workdirs = [next(word for word in shlex.split(line) if word.startswith("--workdir=")) for line in lines]
  assert [workdir.rpartition("/")[2] for workdir in workdirs] == ["warm_start-3", "mean-3", "larger-3"]
  refused = sweep(files, "--variants=mean,median", "--dry_run", status=2)
  assert refused.stderr == "error: --variants: median, expected some of mean, random, larger\n"


def test_what_an_agent_of_weights_and_biases_runs(files):
  found = json.loads(sweep(files, "--seeds=3,4", "--wandb_sweep", *SHORT).stdout)
  assert not (files / "runs").exists()
  assert (found["method"], found["metric"]["name"], found["metric"]["goal"]) == (
    "grid",
    "held_out/accuracy",
    "maximize",
  )
  assert found["parameters"] == {
    "variants": {"values": ["mean", "random", "larger"]},
    "seeds": {"values": [3, 4]},
  }
  words = {
    "${env}": [], "${interpreter}": [sys.executable], "${program}": [str(ROOT / found["program"])],
    "${args}": ["--seeds=4", "--variants=random", "--dry_run"],
  }  # fmt: skip
  command = [word for part in found["command"] for word in words.get(part, [part])]
  done = subprocess.run(
    command, capture_output=True, text=True, check=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin"}
  )
  start, run = map(shlex.split, done.stdout.splitlines())
  named = [word for word in run if word.startswith("--config.log.trackers=")]
  assert named == ["--config.log.trackers=('tensorboard', 'wandb')"]
  assert {f"--workdir={files / 'runs/random-4'}", "--config.reward.kind=random", "--config.seed=4"} <= set(run)
  assert [word for word in start if word.startswith("--config.log.trackers=")][-1] == "--config.log.trackers=()"


@pytest.mark.slow
def test_a_sweep_ends_in_a_table_and_goes_on_where_it_stopped(files):
  (files / "sweep.py").write_text(SWEEP.replace(', "larger": {"model.embed_dim": 64}', ""))
  first = sweep(files, "--seeds=0", "--processes=2", *SHORT)
  assert "0 of 1 warm starts were finished before" in first.stdout
  assert "0 of 2 runs were finished before" in first.stdout
  assert (files / "runs/table.png").read_bytes().startswith(b"\x89PNG")
  results = json.loads((files / "runs/table.json").read_text())
  for name, pairs in results.items():
    metrics = [json.loads(line) for line in (files / f"runs/{name}-0/metrics.jsonl").read_text().splitlines()]
    assert pairs == [[metrics[0]["held_out/accuracy"], metrics[-1]["held_out/accuracy"]]]
  assert results["mean"][0][0] == results["random"][0][0]  # one policy before the first step
  table = (files / "runs/table.md").read_text()
  assert table in first.stdout
  assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == ["mean", "random"]
  log = files / "runs/random-0/metrics.jsonl"
  before = log.stat().st_mtime_ns
  again = sweep(files, "--seeds=0", *SHORT)
  assert "1 of 1 warm starts were finished before" in again.stdout
  assert "2 of 2 runs were finished before" in again.stdout
  assert log.stat().st_mtime_ns == before


def test_the_course_of_runs_is_told_where_there_is_one(tmp_path, capsys):
  """Two seeds of one variant, one of another; evaluations after steps 0, 10 and 20."""
  module = runpy.run_path(str(ROOT / "launch/sweep.py"))

  def job(name, seed, accuracies, empty):
    workdir = tmp_path / f"{name}-{seed}"
    workdir.mkdir()
    rows = [{"step": 0, "held_out/accuracy": accuracies[0]}]
    rows += [
      {"step": step, "answer/empty": empty * step / 20, "answer/exact": 0.5}
      | ({"held_out/accuracy": accuracies[step // 10]} if step % 10 == 0 else {})
      for step in range(1, 21)
    ]
    (workdir / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return module["Job"](name, seed, workdir, [], 20)

  courses = {
    "a": [module["course"](job("a", 0, [0.25, 0.75, 0.5], 0.5)), module["course"](job("a", 1, [0.25, 0.5, 0.75], 0))],
    "b": [module["course"](job("b", 0, [0.0, 0.0, 1.0], 1.0))],
    "c": [],
  }
  module["write_course"](tmp_path, courses)
  lines = (tmp_path / "course.md").read_text().splitlines()
  assert lines[0] == "| variant | step 0 | step 10 | step 20 | most lost from the best | empty | exact |"
  assert lines[2:] == [
    "| a | 25.0% | 62.5% | 62.5% | 25.0 | 25.0% | 50.0% |",
    "| b | 0.0% | 0.0% | 100.0% | 0.0 | 100.0% | 50.0% |",
  ]
  assert capsys.readouterr().out.splitlines() == lines
  assert (tmp_path / "course.png").read_bytes().startswith(b"\x89PNG")
  (tmp_path / "other").mkdir()
  module["write_course"](tmp_path / "other", {"a": [module["Course"]([0, 20], [0.1, 0.2], {})]})
  assert not list((tmp_path / "other").iterdir())


@pytest.mark.parametrize(
  ("text", "line"),
  [
    ("def get_sweep():\n  return {'a': {'reward.agregate': 'product'}}", "--sweep: a, seed 0: "),
    pytest.param(
      "def get_sweep():\n  return {'a': {'reward.aggregate': 'median'}}",
      "config.reward.aggregate: 'median'",
      marks=pytest.mark.slow,
    ),
    pytest.param("x = 1", "has no get_sweep()", marks=pytest.mark.slow),
    pytest.param("def get_sweep():\n  return {'a/b': {}}", "expected names", marks=pytest.mark.slow),
  ],
)
def test_what_cannot_run_is_refused_before_anything_runs(files, text, line):
  (files / "sweep.py").write_text(text)
  done = sweep(files, status=2)
  assert done.stderr.splitlines()[-1].startswith("error: ")
  assert line in done.stderr
  assert not (files / "runs").exists()


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_the_others_are_in_the_table(files):
  (files / "sweep.py").write_text(SWEEP.replace('"model.embed_dim": 64', '"data.path": "nowhere.jsonl"'))
  done = sweep(files, "--seeds=0", *SHORT, status=1)
  assert "larger-0 failed with status 2" in done.stdout
  assert "error: 1 runs failed: larger-0" in done.stderr
  assert "nowhere.jsonl" in (files / "runs/larger-0.log").read_text()
  assert "| mean | 1 |" in (files / "runs/table.md").read_text()
  assert "| larger | 0 |" in (files / "runs/table.md").read_text()


def test_a_sweep_that_is_stopped_begins_nothing_more(tmp_path):
  """A run that was told to stop ends with status 0 as well; what follows it would take it for finished."""
  launcher = runpy.run_path(str(ROOT / "launch/sweep.py"))
  program, ids = [sys.executable, "-m", "tests.stopping_program"], tmp_path / "ids"
  ids.mkdir()
  commands = [["env", f"PYTHONPATH={ROOT}", f"DIRECTORY={ids}", *program], ["touch", str(tmp_path / "second")]]
  jobs = [launcher["Job"](name, 0, tmp_path / name, commands, 1) for name in ("a", "b")]

  def stop():
    while not list(ids.iterdir()):
      time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)

  with Children(grace=60) as children:
    threading.Thread(target=stop).start()
    assert launcher["run_all"](jobs, "runs", jobs, 1, children) == ["a", "b"]
  assert children.told == signal.SIGTERM
  assert (tmp_path / "a.log").read_text().endswith("saving\nsaved\n")
  assert not (tmp_path / "second").exists()
  assert len(list(ids.iterdir())) == 1
