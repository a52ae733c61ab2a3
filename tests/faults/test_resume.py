"""Runs that go on although what they had written was damaged, deleted, or cut short."""

import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest

from rlpr_jax import report
from rlpr_jax import train as training_program
from rlpr_jax.errors import InputError
from rlpr_jax.runs.metrics import MetricsWriter, read
from rlpr_jax.sampling.engine import Engine, StoppedError
from rlpr_jax.training.update import Update
from tests.tiny_run import final_state, rows, timeless, tiny


def config(**changes):
  """Six steps that end with an evaluation; the baselines are computed in seven parts."""
  config = tiny()
  config.warm_start.steps, config.evaluation.prompts, config.evaluation.every = 3, 4, 2
  config.update_from_flattened_dict(changes)
  return config


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A run that nothing happened to."""
  workdir = tmp_path_factory.mktemp("whole")
  training_program.train(config(), workdir)
  return workdir


def copied(whole, tmp_path):
  return shutil.copytree(whole, tmp_path / "run")


def check_equal(workdir, whole, **changes):
  """Bit for bit: metrics, rollouts, parameters and all else of the state."""
  assert timeless(workdir) == timeless(whole)
  for file in (whole / "rollouts").iterdir():
    assert (workdir / "rollouts" / file.name).read_text() == file.read_text()
  ours, theirs = (jax.tree.leaves(final_state(path, config(**changes))) for path in (workdir, whole))
  for x, y in zip(ours, theirs, strict=True):
    np.testing.assert_array_equal(x, y)


# --- Files that were damaged ---


@pytest.mark.parametrize(
  ("line", "why"),
  [
    (b'{"step": 3, "reward', "not JSON"),
    (b"\xff\xfe", "not UTF-8"),
    (b"null", "no row of metrics with a step"),
    (b'{"reward/total": 1}', "no row of metrics with a step"),
    (b"[" * 100_000, "not JSON"),
  ],
)
def test_a_damaged_line_costs_itself_alone(whole, tmp_path, capsys, line, why):
  workdir = copied(whole, tmp_path)
  path = workdir / "metrics.jsonl"
  lines = path.read_bytes().splitlines()
  lines[3] = line
  path.write_bytes(b"\n".join(lines) + b"\n")
  before = path.read_bytes()
  MetricsWriter(workdir, 6, retry_seconds=0).close()
  assert [row["step"] for row in rows(workdir)] == [0, 1, 2, 4, 5, 6]
  assert (workdir / "metrics.jsonl.1").read_bytes() == before
  assert capsys.readouterr().out.count(f"metrics.jsonl, line 4: {why}: left out") == 1


def test_a_last_line_that_was_cut_off_by_a_kill_is_no_damage(whole, tmp_path, capsys):
  workdir = copied(whole, tmp_path)
  with (workdir / "metrics.jsonl").open("a") as file:
    file.write('{"step": 7, "rew')
  MetricsWriter(workdir, 6, retry_seconds=0).close()
  assert [row["step"] for row in rows(workdir)] == list(range(7))
  assert not (workdir / "metrics.jsonl.1").exists()
  assert not capsys.readouterr().out


def test_files_among_the_rollouts_that_are_none_stay(whole, tmp_path):
  workdir = copied(whole, tmp_path)
  for name in ("step_notes.jsonl", "step_.jsonl", "step_²2.jsonl"):
    (workdir / "rollouts" / name).write_text("mine")
  MetricsWriter(workdir, 4, retry_seconds=0).close()
  kept = {f"step_00000{step}.jsonl" for step in (1, 2, 3, 4)}
  assert {path.name for path in (workdir / "rollouts").iterdir()} == kept | {
    "step_.jsonl",
    "step_notes.jsonl",
    "step_²2.jsonl",
  }


@pytest.mark.parametrize("name", ["metrics.jsonl", "rollouts"])
def test_a_directory_in_the_place_of_a_file_and_the_other_way_round(whole, tmp_path, name):
  workdir = copied(whole, tmp_path)
  path = workdir / name
  if path.is_dir():
    shutil.rmtree(path)
    path.write_text("x")
  else:
    path.unlink()
    path.mkdir()
  with pytest.raises(InputError, match=rf"run/{name}: .*expected"):
    training_program.train(config(), workdir)


# --- Files that are gone ---


@pytest.mark.slow
def test_metrics_without_checkpoints_are_not_wiped(whole, tmp_path):
  workdir = copied(whole, tmp_path)
  shutil.rmtree(workdir / "checkpoints")
  before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
  with pytest.raises(InputError, match=r"metrics of 6 steps, and .*checkpoints holds no checkpoint: .* --fresh"):
    training_program.train(config(), workdir)
  assert {path: path.read_bytes() for path in before} == before
  training_program.train(config(), workdir, fresh=True)
  check_equal(workdir, whole)
  assert (workdir / "earlier.1/metrics.jsonl").read_bytes() == before[workdir / "metrics.jsonl"]


def test_an_evaluation_that_is_made_up_for_stands_in_the_row_of_its_step(whole, tmp_path, capsys):
  workdir = copied(whole, tmp_path)
  lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
  (workdir / "metrics.jsonl").write_text("".join(lines[:4]))
  training_program.train(config(), workdir)
  assert "metrics.jsonl: ends with 3, the checkpoint is of step 6: what lies between is lost" in capsys.readouterr().out
  found, expected = rows(workdir), rows(whole)
  assert [row["step"] for row in found] == [0, 1, 2, 3, 6]
  assert found[3] == expected[3]
  assert found[-1] == {key: x for key, x in expected[-1].items() if key == "step" or key.startswith("held_out")}


def test_what_is_deleted_while_a_run_goes_on_is_made_again(tmp_path):
  writer = MetricsWriter(tmp_path, None, retry_seconds=0)
  for step in (1, 2, 3, 4):
    if step == 3:
      shutil.rmtree(tmp_path / "rollouts")
      shutil.rmtree(tmp_path / "tensorboard")
      (tmp_path / "metrics.jsonl").unlink()
    writer.write_rollouts(step, [{"text": "x"}])
    writer.write(step, {"x": 0.5 * step})
  (tmp_path / "metrics.jsonl").unlink()  # after the last step
  writer.close()
  assert [row["step"] for row in read(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
  assert sorted(path.name for path in (tmp_path / "rollouts").iterdir()) == ["step_000003.jsonl", "step_000004.jsonl"]
  assert scalars(tmp_path / "tensorboard") == {1: 0.5, 2: 1.0, 3: 1.5, 4: 2.0}


def scalars(directory):
  """The values of a run's event files, by step."""
  from tensorboardX.proto import event_pb2

  found = {}
  for path in directory.iterdir():
    content = path.read_bytes()
    while content:  # records: length, its checksum, the event, its checksum
      length = int.from_bytes(content[:8], "little")
      event = event_pb2.Event.FromString(content[12 : 12 + length])
      content = content[16 + length :]
      for value in event.summary.value:
        found[event.step] = value.simple_value
  return found


def test_pictures_that_cannot_be_written_are_said_once_and_not_waited_for(tmp_path, capsys):
  writer = MetricsWriter(tmp_path, None, retry_seconds=1e9)
  shutil.rmtree(tmp_path / "tensorboard")
  (tmp_path / "tensorboard").write_text("in the way")
  for step in (1, 2):
    writer.write(step, {"x": 0.5 * step})
  assert capsys.readouterr().err.count("tensorboard: ") == 1
  (tmp_path / "tensorboard").unlink()
  writer.write(3, {"x": 1.5})
  writer.close()
  assert scalars(tmp_path / "tensorboard") == {1: 0.5, 2: 1.0, 3: 1.5}
  assert [row["step"] for row in read(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_report_that_cannot_be_written_is_one_line(whole, tmp_path, capsys, monkeypatch):
  def full(workdir):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(report, "write_report", full)
  training_program.train(config(), copied(whole, tmp_path))
  printed = capsys.readouterr()
  assert printed.err == "report: cannot be written (No space left on device), rlpr report does it later\n"


# --- Work that was cut short ---


def interrupt_at(monkeypatch, owner, name, call):
  """SIGTERM comes in the middle of some call of a method; returns the list of calls."""
  honest, calls, sent = getattr(owner, name), [], []

  def method(self, *args, **kwargs):
    calls.append(args)
    if len(calls) == call and not sent:
      sent.append(call)
      os.kill(os.getpid(), signal.SIGTERM)
    return honest(self, *args, **kwargs)

  monkeypatch.setattr(owner, name, method)
  return calls


@pytest.mark.parametrize(
  ("owner", "name", "call", "left"),
  [
    (Update, "__call__", 2, 1),  # of three supervised steps the second is finished
    pytest.param(Engine, "baseline", 3, 4, marks=pytest.mark.slow),  # of seven parts of the baselines three are
    pytest.param(Engine, "sample", 1, 1, marks=pytest.mark.slow),  # in the first evaluation
  ],
)
def test_stops_before_step_1_lose_nothing(whole, tmp_path, monkeypatch, capsys, owner, name, call, left):
  calls = interrupt_at(monkeypatch, owner, name, call)
  training_program.train(config(), tmp_path)
  assert "stopped before step 1: what was done is kept" in capsys.readouterr().out
  assert len(calls) == call
  assert not (tmp_path / "metrics.jsonl").read_text()
  calls.clear()
  training_program.train(config(**{"steps": 0}), tmp_path)
  assert len(calls) == left
  training_program.train(config(), tmp_path)
  check_equal(tmp_path, whole)
  assert not (tmp_path / "unfinished").exists()


@pytest.mark.slow
def test_the_best_checkpoint_is_kept_although_its_accuracy_came_late(tmp_path, monkeypatch):
  """The evaluation after step 2, the best, is cut short; the next start makes up for it."""
  accuracies, cut = {0: 0.1, 2: 0.9, 4: 0.3, 6: 0.2}, []

  def evaluate_run(run, params, step, workdir, stop):
    if step == 2 and not cut:
      cut.append(step)
      os.kill(os.getpid(), signal.SIGTERM)
      raise StoppedError
    return {"held_out/accuracy": accuracies[step]}

  monkeypatch.setattr(training_program, "evaluate_run", evaluate_run)
  monkeypatch.setattr("rlpr_jax.training.held_out.evaluate_run", evaluate_run)
  changes = {"log.keep_checkpoints": 1, "log.keep_best": 1}
  training_program.train(config(**changes), tmp_path)
  assert [row["step"] for row in rows(tmp_path)] == [0, 1, 2]
  training_program.train(config(**changes), tmp_path)
  found = {row["step"]: row["held_out/accuracy"] for row in rows(tmp_path) if "held_out/accuracy" in row}
  assert found == accuracies
  assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()) == ["2", "6"]


def test_baselines_at_the_first_draw_are_those_of_the_initial_policy(whole, tmp_path):
  """Those of a prompt that is drawn late too, when the policy has long changed."""
  changes = {"reward.baseline_when": "first_draw", "steps": 3}
  training_program.train(config(**changes), tmp_path)
  ours, theirs = (final_state(path, config(**c)).baselines for path, c in ((tmp_path, changes), (whole, {})))
  drawn = ~np.isnan(ours).all(axis=1)
  assert 5 < drawn.sum() < len(ours)
  np.testing.assert_allclose(ours[drawn], theirs[drawn], atol=1e-5)
  late = {row["row"] for row in map(json.loads, (tmp_path / "rollouts/step_000003.jsonl").read_text().splitlines())}
  early = {row["row"] for row in map(json.loads, (tmp_path / "rollouts/step_000001.jsonl").read_text().splitlines())}
  assert late - early
  for found, expected in zip(rows(tmp_path), rows(whole), strict=False):
    assert found.get("reward/baseline") == pytest.approx(expected.get("reward/baseline"), abs=1e-5)


# --- Steps that train on nothing ---


def nothing(evidence, texts, prompts):
  return np.full(evidence.scorable.shape, np.nan, np.float32)


def test_a_run_that_trains_on_nothing_says_so(tmp_path, capsys):
  changes = {"evaluation.prompts": 0, "guards.patience": 3, "guards.stop": True, "guards.min_gain": -9.0}
  changes |= {"guards.min_length_share": 0.0, "guards.min_format": 0.0, "guards.max_truncated": 1.0}
  with pytest.raises(InputError, match=r"^stopped after step 3, which is saved: alarm: 0 groups that could be trained"):
    training_program.train(config(**changes), tmp_path, custom_reward=nothing)
  assert "alarm at step 3: 0 groups that could be trained on, under 1 for 3 steps" in capsys.readouterr().out
  assert [row["filter/steps_without_training"] for row in rows(tmp_path)] == [1, 2, 3]
