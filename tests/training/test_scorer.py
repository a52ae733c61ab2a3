"""References scored by another policy: the same numbers from the same weights, and those of the other from others."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from rlpr_jax import config
from rlpr_jax.sampling.decode import DecodeSettings
from rlpr_jax.sampling.device import Device
from rlpr_jax.sampling.engine import Engine
from rlpr_jax.sampling.shapes import Shapes
from rlpr_jax.sharding import Sharding
from rlpr_jax.training.collect import reference_scorer
from rlpr_jax.training.run import Run
from rlpr_jax.training.scorer import score_again
from rlpr_jax.types import Prompt

SAMPLES, LIMIT, RESPONSE, SUFFIX = 12, 8, 24, 12


@pytest.fixture(scope="module")
def case(policy):
  c = config.default()
  c.samples_per_prompt, c.data.template = SAMPLES, "answer_only"
  c.data.prompt_limit, c.rollout.max_response_length, c.data.max_reference_length = LIMIT, RESPONSE, SUFFIX
  c.rollout.score_rows, c.reward.score_temperature = 4, 0.8
  device = Device(
    policy.model,
    DecodeSettings(8, (policy.tokenizer.eos_token_id,)),
    Shapes(16, LIMIT, RESPONSE, SUFFIX, 8, 2, 4, 4),
    c.reward.score_temperature,
  )
  engine = Engine(device, policy.tokenizer, "answer_only", baseline_prefix="bare")
  rng = np.random.default_rng(0)
  prompts = [
    Prompt(ids=rng.integers(10, 60, length).astype(np.int32), reference=reference, source="test", row=row)
    for row, (length, reference) in enumerate([(3, "7"), (8, "ab1"), (5, "mon"), (6, "x y")])
  ]
  sampler = SimpleNamespace(sampler=policy.model, sampling=SimpleNamespace(sharding=Sharding()))
  run = Run(**dict.fromkeys(Run._fields))._replace(config=c, engine=engine, policy=sampler)
  rollouts = engine.rollout(policy.params, list(enumerate(prompts)), jax.random.key(3), SAMPLES)
  assert rollouts.scorable.sum() > 5
  return run, prompts, rollouts


def test_the_same_policy_gives_the_same_scores(case, policy):
  run, prompts, rollouts = case
  found, _ = score_again(reference_scorer(run, policy.params), prompts, rollouts)
  np.testing.assert_allclose(found.reference_logps, rollouts.reference_logps, atol=1e-5)
  assert np.abs(rollouts.reference_logps).max() > 1


def test_several_references_are_scored_one_by_one(case, policy):
  run, prompts, _ = case
  prompts = [dataclasses.replace(prompt, alternatives=("ab", "z")[: prompt.row]) for prompt in prompts]
  engine = dataclasses.replace(run.engine, max_references=3)
  rollouts = engine.rollout(policy.params, list(enumerate(prompts)), jax.random.key(3), SAMPLES)
  found, _ = score_again(reference_scorer(run, policy.params), prompts, rollouts)
  np.testing.assert_allclose(found.reference_logps, rollouts.reference_logps, atol=1e-5)
  assert (np.abs(rollouts.reference_logps).max(axis=(0, 2)) > 1).all()


def test_another_policy_scores_what_this_one_wrote(case, policy):
  """Its scores are those of an engine that had sampled the same tokens: greedy from weights that agree on them."""
  run, prompts, rollouts = case
  sharper = jax.tree.map(lambda x: x, policy.params) | {"head": policy.params["head"] * 1.3}
  found, _ = score_again(reference_scorer(run, sharper), prompts, rollouts)
  # Logits are 1.3 times as large, so this is the old policy at 1.3 times the inverse temperature.
  colder = dataclasses.replace(run.engine.device, score_temperature=0.8 / 1.3)
  colder = dataclasses.replace(run.engine, device=colder)
  again = colder.rollout(policy.params, list(enumerate(prompts)), jax.random.key(3), SAMPLES)
  np.testing.assert_array_equal(again.tokens, rollouts.tokens)
  np.testing.assert_allclose(found.reference_logps, again.reference_logps, atol=1e-5)
  assert np.abs(found.reference_logps - rollouts.reference_logps).max() > 0.1


@pytest.mark.parametrize("several", [False, True])
def test_baselines_are_more_branches_behind_their_prompts(case, policy, several):
  """As the engine measures them from a prompt's cache, while the rewards stay what they are without."""
  run, prompts, rollouts = case
  engine = run.engine
  if several:
    prompts = [dataclasses.replace(prompt, alternatives=("ab", "z")[: prompt.row]) for prompt in prompts]
    engine = dataclasses.replace(engine, max_references=3)
    rollouts = engine.rollout(policy.params, list(enumerate(prompts)), jax.random.key(3), SAMPLES)
  scorer, suffixes = reference_scorer(run, policy.params), engine.baseline_suffixes(enumerate(prompts))
  del suffixes[2, 0]  # not asked for
  found, alone = score_again(scorer, prompts, rollouts, suffixes)
  measured, expected = engine.baselines(alone, len(prompts)), engine.baseline(policy.params, prompts)
  assert np.isfinite(expected).any(axis=-1).sum() == sum(map(len, (engine._references(prompt) for prompt in prompts)))
  expected[(2, 0) if several else 2] = np.nan
  np.testing.assert_allclose(measured, expected, atol=1e-5)
  np.testing.assert_allclose(found.reference_logps, rollouts.reference_logps, atol=1e-5)
