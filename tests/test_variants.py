"""Training with the method's variants: it runs, writes what it measured, and goes on from a checkpoint as if whole."""

import json

import jax
import numpy as np
import pytest

from rlpr_jax import train as training_program
from rlpr_jax.training.run import set_up
from tests.tiny_run import final_state, rows, timeless, tiny

VARIANTS = {
  "many": {
    "reward.kind": "mixture", "reward.verifier": "exact", "reward.normalization": "separate",
    "reward.scorer": "lagged", "reward.scorer_every": 2, "reward.baseline_policy": "moving_average",
    "reward.token_weights": "base", "reward.answer_length_coefficient": 0.2,
    "reward.shadow": ("product: aggregate=product", "bare: baseline_policy=none", "rule: kind=rule"),
    "training.answer_gradient": "verifree", "training.kl_coefficient": 0.1, "training.epochs_per_step": 2,
    "evaluation.top_k": 5, "evaluation.min_p": 0.01, "evaluation.stop": ("</think>",),
    "training.dual_clip": 3.0, "filter.source_scales": (("addition", 0.1), ("letters", 2.0)),
  },
  "others": {
    "reward.scorer": "initial", "reward.verifier": "exact", "reward.baseline_policy": "current",
    "reward.token_weights": "spread", "reward.shaping": "rank", "training.answer_gradient": "jepo",
    "training.loss": "truncated", "training.advantages": "leave_one_out", "evaluation.temperature": 0.0,
  },
}  # fmt: skip


def config(name):
  c = tiny()
  c.steps = 4
  with c.ignore_type():
    c.update_from_flattened_dict(VARIANTS[name])
  return c


@pytest.fixture(scope="module", params=["many", pytest.param("others", marks=pytest.mark.slow)])
def run(request, tmp_path_factory):
  workdir = tmp_path_factory.mktemp(request.param)
  training_program.train(config(request.param), workdir)
  return request.param, workdir


@pytest.mark.slow
def test_everything_measured_is_finite(run):
  name, workdir = run
  steps = rows(workdir)
  assert [row["step"] for row in steps] == [0, 1, 2, 3, 4]
  assert all(np.isfinite(value) for row in steps for value in row.values())
  assert any(row.get("update/answer_loss", 0) > 0 for row in steps)
  assert steps[4]["compilations"] == 0
  if name == "many":
    assert steps[0]["held_out/format"] == 0  # evaluation stops before the answer
    assert any(row.get("update/kl", 0) > 1e-6 for row in steps)
    assert {f"shadow/{shadow}/total" for shadow in ("product", "bare", "rule")} <= set(steps[1])
    rollout = json.loads((workdir / "rollouts/step_000002.jsonl").read_text().splitlines()[0])
    assert {"shadow_product", "shadow_bare", "shadow_rule"} <= set(rollout)
    assert rollout["shadow_rule"] in (0.0, 1.0)


@pytest.mark.slow
def test_a_run_in_two_halves_is_the_whole_one(run, tmp_path):
  """Frozen and lagged copies, moving baselines and carried answers are in the checkpoint."""
  name, workdir = run
  half = config(name)
  half.steps = 1
  training_program.train(half, tmp_path)
  training_program.train(config(name), tmp_path)

  def without_evaluations(steps):
    return [{k: v for k, v in row.items() if not k.startswith("held_out")} for row in steps]

  assert without_evaluations(timeless(tmp_path)) == without_evaluations(timeless(workdir))
  found, expected = final_state(tmp_path, config(name)), final_state(workdir, config(name))
  for field in ("params", "initial", "lagged", "baselines", "carried"):
    for ours, theirs in zip(
      jax.tree.leaves(getattr(found, field)), jax.tree.leaves(getattr(expected, field)), strict=True
    ):
      np.testing.assert_array_equal(ours, theirs)
  assert jax.tree.leaves(expected.initial)  # for the KL term, or as scorer
  if name == "many":  # two steps in four copy the policy
    assert all(
      np.array_equal(a, b)
      for a, b in zip(jax.tree.leaves(expected.lagged), jax.tree.leaves(expected.params), strict=True)
    )


@pytest.mark.slow
def test_initial_baselines_stay_and_current_ones_follow_the_policy(tmp_path):
  """A prompt's current baseline is the engine's own call on the newest policy that drew it."""
  c = config("others")
  c.steps, c.data.count, c.rollout.prompts_per_draw, c.max_draws = 1, 3, 3, 1
  training_program.train(c, tmp_path / "current")
  run = set_up(c)
  state = final_state(tmp_path / "current", c)
  known = np.isfinite(state.baselines).any(axis=1)
  assert known.all()
  # With a frozen scorer the baselines are the frozen policy's.
  expected = run.engine.baseline(run.policy.sampling_params(state.initial), run.prompts)
  np.testing.assert_allclose(state.baselines, expected, atol=1e-5)
