"""One step's batch: what is kept of what was drawn."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

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
from rlpr_jax.training.state import none_unfinished
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
  run, state = begun(policy, needed)
  stream = Stream(run.prompts)
  return run.prompts, collect(run, state, stream, StopRequest(), keep_rate), stream.drawn


def begun(policy, needed, **rollout):
  """A run of prompts of every kind, and its state before the first step."""
  c = config.default()
  c.prompts_per_step, c.max_draws, c.samples_per_prompt = needed, 2, SAMPLES
  c.rollout.max_response_length, c.data.max_reference_length = RESPONSE, 8
  c.rollout.update(rollout)
  c.rollout.prompts_per_draw, c.data.prompt_limit = 4, LIMIT
  c.reward.kind = "random"  # every group spreads, whatever was sampled
  settings = DecodeSettings(4, (policy.tokenizer.eos_token_id,))
  shapes = Shapes(16, LIMIT, RESPONSE, 8, 4, 2, 4, 4, continues=c.rollout.carry == "partial")
  device = Device(policy.model, settings, shapes)
  engine = Engine(device, policy.tokenizer, "think", baseline_prefix="bare")
  good = Prompt(ids=np.arange(10, 15, dtype=np.int32), reference="7", source="test")
  prompts = [
    dataclasses.replace(good, ids=ids, row=row)
    for row, ids in enumerate([good.ids, good.ids[:0], good.ids[:3], np.ones(LIMIT + 1, np.int32)])
  ]
  run = Run(**dict.fromkeys(Run._fields))._replace(
    config=c,
    engine=engine,
    prompts=prompts,
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
    unfinished=none_unfinished(c),
  )
  return run, state


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


@pytest.mark.parametrize(("staleness", "lengths"), [(1, [2, 6]), (2, [2, 4, 6])])
def test_groups_go_on_in_the_next_step(policy, staleness, lengths):
  """Steps by different policies, of which each gives two tokens, and the last allowed one all that are left."""
  run, state = begun(policy, needed=100, carry="partial", carry_tokens=2, max_staleness=staleness)
  run.config.max_draws = 1
  stream, found = Stream(run.prompts), []
  for step in range(len(lengths)):
    params = jax.tree.map(lambda x, step=step: (1 + 0.02 * step) * x, policy.params)
    state = state._replace(step=step, params=params)
    batch = collect(run, state, stream, StopRequest())
    state = state._replace(unfinished=batch.unfinished)
    found.append(batch)
    oldest = batch.unfinished.take(batch.unfinished.parts == step + 1)
    if step < len(lengths) - 1:
      assert batch.groups.num_groups == 0
      assert oldest.draws.tolist() == oldest.rows.tolist() == [0, 2]  # those that can be read
      np.testing.assert_array_equal(oldest.finished | (oldest.lengths == lengths[step]), True)
      assert batch.metrics["rollout/unfinished_groups"] == batch.unfinished.num_groups
    else:
      assert not oldest.num_groups
  last, before = found[-1], found[-2].unfinished
  old = before.take(before.parts == len(lengths) - 1)
  groups = last.groups
  assert groups.num_groups == 2
  assert (groups.lengths == 6).any()
  begun_with = np.arange(RESPONSE) < old.lengths[..., None]
  for name in ("tokens", "logprobs"):
    np.testing.assert_array_equal(getattr(groups, name)[begun_with], getattr(old, name)[begun_with])
  # Every token by one pass over the whole text by the policy of its step.
  for k, (row, response) in enumerate(zip(old.rows, groups.tokens, strict=True)):
    prompt = run.prompts[row].ids
    for g, length in enumerate(groups.lengths[k]):
      text = np.concatenate([prompt, response[g, :length]])
      for t in range(length):
        step = old.steps[k, g, t] if begun_with[k, g, t] else len(lengths) - 1
        assert step == min(t // 2, len(lengths) - 1)
        decoder = nnx.merge(policy.model, jax.tree.map(lambda x, step=step: (1 + 0.02 * step) * x, policy.params))
        tokens = jnp.asarray(text[None, : len(prompt) + t])
        hidden = decoder(tokens, jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens))
        logps = jax.nn.log_softmax(decoder.logits(hidden)[0, -1])
        assert groups.logprobs[k, g, t] == pytest.approx(float(logps[response[g, t]]), abs=1e-4)
  ages = np.concatenate(
    [[len(lengths) - 1 - min(t // 2, len(lengths) - 1) for t in range(n)] for n in groups.lengths.flat]
  )
  assert last.metrics["rollout/staleness"] == pytest.approx(ages.mean())
  assert last.metrics["rollout/stale_tokens"] == pytest.approx(np.mean(ages > 0))


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
