"""The gap between sampler and trainer, and what is done about it, on log-probabilities that are set apart by hand."""

import jax
import numpy as np
import pytest

from rlpr_jax.runs.metrics import compilations
from rlpr_jax.sharding import Sharding
from rlpr_jax.training.logprobs import LogprobProgram, TextScorer
from rlpr_jax.training.old_logprobs import (
  importance_weights,
  resolve_old_logprobs,
  sampler_gap,
  step_divergence,
  trainer_logprobs,
)
from tests.training.groups import PROMPT, RESPONSE, TEMPERATURE, make_groups, padded
from tests.training.groups import trainer_logprobs as of_rows

CLIP = 0.2, 0.27


@pytest.fixture(scope="module")
def trainer(policy):
  return TextScorer(LogprobProgram(policy.model, TEMPERATURE, 2, Sharding()), policy.params, PROMPT + RESPONSE)


@pytest.fixture(scope="module")
def exact(policy):
  """Groups whose log-probabilities are the trainer's, by way of one row a sequence."""
  groups = make_groups(count=5, seed=7)
  rows = padded(groups, 5, "token_mean")
  logps, logprobs = np.asarray(of_rows(policy.model, policy.params, rows)[0]), np.zeros_like(groups.logprobs)
  for row, (k, g) in enumerate(np.ndindex(groups.lengths.shape)):
    start, tokens = groups.prompt_lengths[k], groups.lengths[k, g]
    logprobs[k, g, :tokens] = logps[row, start : start + tokens]
  return groups._replace(logprobs=logprobs)


def beyond(groups):
  return np.arange(RESPONSE) >= groups.lengths[..., None]


def test_all_of_the_trainers_log_probabilities_are_found_in_packed_rows(exact, trainer):
  found = trainer_logprobs(exact, trainer, everything=True)
  np.testing.assert_array_equal(np.isnan(found), beyond(exact))
  np.testing.assert_allclose(np.nan_to_num(found), exact.logprobs, atol=1e-5)


def test_the_gap_is_looked_at_in_one_micro_batch(exact, trainer):
  found = trainer_logprobs(exact, trainer, everything=False)
  looked_at = ~np.isnan(found)
  assert 0 < looked_at.any(axis=2).sum() < exact.lengths.size
  assert exact.lengths[looked_at.any(axis=2)].sum() == looked_at.sum()  # whole sequences
  before = compilations()
  trainer_logprobs(exact.take(slice(2)), trainer, everything=True)
  assert compilations() == before


def test_gap_against_float64():
  rng = np.random.default_rng(0)
  sampler = -rng.exponential(2, (3, 2, 5)).astype(np.float32)
  trainer = (sampler + rng.normal(0, 0.02, sampler.shape)).astype(np.float32)
  trainer[1, 1], trainer[0, 0, 3:] = np.nan, np.nan
  known = ~np.isnan(trainer)
  ratios = np.exp(trainer[known].astype(np.float64) - sampler[known].astype(np.float64))
  found = sampler_gap(sampler, trainer, CLIP)
  assert found["mean"] == pytest.approx(np.mean(np.abs(ratios - 1)), rel=1e-9)
  assert found["worst"] == pytest.approx(np.max(np.abs(ratios - 1)), rel=1e-9)
  assert found["over_0.01"] == pytest.approx(np.mean(np.abs(ratios - 1) > 0.01))
  assert 1 >= found["over_0.0001"] >= found["over_0.001"] >= found["over_0.01"] >= found["over_0.1"]


@pytest.mark.parametrize(
  ("choice", "shift", "recomputed"),
  [("auto", 0.0, 0), ("auto", 0.15, 0), ("auto", 0.3, 1), ("auto", -0.3, 1), ("sampler", 0.3, 0), ("trainer", 0.0, 1)],
)
def test_who_the_ratios_start_from(exact, trainer, choice, shift, recomputed):
  """A sampler that finds every token too probable by exp(shift); the clip range ends at exp(-0.22) and exp(0.24)."""
  shifted = exact._replace(logprobs=np.where(beyond(exact), 0, exact.logprobs + np.float32(shift)))
  groups, metrics = resolve_old_logprobs(shifted, trainer, choice, limit=0.01, clip=CLIP)
  assert metrics["recomputed"] == recomputed
  assert metrics["mean"] == pytest.approx(abs(1 - np.exp(-shift)), abs=1e-5)
  assert metrics["outside"] == (abs(shift) > 0.25)
  expected = exact.logprobs if recomputed else shifted.logprobs
  np.testing.assert_allclose(groups.logprobs, expected, atol=1e-5)
  for name, field in groups._asdict().items():
    if name not in ("logprobs", "answers"):
      np.testing.assert_array_equal(field, getattr(exact, name))


def test_tokens_count_as_often_as_the_trainer_would_have_drawn_them(exact, trainer):
  """Of a sampler that found some tokens too probable and others too improbable, some of these by more than the cap."""
  rng = np.random.default_rng(1)
  shift = rng.normal(0, 0.6, exact.logprobs.shape)
  shifted = exact._replace(logprobs=np.where(beyond(exact), 0, exact.logprobs + shift).astype(np.float32))
  groups, metrics = resolve_old_logprobs(shifted, trainer, "auto", limit=0.01, clip=CLIP, cap=1.5)
  expected = np.where(beyond(exact), 1, np.minimum(np.exp(-shift), 1.5))
  np.testing.assert_allclose(groups.importance, expected, atol=1e-4)
  np.testing.assert_allclose(groups.logprobs, exact.logprobs, atol=1e-5)  # ratios start from the trainer
  assert metrics["importance"] == pytest.approx(expected[~beyond(exact)].mean(), abs=1e-4)
  assert metrics["truncated"] == pytest.approx(np.mean(shift[~beyond(exact)] < -np.log(1.5)))
  assert 0 < metrics["truncated"] < 1
  untouched, metrics = resolve_old_logprobs(shifted, trainer, "sampler", limit=0.01, clip=CLIP, cap=1.5)
  assert untouched.importance is None
  assert "importance" not in metrics


def test_importance_weights_of_nothing():
  weights, metrics = importance_weights(np.zeros((2, 3), np.float32), np.full((2, 3), np.nan, np.float32), 2.0)
  np.testing.assert_array_equal(weights, 1)
  assert metrics == {"importance": 1.0, "truncated": 0.0}


def test_log_probabilities_that_are_not_finite_are_computed_anew(exact, trainer):
  broken = exact._replace(logprobs=np.where(beyond(exact), 0, np.nan).astype(np.float32))
  groups, metrics = resolve_old_logprobs(broken, trainer, "auto", limit=0.01, clip=CLIP)
  assert metrics["recomputed"]
  np.testing.assert_allclose(groups.logprobs, exact.logprobs, atol=1e-5)


def test_how_far_a_step_went(exact, trainer):
  """By hand, in float64, on the tokens of one micro-batch; nothing new is compiled for it."""
  trainer_logprobs(exact, trainer, everything=False)
  before = compilations()
  assert step_divergence(exact, trainer) == pytest.approx(0, abs=1e-8)
  shift = np.random.default_rng(2).normal(0, 0.3, exact.logprobs.shape)
  shifted = exact._replace(logprobs=np.where(beyond(exact), 0, exact.logprobs + shift).astype(np.float32))
  looked_at = ~np.isnan(trainer_logprobs(exact, trainer, everything=False))
  assert step_divergence(shifted, trainer) == pytest.approx(
    np.mean(np.exp(-shift) - 1 + shift, where=looked_at), rel=1e-4
  )
  assert compilations() == before
  assert step_divergence(exact.take(slice(0)), trainer) is None
  assert step_divergence(exact._replace(logprobs=np.full_like(exact.logprobs, np.nan)), trainer) is None


def test_nothing_was_sampled(exact, trainer):
  groups, metrics = resolve_old_logprobs(exact.take(slice(0)), trainer, "auto", 0.01, clip=CLIP)
  assert groups.num_groups == 0
  assert metrics == {}
  assert jax.tree.structure(groups) == jax.tree.structure(exact)
