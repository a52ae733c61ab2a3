"""Runs that are killed again and again, and runs whose updates break: nothing is lost, written twice or half done."""

import contextlib
import os
import pathlib
import random
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from rlpr_jax import train as training_program
from rlpr_jax.errors import InputError
from rlpr_jax.policy import initial_params, load_policy
from rlpr_jax.training.update import Update
from tests.tiny_run import RECIPE, ROOT, final_state, rows, start, timeless, tiny


@pytest.mark.slow
def test_updates_that_are_not_finite_are_left_out_and_end_the_run(tmp_path, monkeypatch):
  """From the second step on, every gradient is NaN: the run stops with the batch on disk and the state before it."""
  config, honest, calls = tiny(), Update.__call__, []
  config.warm_start.steps, config.evaluation.prompts, config.training.minibatches = 0, 0, 2
  config.guards.max_skipped = 3

  def broken(update, state, part):
    calls.append(part)
    if len(calls) > 2:
      part = part._replace(advantages=part.advantages * np.float32(np.nan))
    return honest(update, state, part)

  monkeypatch.setattr(Update, "__call__", broken)
  with pytest.raises(InputError, match=r"^stopped after step 3, which is saved: .* in a row .*step_000003.*npz"):
    training_program.train(config, tmp_path)
  found = rows(tmp_path)
  assert [row["step"] for row in found] == [1, 2, 3]
  assert [row["update/skipped"] for row in found] == [0, 2, 2]
  assert "update/loss" in found[0]
  assert "update/loss" not in found[1]
  assert all(np.isfinite(value) for row in found for value in row.values())
  files = sorted(path.name for path in (tmp_path / "failed").iterdir())
  assert files == [f"step_00000{step}_update_{i}.npz" for step in (2, 3) for i in (0, 1)]
  assert np.load(tmp_path / "failed" / files[0])["tokens"].size > 0

  state = final_state(tmp_path, config)
  assert state.step == 3
  start_params = initial_params(config, load_policy(config))
  leaves = list(zip(jax.tree.leaves(state.params), jax.tree.leaves(start_params), strict=True))
  assert all(np.isfinite(x).all() for x, _ in leaves)
  assert any(not np.array_equal(x, y) for x, y in leaves)  # the first step's
  (adam,) = [part for part in state.opt_state[1] if hasattr(part, "mu")]
  assert int(adam.count) == 2


STEPS = 160


def check_equal(workdir, whole, config):
  """Bit for bit: parameters, optimiser, filter, carried prompts, metrics and rollouts; none lost, none twice."""
  assert timeless(workdir) == timeless(whole)
  assert [row["step"] for row in rows(workdir)] == list(range(config.steps + 1))
  ours, theirs = (jax.tree.leaves(final_state(path, config)) for path in (workdir, whole))
  for x, y in zip(ours, theirs, strict=True):
    np.testing.assert_array_equal(x, y)
  for file in sorted((whole / "rollouts").iterdir()):
    assert (workdir / "rollouts" / file.name).read_text() == file.read_text()


# Places of a run, by the lines that tell of them, and how often a run is met there.
PLACES = (["warm start", "baselines", "held-out", "resumed"] * 2 + ["step "] * 22)[:30]


@pytest.mark.slow
def test_thirty_kills_and_signals_at_random_moments_change_nothing(tmp_path):
  """Over warm start, baselines, evaluation, saving and writing; often with output that nobody reads any more."""
  recipe = tmp_path / "tiny.py"
  recipe.write_text(RECIPE)
  overrides = {"steps": STEPS, "evaluation.every": 8, "log.checkpoint_every": 3, "log.keep_checkpoints": 2}
  config = tiny()
  config.update_from_flattened_dict(overrides)
  training_program.train(config, tmp_path / "whole")

  rng, workdir, seen = random.Random(0), tmp_path / "killed", []
  arguments = [f"--config.{name}={value}" for name, value in overrides.items()]
  for number, place in enumerate(PLACES):
    process = start(recipe, workdir, *arguments)
    # So many lines and a moment more: the test means the same on a fast machine and a busy one.
    lines = rng.randint(1, 8) if place == "step " else 1
    for line in process.stdout:
      lines -= line.startswith((place, "step "))
      if lines <= 0:
        break
    if number % 2:
      process.stdout.close()  # the reader goes away first, as of `train | tee log` and Ctrl-C
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(rng.uniform(0, 0.3))
    assert process.poll() is None, f"it was over after {number} kills: {process.stderr.read()}"
    how = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
    process.send_signal(how)
    status = process.wait(60)
    assert status == (-signal.SIGKILL if how == signal.SIGKILL else 0), process.stderr.read()
    assert "Traceback" not in process.stderr.read()
    for stream in (process.stdout, process.stderr):
      stream.close()
    seen.append(len(rows(workdir)) if (workdir / "metrics.jsonl").exists() else 0)
  assert len(set(seen)) > 5, "killed too early each time to show anything"
  training_program.train(config, workdir)
  check_equal(workdir, tmp_path / "whole", config)


@pytest.mark.slow
def test_kills_of_one_of_two_processes_change_nothing(tmp_path):
  """The other ends too; the launcher gives the command again."""
  recipe = tmp_path / "tiny.py"
  recipe.write_text(RECIPE)
  overrides = {"steps": 30, "evaluation.every": 8, "log.checkpoint_every": 3, "rollout.prompts_per_draw": 4}
  config = tiny()
  config.update_from_flattened_dict(overrides)

  def launch(workdir):
    arguments = [f"--config.{name}={value}" for name, value in overrides.items()]
    command = [sys.executable, "launch/local.py", "--processes=2", "--", f"--config={recipe}", f"--workdir={workdir}"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen([*command, *arguments], stdout=pipe, stderr=pipe, text=True, env=env, cwd=ROOT)

  whole = launch(tmp_path / "whole")
  _, problem = whole.communicate()
  assert whole.returncode == 0, problem
  rng, workdir = random.Random(0), tmp_path / "killed"
  for number in range(6):
    process = launch(workdir)
    lines, place = rng.randint(1, 4), ("warm start", "baselines", "held-out", "step ")[min(number, 3)]
    for line in process.stdout:
      lines -= line.startswith(place)
      if lines <= 0 or (place != "step " and line.startswith(place)):
        break
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2, "it was over"
    os.kill(int(rng.choice(children)), rng.choice([signal.SIGKILL, signal.SIGTERM]))
    process.communicate(timeout=120)
  last = launch(workdir)
  _, problem = last.communicate()
  assert last.returncode == 0, problem
  check_equal(workdir, tmp_path / "whole", config)
