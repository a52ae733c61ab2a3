"""One step's batch: what is kept of what was drawn."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from rlpr_jax import config, filtering, types, validation
from rlpr_jax.data.pipeline import PromptStream
from rlpr_jax.errors import InputError
from rlpr_jax.runs.interrupt import StopRequest
from rlpr_jax.runs.records import finite_mean
from rlpr_jax.sampling.decode import DecodeSettings
from rlpr_jax.sampling.device import Device
from rlpr_jax.sampling.engine import Engine
from rlpr_jax.sampling.shapes import Shapes
from rlpr_jax.training.collect import collect, compute_advantages
from rlpr_jax.training.reward import RewardSettings
from rlpr_jax.training.run import Run
from rlpr_jax.types import Evidence, Prompt, Rewards, TrainState

LIMIT, RESPONSE, SAMPLES = 8, 6, 4


class Stream(PromptStream):
  """Draws prompts in turns."""

  def __init__(self, prompts):
    self.prompts, self.drawn = prompts, 0

  def next_batch(self, count):
    first, self.drawn = self.drawn, self.drawn + count
    return [(draw, self.prompts[draw % len(self.prompts)]) for draw in range(first, self.drawn)]

  def state(self):
    return {"drawn": self.drawn}

  def restore(self, state):
    self.drawn = state["drawn"]


@pytest.fixture(scope="module")
def batch(policy):
  """Of two draws of four prompts, of which the second cannot be read and the fourth is too long."""
  prompts, found, _ = collected(policy, 100)
  return prompts, found


def collected(policy, needed, keep_rate=1.0):
  """The prompts, what a step makes of at most two draws of them, and how many were drawn."""
  c = config.default()
  c.prompts_per_step, c.max_draws, c.samples_per_prompt = needed, 2, SAMPLES
  c.rollout.prompts_per_draw, c.data.prompt_limit = 4, LIMIT
  c.reward.kind = "random"  # every group spreads, whatever was sampled
  settings = DecodeSettings(4, (policy.tokenizer.eos_token_id,))
  device = Device(policy.model, settings, Shapes(16, LIMIT, RESPONSE, 8, 4, 2, 4, 4))
  engine = Engine(device, policy.tokenizer, "think", baseline_prefix="bare")
  good = Prompt(ids=np.arange(10, 15, dtype=np.int32), reference="7", source="test")
  prompts = [
    dataclasses.replace(good, ids=ids, row=row)
    for row, ids in enumerate([good.ids, good.ids[:0], good.ids[:3], np.ones(LIMIT + 1, np.int32)])
  ]
  run = Run(**dict.fromkeys(Run._fields))._replace(
    config=c,
    engine=engine,
    policy=SimpleNamespace(sampling_params=lambda params: params),
    key=jax.random.key(0),
    filter=filtering.FilterConfig(kind="off"),
    reward=RewardSettings.of(c.reward),
    shadows={},
  )
  nothing = types.Groups.empty(prompt_limit=LIMIT, samples=SAMPLES, response_limit=RESPONSE, credits_parts=True)
  state = TrainState(
    step=0,
    params=policy.params,
    opt_state=None,
    filter=filtering.init(run.filter),
    baselines=np.full((4, 8), np.nan, np.float32),
    initial={},
    lagged={},
    averaged={},
    carried=nothing,
    stream={},
  )
  stream = Stream(prompts)
  return prompts, collect(run, state, stream, StopRequest(), keep_rate), stream.drawn


@pytest.mark.parametrize(("needed", "drawn"), [(2, 4), (3, 8), (4, 8)])
def test_a_draw_that_begins_ahead_changes_nothing_but_time(policy, needed, drawn):
  """Two of four prompts are kept: whether another draw is expected rightly, wrongly, or not at all."""
  waits = collected(policy, needed, keep_rate=100.0)
  begins = collected(policy, needed, keep_rate=0.0)
  beside = ("seconds/", "tokens_per_second/", "rollout/occupancy", "rollout/wasted_tokens")
  for _, found, so_far in (waits, begins):
    assert so_far == drawn == found.metrics["filter/drawn"]  # what was begun in vain comes again
    assert (found.metrics["rollout/wasted_tokens"] > 0) == (found is begins[1] and drawn == 4)
    assert 0 < found.metrics["rollout/occupancy"] <= 1
  one, other = ({k: v for k, v in x[1].metrics.items() if not k.startswith(beside)} for x in (waits, begins))
  assert one == other
  for ours, theirs in zip(jax.tree.leaves(waits[1].groups), jax.tree.leaves(begins[1].groups), strict=True):
    np.testing.assert_array_equal(ours, theirs)
  assert str(waits[1].rollouts) == str(begins[1].rollouts)  # some spreads are NaN


def test_refused_prompts_are_counted_and_never_trained_on(batch):
  prompts, found = batch
  assert found.metrics["rollout/refused_prompts"] == 4
  assert found.metrics["filter/drawn"] == 8
  assert found.metrics["filter/kept"] == found.metrics["filter/trained"] == found.groups.num_groups == 4
  for group, prompt in enumerate([prompts[0], prompts[2]] * 2):
    assert found.groups.prompt_lengths[group] == len(prompt.ids)
    assert found.groups.prompt_tokens[group, : len(prompt.ids)].tolist() == prompt.ids.tolist()
  assert (found.groups.lengths > 0).all()
  assert all(np.isfinite(value) for value in found.metrics.values())
  refused = np.array([False, True, False, True] * 2)
  np.testing.assert_array_equal(np.isnan(found.stds), refused)  # no part of the filter's average
  assert found.metrics["reward/group_std"] == pytest.approx(found.stds[~refused].mean())


def test_a_custom_reward_is_trained_on_whatever_the_mixture():
  c = config.default()
  c.reward.kind, c.reward.normalization, c.reward.verifier = "mixture", "separate", "exact"
  evidence = Evidence(**dict.fromkeys(Evidence._fields))._replace(verified=np.eye(2, 4, dtype=np.float32))
  evidence = evidence._replace(scorable=np.ones((2, 4), bool))
  total = np.array([[1, 2, 3, 6], [0, 0, 1, 1]], np.float32)
  run = Run(**dict.fromkeys(Run._fields))._replace(config=c, custom_reward=lambda *_: total)
  found = compute_advantages(run, evidence, Rewards(**dict.fromkeys(Rewards._fields))._replace(total=total))
  centred = total - total.mean(axis=1, keepdims=True)
  np.testing.assert_allclose(found.advantages, centred / total.std(axis=1, ddof=1, keepdims=True), rtol=1e-4)


@pytest.mark.parametrize("change", [{"reward.kind": "random"}, {"reward.custom": "mine.py:reward"}])
def test_a_reward_that_jepo_would_ignore_is_refused(change):
  c = config.default()
  c.update_from_flattened_dict({"training.answer_gradient": "jepo"} | change)
  with pytest.raises(InputError, match=r"^config\.training\.answer_gradient: jepo .* expected config\.reward\.kind"):
    validation.validate(c)


def test_means_leave_out_what_is_not_finite():
  assert finite_mean([np.array([1.0, np.nan]), np.array([[3.0, np.inf]])]) == 2.0
  assert finite_mean([np.array([np.nan])]) == 0.0
