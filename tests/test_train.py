"""The training program as a whole: it runs, stops, dies, resumes, and refuses what it cannot use."""

import json
import pathlib
import signal
import subprocess
import time

import jax
import numpy as np
import pytest

from rlpr_jax import config as configs
from rlpr_jax import train as training_program
from rlpr_jax.errors import InputError
from rlpr_jax.policy import initial_params, load_policy
from rlpr_jax.sampling.engine import StoppedError
from tests.tiny_run import final_state, rows, start, timeless, tiny

ROOT = pathlib.Path(__file__).parents[1]


def wait_for(process: subprocess.Popen, path: pathlib.Path) -> None:
  deadline = time.monotonic() + 240
  while not path.exists():
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < deadline, f"{path} never came"
    time.sleep(0.02)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> pathlib.Path:
  """A run of six steps that nothing disturbs."""
  workdir = tmp_path_factory.mktemp("whole")
  training_program.train(tiny(), workdir)
  return workdir


def test_whole_run_writes_finite_metrics_rollouts_and_report(whole_run):
  steps = rows(whole_run)
  assert [row["step"] for row in steps] == [0, 1, 2, 3, 4, 5, 6]
  assert all(np.isfinite(value) for row in steps for value in row.values())
  assert "held_out/accuracy" in steps[0]
  assert "held_out/accuracy" in steps[-1]
  assert steps[-1]["held_out/exact"] == steps[-1]["held_out/accuracy"]  # of these questions one answer alone is right
  assert len({row["reward/total"] for row in steps[1:]}) > 1
  assert all(row["sampler_gap/worst"] < 1e-3 for row in steps[1:])
  assert not any(row["sampler_gap/recomputed"] for row in steps[1:])
  assert all(0 < row["update/step_kl"] < 1 for row in steps[1:])
  assert (whole_run / "report.html").stat().st_size > 10_000
  rollouts = [json.loads(line) for line in (whole_run / "rollouts/step_000003.jsonl").read_text().splitlines()]
  assert len(rollouts) == 12  # the first draw: three prompts, four samples
  for rollout in rollouts:
    assert rollout["reward_total"] == pytest.approx(
      0.9 * rollout["reward_debiased"] + 0.1 * rollout["reward_format"] + rollout["reward_repetition"], abs=1e-6
    )
    if rollout["scorable"]:
      assert rollout["reward_reference"] == pytest.approx(np.mean(rollout["reference_probs"]), abs=1e-6)
      assert "".join(rollout["reference_tokens"]).strip() == rollout["reference"]
      assert len(rollout["baseline_probs"]) == len(rollout["reference_tokens"])
    assert rollout["reward_baseline"] == pytest.approx(np.mean(rollout["baseline_probs"]), abs=1e-6)


def test_held_out_accuracy_by_another_verifier(tmp_path):
  """Beside it stand the answers with a reference's text, which the other verifier judges wrong where it is a word."""
  config = tiny()
  config.steps, config.evaluation.verifier = 0, "number"
  training_program.train(config, tmp_path)
  (row,) = rows(tmp_path)
  assert row["held_out/accuracy/weekday"] == 0
  assert row["held_out/accuracy/addition"] >= row["held_out/exact/addition"]
  sources = [name.removeprefix("held_out/exact/") for name in row if name.startswith("held_out/exact/")]
  assert row["held_out/exact"] == pytest.approx(np.mean([row[f"held_out/exact/{source}"] for source in sources]))


def test_nothing_compiles_after_the_second_step(whole_run):
  steps = rows(whole_run)[1:]
  assert len({row["filter/drawn"] for row in steps}) > 1, "every step drew alike: other shapes were not tried"
  assert steps[0]["compilations"] > 0
  assert [row["compilations"] for row in steps[2:]] == [0, 0, 0, 0]


def test_killed_run_goes_on_as_if_nothing_had_happened(whole_run, recipe, tmp_path):
  process = start(recipe, tmp_path)
  wait_for(process, tmp_path / "checkpoints/3")
  process.kill()
  process.communicate()
  assert rows(tmp_path)[-1]["step"] < 6, "killed too late to show anything"
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 5, "rew')  # as a crash in the middle of a write leaves it
  training_program.train(tiny(), tmp_path)
  assert timeless(tmp_path) == timeless(whole_run)
  for ours, theirs in zip(
    jax.tree.leaves(final_state(tmp_path, tiny())), jax.tree.leaves(final_state(whole_run, tiny())), strict=True
  ):
    np.testing.assert_array_equal(ours, theirs)
  for file in sorted((whole_run / "rollouts").iterdir()):
    assert (tmp_path / "rollouts" / file.name).read_text() == file.read_text()


CARRIES = {
  "rollout.carry": "partial",
  "rollout.carry_tokens": 12,
  "training.importance_cap": 2.0,
  "training.old_logprobs": "trainer",
  "filter.kind": "off",
  "max_draws": 1,
}


@pytest.mark.slow
def test_a_run_that_carries_responses_goes_on_from_every_step(tmp_path):
  """Groups that have not ended are in the checkpoint, with whose policy each of their tokens is."""
  config = tiny()
  config.update_from_flattened_dict(CARRIES | {"steps": 4, "warm_start.steps": 30, "evaluation.prompts": 0})
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  training_program.train(config, whole)
  for config.steps in (1, 2, 4):
    training_program.train(config, parts)
  assert timeless(parts) == timeless(whole)
  for ours, theirs in zip(
    jax.tree.leaves(final_state(parts, config)), jax.tree.leaves(final_state(whole, config)), strict=True
  ):
    np.testing.assert_array_equal(ours, theirs)
  steps = rows(whole)
  assert any(row["rollout/unfinished_groups"] for row in steps)
  assert any(row.get("rollout/stale_tokens") for row in steps)
  assert all(row["filter/drawn"] <= config.rollout.prompts_per_draw * config.max_draws for row in steps)
  assert [row["compilations"] for row in steps[2:]] == [0, 0]


@pytest.mark.slow
def test_ten_kills_of_a_run_that_carries_change_nothing(recipe, tmp_path):
  overrides = [f"--config.{name}={value}" for name, value in CARRIES.items()]
  overrides += ["--config.steps=12", "--config.evaluation.prompts=0"]
  config = tiny()
  config.update_from_flattened_dict(CARRIES | {"steps": 12, "evaluation.prompts": 0})
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  training_program.train(config, whole)
  for step in range(1, 11):
    process = start(recipe, killed, *overrides)
    wait_for(process, killed / f"checkpoints/{step}")
    process.kill()
    process.communicate()
  training_program.train(config, killed)
  assert timeless(killed) == timeless(whole)
  for ours, theirs in zip(
    jax.tree.leaves(final_state(killed, config)), jax.tree.leaves(final_state(whole, config)), strict=True
  ):
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_signal_finishes_the_step_and_saves(whole_run, recipe, tmp_path, number):
  process = start(recipe, tmp_path, "--config.steps=500")
  wait_for(process, tmp_path / "rollouts/step_000002.jsonl")
  process.send_signal(number)
  out, err = process.communicate(timeout=120)
  assert process.returncode == 0, err
  last = rows(tmp_path)[-1]["step"]
  assert f"stopped after step {last} of 500 and saved: the same command goes on from there" in out
  assert last < 100
  assert final_state(tmp_path, tiny()).step == last
  assert timeless(tmp_path)[1:3] == timeless(whole_run)[1:3]


@pytest.mark.slow
def test_signal_in_the_warm_start_leaves_nothing_half_done(recipe, tmp_path):
  process = start(recipe, tmp_path, "--config.warm_start.steps=3000")
  wait_for(process, tmp_path / "rollouts")
  process.send_signal(signal.SIGTERM)
  out, err = process.communicate(timeout=120)
  assert process.returncode == 0, err
  assert "stopped before step 1" in out
  assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.slow
def test_an_evaluation_that_a_stop_cut_short_is_made_up_for(whole_run, tmp_path, monkeypatch):
  honest = training_program.evaluate_run

  def cut_short(run, params, step, *rest):
    if step == 6:
      raise StoppedError
    return honest(run, params, step, *rest)

  monkeypatch.setattr(training_program, "evaluate_run", cut_short)
  training_program.train(tiny(), tmp_path)
  assert "held_out/accuracy" not in rows(tmp_path)[-1]
  monkeypatch.undo()
  training_program.train(tiny(), tmp_path)
  assert timeless(tmp_path) == timeless(whole_run)


@pytest.mark.slow
def test_finished_run_goes_on_when_steps_are_raised(whole_run, tmp_path):
  config = tiny()
  config.steps = 4
  training_program.train(config, tmp_path)
  config.steps = 6
  training_program.train(config, tmp_path)
  one, other = (
    [{k: v for k, v in row.items() if "held_out" not in k} for row in timeless(x)] for x in (tmp_path, whole_run)
  )
  assert one == other


def test_step_that_keeps_nothing_updates_nothing(tmp_path):
  config = tiny()
  config.steps = 2
  config.warm_start.steps = 0
  config.filter.kind = "fixed"
  config.filter.threshold = 10.0
  training_program.train(config, tmp_path)
  steps = rows(tmp_path)[1:]
  assert [row["filter/trained"] for row in steps] == [0, 0]
  assert [row["filter/drawn"] for row in steps] == [9, 9]  # three draws of three, the most a step may take
  params = initial_params(config, load_policy(config))
  for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(final_state(tmp_path, config).params), strict=True):
    np.testing.assert_array_equal(before, after)


@pytest.mark.slow
def test_a_mesh_trains_as_one_device_does_and_its_run_goes_on_there(recipe, tmp_path):
  """Eight devices, two along each axis, against one; then a third step of the eight's run, on one."""
  overrides = [
    "--config.rollout.prompts_per_draw=4", "--config.training.micro_batch_rows=4", "--config.training.minibatches=2",
    "--config.warm_start.steps=10", "--config.rollout.slots=12", "--config.rollout.prefill_prompts=4",
    "--config.evaluation.every=1",
  ]  # fmt: skip
  mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
  many, one = tmp_path / "many", tmp_path / "one"
  for workdir, arguments in (
    (many, {"devices": 8, "overrides": [*mesh, "--config.steps=2"]}),
    (many, {"devices": 1, "overrides": ["--config.steps=3"]}),
    (one, {"devices": 1, "overrides": ["--config.steps=3"]}),
  ):
    process = start(recipe, workdir, *overrides, *arguments["overrides"], devices=arguments["devices"])
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
  for ours, theirs in zip(timeless(many), timeless(one), strict=True):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
      assert ours[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize(
  ("field", "value", "named"),
  [
    ("mesh.tensor", 3, "config.mesh: sizes"),
    ("mesh.data", -1, "at most one -1"),
    ("sharding.batch", "rows", "config.sharding.batch: 'rows', expected axes of the mesh"),
    ("model.attention", "flash", "config.model.attention: 'flash', expected one of auto"),
    ("lora.rank", 4, "config.lora.rank: adapters need a pretrained model"),
    ("training.minibatches", 3, "config.training.minibatches: 3 does not divide config.prompts_per_step 4"),
    (
      "training.row_length",
      30,
      "config.training.row_length: 30, expected 0 or room for the longest sequence, 46 tokens",
    ),
    ("rollout.carry", "partial", "config.training.importance_cap: 0, but config.rollout.carry partial"),
    ("training.warmup_steps", 6, "config.training.warmup_steps: 6, expected fewer than config.steps"),
    ("reward.kind", "verifier", "config.reward.kind: 'verifier', expected one of reference, rule"),
    ("reward.shaping", "threshold_x", "config.reward.shaping"),
    ("filter.alpha", 0.0, "config.filter.alpha"),
    ("steps", -1, "config.steps"),
    ("data.path", "missing.parquet", "missing.parquet"),
    ("model.path", "missing-model", "missing-model"),
    ("data.prompt_limit", 3, "none of"),
  ],
)
def test_wrong_config_is_refused_before_anything_is_written(tmp_path, field, value, named):
  config = tiny()
  config.update_from_flattened_dict({field: value})
  with pytest.raises(InputError, match=r"^[^\n]+$") as error:
    training_program.train(config, tmp_path)
  assert named in str(error.value)
  assert not list(tmp_path.iterdir())


def test_workdir_of_another_run_is_refused(tmp_path):
  config = tiny()
  (tmp_path / "config.json").write_text(configs.to_json(config))
  config.reward.kind = "random"
  with pytest.raises(InputError, match=r"holds another run: config.reward.kind is 'reference' there, 'random' here"):
    training_program.train(config, tmp_path)


def test_damaged_checkpoint_is_named(whole_run, tmp_path):
  (tmp_path / "checkpoints/7/arrays").mkdir(parents=True)
  (tmp_path / "checkpoints/7/_CHECKPOINT_METADATA").write_text("{}")
  with pytest.raises(InputError, match=r"checkpoints/7: cannot be read"):
    training_program.train(tiny(), tmp_path)


@pytest.mark.parametrize(
  ("arguments", "named"),
  [
    (["--config.rewrd.kind=random"], "rewrd"),
    pytest.param(["--config.steps=many"], "steps", marks=pytest.mark.slow),
    pytest.param(["--workdir=/dev/null/run"], "/dev/null/run", marks=pytest.mark.slow),
    pytest.param(["--config=no/such/file.py"], "no/such/file.py", marks=pytest.mark.slow),
    pytest.param(["--workdir=gs://bucket/run"], "gs://bucket/run", marks=pytest.mark.slow),
  ],
)
def test_command_line_mistake_is_one_line_and_status_2(recipe, tmp_path, arguments, named):
  process = start(recipe, tmp_path / "run", *arguments)
  _, err = process.communicate(timeout=120)
  lines = [line for line in err.splitlines() if line.startswith("error: ")]
  assert process.returncode == 2
  assert len(lines) == 1
  assert named in lines[0]
  assert "Traceback" not in err
