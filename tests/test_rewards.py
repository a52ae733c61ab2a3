"""rewards.py against float64 numpy and plain loops."""

import itertools
import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from rlpr_jax import rewards
from tests.evidence import make_evidence

AGGREGATE = {
  "mean_prob": lambda logps: np.mean(np.exp(logps)),
  "geometric_mean": lambda logps: np.prod(np.exp(logps)) ** (1 / len(logps)),
  "product": lambda logps: np.prod(np.exp(logps)),
  "mean_logprob": np.mean,
  "weighted_sum": lambda logps: np.mean(np.exp(logps)),
}
WEIGHTED = {
  "mean_prob": lambda logps, w: np.sum(w * np.exp(logps)) / np.sum(w),
  "geometric_mean": lambda logps, w: np.prod(np.exp(logps) ** (w / np.sum(w))),
  "product": lambda logps, w: np.prod(np.exp(logps) ** (w * len(logps) / np.sum(w))),
  "mean_logprob": lambda logps, w: np.average(logps, weights=w),
  "weighted_sum": lambda logps, w: np.sum(w * np.exp(logps)) / len(logps),
}
SHAPE = {
  "clip": lambda d: min(max(d, 0), 1),
  "identity": lambda d: d,
  "positive": lambda d: max(d, 0),
  "one_minus": lambda d: 1 - d,
  "threshold_0.25": lambda d: d if d >= 0.25 else 0,
  "leaky_0.25": lambda d: d if d >= 0.25 else d / 100,
  "sigmoid_6": lambda d: 1 / (1 + math.exp(6 - 12 * d)),
  "sigmoid_0": lambda d: 1 / (1 + math.exp(-d)),
  "bins_5": lambda d: min((k / 5 for k in range(6)), key=lambda edge: abs(edge - d)),
}
# These look at a group [G] at once.
SHAPE_GROUP = {
  "rank": lambda d: (scipy.stats.rankdata(d) - 1) / (len(d) - 1) if len(d) > 1 else np.array([0.5]),
  "zscore": lambda d: (d - d.mean()) / (d.std(ddof=1) + 1e-6) if len(d) > 1 and d.std(ddof=1) >= 1e-6 else 0 * d,
}
token_weights = jax.jit(rewards.token_weights, static_argnames="kind")  # plain calls are slow
debias = jax.jit(rewards.debias, static_argnames="shaping")
THINK = "<think> 6 * 7 </think>"
ANSWER = "<answer> 42 </answer>"


def aggregate_by_hand(logps, mask, aggregate):
  """[..., A] -> [...], one row at a time, in float64."""
  out = np.zeros(mask.shape[:-1])
  for row in np.ndindex(out.shape):
    if mask[row].any():
      out[row] = AGGREGATE[aggregate](logps[row][mask[row]].astype(np.float64))
  return out


@pytest.fixture(scope="module")
def answers():
  """Log-probabilities [4, 6, 9] with every kind of mask, and nonsense wherever the mask is False."""
  rng = np.random.default_rng(0)
  logps = -rng.exponential(1.5, (4, 6, 9)).astype(np.float32)
  mask = rng.random(logps.shape) < 0.6
  mask[0, 0] = False
  mask[0, 1] = True
  mask[0, 2] = np.arange(9) == 8
  logps[~mask] = rng.choice([np.nan, np.inf, -np.inf, 1e30, 0.0], np.sum(~mask))
  return logps, mask


@pytest.mark.parametrize("aggregate", rewards.AGGREGATES)
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_reference_probability_is_the_aggregate_of_the_answers_own_tokens(answers, aggregate, transform):
  logps, mask = answers
  score = transform(lambda logps, mask: rewards.reference_probability(logps, mask, aggregate))(logps, mask)
  assert score.dtype == jnp.float32
  np.testing.assert_allclose(score, aggregate_by_hand(logps, mask, aggregate), rtol=5e-6, atol=0)
  assert score[0, 0] == 0  # an empty mask


@pytest.mark.parametrize("aggregate", rewards.AGGREGATES)
def test_mask_may_be_numbers_and_order_of_tokens_does_not_matter(answers, aggregate):
  logps, mask = answers
  score = rewards.reference_probability(logps, mask, aggregate)
  np.testing.assert_array_equal(rewards.reference_probability(logps, mask.astype(np.int32), aggregate), score)
  backwards = rewards.reference_probability(logps[..., ::-1], mask[..., ::-1], aggregate)
  np.testing.assert_allclose(backwards, score, rtol=5e-6)


@pytest.mark.parametrize(
  ("aggregate", "expected"),
  [("mean_prob", (0.5 + 0.25) / 3), ("geometric_mean", 0.0), ("product", 0.0), ("mean_logprob", -np.inf)],
)
def test_an_impossible_token_has_probability_zero(aggregate, expected):
  logps = np.log(np.array([0.5, 0.0, 0.25, 0.9], np.float32), where=[1, 0, 1, 1], out=np.full(4, -np.inf, np.float32))
  score = rewards.reference_probability(logps, np.array([1, 1, 1, 0], bool), aggregate)
  np.testing.assert_allclose(score, expected, rtol=1e-6)


@pytest.mark.parametrize("aggregate", rewards.AGGREGATES)
def test_nan_in_an_answer_spoils_its_own_row_and_no_other(answers, aggregate):
  logps, mask = answers
  spoilt = logps.copy()
  spoilt[2, 3, np.flatnonzero(mask[2, 3])[0]] = np.nan
  score = np.array(rewards.reference_probability(spoilt, mask, aggregate))
  assert np.isnan(score[2, 3])
  score[2, 3] = rewards.reference_probability(logps, mask, aggregate)[2, 3]
  np.testing.assert_array_equal(score, rewards.reference_probability(logps, mask, aggregate))


def test_the_papers_example():
  """One improbable token: close in the mean, five times apart in the product."""
  logps, mask = np.log(np.array([(0.01, 0.7, 0.9), (0.05, 0.7, 0.9)], np.float32)), np.ones((2, 3), bool)
  scores = {name: rewards.reference_probability(logps, mask, name) for name in rewards.AGGREGATES}
  np.testing.assert_allclose(scores["mean_prob"], [1.61 / 3, 1.65 / 3], rtol=1e-6)
  np.testing.assert_allclose(scores["product"], [0.0063, 0.0315], rtol=1e-6)
  np.testing.assert_allclose(scores["geometric_mean"], [0.0063 ** (1 / 3), 0.0315 ** (1 / 3)], rtol=1e-6)
  np.testing.assert_allclose(scores["mean_logprob"], [math.log(0.0063) / 3, math.log(0.0315) / 3], rtol=1e-6)


def test_score_of_bfloat16_log_probabilities_is_not_rounded_to_bfloat16():
  logps = jnp.array([-0.5, -1.0, -0.25], jnp.bfloat16)  # all three are bfloat16 numbers
  score = rewards.reference_probability(logps, jnp.ones(3, bool))
  assert score.dtype == jnp.float32
  np.testing.assert_allclose(score, np.mean(np.exp([-0.5, -1.0, -0.25])), rtol=1e-6)


def test_long_and_probable_answer_keeps_its_digits():
  logps = np.full((1, 4000), np.log(0.999), np.float32)
  for name, expected in (("mean_prob", 0.999), ("geometric_mean", 0.999), ("product", 0.999**4000)):
    score = rewards.reference_probability(logps, np.ones_like(logps, bool), name)
    np.testing.assert_allclose(score, [expected], rtol=2e-4 if name == "product" else 2e-6)


def test_unknown_aggregate_is_refused():
  with pytest.raises(ValueError, match="aggregate 'median': expected one of mean_prob, "):
    rewards.reference_probability(np.zeros((1, 2)), np.ones((1, 2), bool), "median")


def by_hand_with_weights(logps, mask, weights, aggregate):
  """[..., A] -> [...], one row at a time, in float64."""
  out = np.zeros(mask.shape[:-1])
  for row in np.ndindex(out.shape):
    own, w = logps[row][mask[row]].astype(np.float64), weights[row][mask[row]].astype(np.float64)
    if len(own):
      out[row] = WEIGHTED[aggregate](own, w if w.any() or aggregate == "weighted_sum" else np.ones(len(own)))
  return out


@pytest.mark.parametrize("aggregate", rewards.AGGREGATES)
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_weighted_reference_probability(answers, aggregate, transform):
  logps, mask = answers
  rng = np.random.default_rng(2)
  weights = np.where(rng.random(mask.shape) < 0.2, 0, rng.exponential(1, mask.shape)).astype(np.float32)
  weights[1, :3] = 0  # as good as uniform
  weights[2] *= 1e30
  weights[3] *= 1e-30
  expected = by_hand_with_weights(logps, mask, weights, aggregate)
  weights[~mask] = rng.choice([np.nan, np.inf, -1, 1e38], np.sum(~mask))
  score = transform(lambda *arrays: rewards.reference_probability(*arrays[:2], aggregate, arrays[2]))(
    logps, mask, weights
  )
  assert score.dtype == jnp.float32
  np.testing.assert_allclose(score, expected, rtol=2e-5, atol=0)
  assert score[0, 0] == 0  # an empty mask


def test_weights_worked_example():
  """(0.01, 0.7, 0.9) with the last token twice as heavy, and then with the first one left out."""
  logps, mask = np.log(np.array([0.01, 0.7, 0.9], np.float32)), np.ones(3, bool)
  for weights, mean, logs, total in (
    ([1, 1, 2], (0.01 + 0.7 + 0.9 * 2) / 4, (0.01 * 0.7 * 0.81) ** (1 / 4), 2.51 / 3),
    ([0, 5, 5], 0.8, 0.63**0.5, 8 / 3),
  ):
    scores = {name: rewards.reference_probability(logps, mask, name, np.array(weights)) for name in rewards.AGGREGATES}
    expected = {
      "mean_prob": mean, "geometric_mean": logs, "product": logs**3, "mean_logprob": math.log(logs),
      "weighted_sum": total,
    }  # fmt: skip
    assert {name: float(score) for name, score in scores.items()} == pytest.approx(expected, rel=1e-6)


def test_weights_may_be_those_of_the_whole_group():
  logps = np.log(np.array([[0.2, 0.4], [0.6, 0.8]], np.float32))
  score = rewards.reference_probability(logps, np.ones((2, 2), bool), "mean_prob", np.array([3.0, 1.0]))
  np.testing.assert_allclose(score, [0.25, 0.65], rtol=1e-6)


@pytest.mark.parametrize("aggregate", rewards.AGGREGATES)
def test_weight_of_nan_is_seen_and_an_impossible_token_of_weight_zero_is_not(aggregate):
  logps, mask = np.array([[-1.0, -np.inf], [-1.0, -2.0]], np.float32), np.ones((2, 2), bool)
  weights = np.array([[2.0, 0.0], [2.0, np.nan]], np.float32)
  score = rewards.reference_probability(logps, mask, aggregate, weights)
  expected = {"mean_prob": math.exp(-1), "geometric_mean": math.exp(-1), "product": math.exp(-2), "mean_logprob": -1}
  expected["weighted_sum"] = math.exp(-1)  # 2 p / 2
  np.testing.assert_allclose(score, [expected[aggregate], np.nan], rtol=1e-6)


def test_gradient_of_the_weighted_mean():
  """d/dlogp = w p / sum(w) and d/dw = (p - mean) / sum(w); nothing off the mask, whatever stands there."""
  logps = np.array([-0.5, np.nan, -2.0, np.inf], np.float32)
  weights = np.array([1.0, np.inf, 3.0, np.nan], np.float32)
  mask = np.array([True, False, True, False])
  gradients = jax.grad(lambda logps, w: rewards.reference_probability(logps, mask, "mean_prob", w), (0, 1))(
    logps, weights
  )
  p = np.exp([-0.5, -2.0])
  mean = (p[0] + 3 * p[1]) / 4
  np.testing.assert_allclose(gradients[0], [p[0] / 4, 0, 3 * p[1] / 4, 0], rtol=1e-6)
  np.testing.assert_allclose(gradients[1], [(p[0] - mean) / 4, 0, (p[1] - mean) / 4, 0], rtol=1e-5)


def weights_by_hand(logps, mask, kind, baseline_logps, baseline_mask):
  """[P, G, A], row by row, in float64."""
  out = np.zeros(mask.shape)
  for p in range(len(mask)):
    rows = [np.exp(row[own].astype(np.float64)) for row, own in zip(logps[p], mask[p], strict=True)]
    known = np.exp(baseline_logps[p][baseline_mask[p]].astype(np.float64))
    lengths = sorted(len(row) for row in rows if len(row))
    usual = max(lengths, key=lengths.count, default=0)  # the first of several, so the smallest
    group = np.array([row for row in rows if len(row) == usual])
    for g, row in enumerate(rows):
      weights = np.ones(len(row))
      of_baseline = {"base": 1 - known, "inverse_base": 1 / known, "surprise": -np.log(known)}
      if kind in of_baseline and len(row) == len(known):
        weights = of_baseline[kind]
      elif kind == "inverse" and len(row) == usual:
        weights = 1 / (group.mean(0) + 0.001)
      elif kind == "spread" and len(row) == usual and len(group) > 1:
        weights = group.std(0, ddof=1)
      elif kind == "logprob_spread" and len(row) == usual and len(group) > 1:
        weights = np.log(group).std(0, ddof=1)
      elif kind == "logprob_variance" and len(row) == usual and len(group) > 1:
        weights = np.log(group).var(0, ddof=1)
      out[p, g][mask[p, g]] = weights
  return out


@pytest.fixture(scope="module")
def groups():
  """Log-probabilities and masks [8, 5, 6] and those of the baselines [8, 6], nonsense wherever the mask is False."""
  rng = np.random.default_rng(3)
  counts = np.array(
    [
      [3, 3, 3, 3, 3],
      [3, 4, 3, 2, 3],  # three of three
      [4, 2, 4, 2, 6],  # a tie: two
      [0, 0, 0, 3, 3],  # most could not be scored
      [0, 0, 4, 0, 0],  # all but one could not
      [0, 0, 0, 0, 0],
      [1, 2, 3, 4, 5],  # a tie of all: one
      [6, 6, 6, 1, 1],
    ]
  )
  known = np.array([3, 4, 2, 3, 4, 2, 0, 6])
  logps = -rng.exponential(1.0, (8, 5, 6)).astype(np.float32)
  baseline = -rng.exponential(1.0, (8, 6)).astype(np.float32)
  mask = rng.permuted(np.arange(6) < counts[..., None], axis=-1)  # the tokens stand anywhere
  baseline_mask = rng.permuted(np.arange(6) < known[..., None], axis=-1)
  for array, own in ((logps, mask), (baseline, baseline_mask)):
    array[~own] = rng.choice([np.nan, np.inf, -np.inf, 0.0], np.sum(~own))
  return logps, mask, baseline, baseline_mask


@pytest.mark.parametrize("kind", rewards.TOKEN_WEIGHTS)
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_token_weights(groups, kind, transform):
  logps, mask, *baseline = groups
  weights = transform(lambda *arrays: rewards.token_weights(*arrays[:2], kind, *arrays[2:]))(logps, mask, *baseline)
  assert weights.dtype == jnp.float32
  np.testing.assert_allclose(weights, weights_by_hand(logps, mask, kind, *baseline), rtol=1e-5, atol=1e-7)
  if kind not in rewards.OF_BASELINE:  # the others know no baseline
    np.testing.assert_array_equal(transform(lambda *arrays: rewards.token_weights(*arrays, kind))(logps, mask), weights)


def test_token_weights_worked_example():
  """Two tokens, the first sure and the second what the reasoning decides; the third row has one token more."""
  probs = np.array([[[0.9, 0.2, 1], [1, 0.9, 0.4], [0.5, 0.5, 0.5]]], np.float32)
  mask = np.array([[[1, 1, 0], [0, 1, 1], [1, 1, 1]]], bool)
  known, known_mask = np.log(np.array([[0.8, 0.3, 0.3]], np.float32)), np.array([[1, 0, 1]], bool)
  rare, std = 1 / 0.301, 0.2 / 2**0.5
  for kind, first, second in (("uniform", 1, 1), ("inverse", 1 / 0.901, rare), ("base", 0.2, 0.7), ("spread", 0, std)):
    weights = token_weights(np.log(probs), mask, kind, known, known_mask)
    expected = [[[first, second, 0], [0, first, second], [1, 1, 1]]]
    np.testing.assert_allclose(weights, expected, rtol=2e-6, atol=1e-7)
  decided = rewards.reference_probability(
    np.log(probs), mask, "mean_prob", token_weights(np.log(probs), mask, "spread")
  )
  np.testing.assert_allclose(decided, [[0.2, 0.4, 0.5]], rtol=1e-6)


@pytest.mark.parametrize("size", [2, 7, 101])
def test_equal_probabilities_do_not_spread(size):
  """Rounding of their mean must not be taken for a deviation: it would be all the weight there is."""
  logps = np.tile(np.log(np.array([0.3, 0.7, 1 / 3, 0.999], np.float32)), (1, size, 1))
  spread = token_weights(logps, np.ones(logps.shape, bool), "spread")
  np.testing.assert_array_equal(spread, 0)
  values = np.tile(np.array([[0.1], [-7.3], [20.7]], np.float32), size)
  np.testing.assert_array_equal(debias(values, 0.0, "zscore"), 0)


def test_baselines_of_another_width_give_the_same_weights(groups):
  logps, mask, baseline, baseline_mask = groups
  wide = np.pad(baseline, ((0, 0), (2, 3)), constant_values=np.nan), np.pad(baseline_mask, ((0, 0), (2, 3)))
  weights = token_weights(logps, mask, "base", baseline, baseline_mask)
  np.testing.assert_array_equal(token_weights(logps, mask, "base", *wide), weights)
  narrow = np.zeros((8, 1), np.float32), np.ones((8, 1), bool)
  one = mask.sum(-1, keepdims=True) == 1
  np.testing.assert_array_equal(token_weights(logps, mask, "base", *narrow), mask & ~one)


@pytest.mark.parametrize("kind", rewards.TOKEN_WEIGHTS)
def test_no_gradient_passes_through_token_weights(groups, kind):
  logps, mask, baseline, baseline_mask = groups

  def score(logps, baseline, weights=None):
    if weights is None:
      weights = token_weights(logps, mask, kind, baseline, baseline_mask)
    return jnp.sum(rewards.reference_probability(logps, mask, "mean_prob", weights))

  constant = token_weights(logps, mask, kind, baseline, baseline_mask)
  of_logps, of_baseline = jax.jit(jax.grad(score, (0, 1)))(logps, baseline)
  np.testing.assert_allclose(of_logps, jax.jit(jax.grad(score))(logps, baseline, constant), rtol=1e-6)
  assert np.isfinite(of_logps).all()
  assert (of_logps != 0)[mask].any()
  np.testing.assert_array_equal(of_baseline, 0)


def test_bad_token_weights_are_refused():
  logps, mask = np.zeros((1, 2, 3), np.float32), np.ones((1, 2, 3), bool)
  with pytest.raises(ValueError, match="token weights 'rare': expected one of uniform, inverse, base, inverse_base"):
    rewards.token_weights(logps, mask, "rare")
  for baseline in ((), (logps[0, :1],), (None, mask[0, :1])):
    with pytest.raises(ValueError, match="'base': expected baseline_logps and baseline_mask"):
      rewards.token_weights(logps, mask, "base", *baseline)


@pytest.mark.parametrize("shaping", SHAPE)
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_shaping_of_the_difference(shaping, transform):
  score = np.arange(-8, 17, dtype=np.float32)[:, None] / 16  # sixteenths: differences are exact, 0.25 among them
  baseline = np.array([-0.5, 0.0, 0.25, 1.0], np.float32)  # differences from -1.5 to 1.5
  shaped = transform(lambda score, baseline: rewards.debias(score, baseline, shaping))(score, baseline)
  expected = [[SHAPE[shaping](float(s) - float(b)) for b in baseline] for s in score[:, 0]]
  np.testing.assert_allclose(shaped, expected, rtol=1e-6, atol=1e-7)


def test_every_shaping_is_tested():
  def names(shapings):
    return {shaping.rsplit("_", 1)[0] if shaping[-1] in "TKN0123456789" else shaping for shaping in shapings}

  assert names([*SHAPE, *SHAPE_GROUP]) == names(rewards.SHAPINGS)


@pytest.mark.parametrize("shaping", SHAPE_GROUP)
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_shaping_of_a_group(shaping, transform, size):
  rng = np.random.default_rng(size)
  score = rng.integers(0, 6, (4, 3, size)).astype(np.float32) / 8  # with ties, and differences are exact
  score[0, 0] = 0.5  # nothing but ties
  score[0, 1] = np.float32(0.5) + 1e-7 * np.arange(size)  # spreads less than the least that counts
  baseline = rng.integers(0, 8, (4, 3, 1)).astype(np.float32) / 8
  baseline[0] = 0
  shaped = transform(lambda score, baseline: rewards.debias(score, baseline, shaping))(score, baseline)
  expected = np.apply_along_axis(SHAPE_GROUP[shaping], -1, score.astype(np.float64) - baseline)
  np.testing.assert_allclose(shaped, expected, rtol=1e-5, atol=1e-6)


def test_group_shapings_worked_example():
  score = np.array([[0.5, 0.25, 0.5, 1.0]], np.float32)
  np.testing.assert_allclose(debias(score, 0.25, "rank"), [[0.5, 0, 0.5, 1]], rtol=1e-6)
  std = (0.296875 / 3) ** 0.5
  expected = np.array([[-0.0625, -0.3125, -0.0625, 0.4375]]) / std
  np.testing.assert_allclose(debias(score, 0.25, "zscore"), expected, rtol=2e-5)


def test_ranks_of_infinite_scores_and_nan():
  score = np.array([-np.inf, 0.5, np.nan, np.inf, -np.inf], np.float32)
  np.testing.assert_array_equal(debias(score, 0.0, "rank"), [0.125, 0.5, np.nan, 0.75, 0.125])
  assert np.isnan(debias(score, 0.0, "zscore")).all()
  for shaping in SHAPE_GROUP:
    assert np.isnan(debias(np.array([np.nan], np.float32), 0.0, shaping)).all()


def test_gradient_of_the_zscore():
  gradient = jax.jit(jax.jacobian(lambda score: rewards.debias(score, 0.0, "zscore")))
  np.testing.assert_array_equal(gradient(jnp.full(3, 0.3)), 0)  # not NaN, from the root of nothing
  score, step = np.array([0.1, 0.4, 0.9]), 1e-6
  shape = SHAPE_GROUP["zscore"]
  numeric = np.stack([(shape(score + step * e) - shape(score - step * e)) / (2 * step) for e in np.eye(3)], 1)
  np.testing.assert_allclose(gradient(jnp.array(score, jnp.float32)), numeric, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shaping", SHAPE_GROUP)
def test_a_single_score_has_no_group(shaping):
  with pytest.raises(ValueError, match=f"'{shaping}': expected groups"):
    rewards.debias(np.float32(0.5), 0.0, shaping)


@pytest.mark.parametrize("shaping", ["clip", "threshold_0.25", "sigmoid_6", "bins_5", "leaky_0.25"])
def test_nan_score_stays_nan(shaping):
  assert np.isnan(rewards.debias(np.float32(np.nan), np.float32(0), shaping))


@pytest.mark.parametrize(
  "shaping",
  [
    "",
    "Clip",
    "clip_0.1",
    "none",
    "identity_1",
    "one-minus",
    "one_minus_2",
    "threshold",
    "threshold_",
    "threshold_T",
    "threshold_nan",
    "threshold_inf",
    "threshold_0_05",  # Python reads 0_05 as 5
    "leaky",
    "leaky_x",
    "sigmoid",
    "sigmoid_inf",
    "bins_0",
    "bins_-3",
    "bins_2.5",
    "bins_nan",
    "ramp_0.5",
    "rank_2",
    "zscore_1",
  ],
)
def test_bad_shapings_are_refused(shaping):
  with pytest.raises(ValueError, match="expected one of clip, identity, positive, threshold_T"):
    rewards.debias(np.zeros(2, np.float32), np.zeros(2, np.float32), shaping)


@pytest.mark.parametrize(
  ("text", "think", "answer_only"),
  [
    (f"{THINK} {ANSWER}", 1, 1),
    (f"{THINK}{ANSWER}", 1, 1),
    ("<think></think><answer></answer>", 1, 1),
    (f"{THINK} so it is\n{ANSWER}", 1, 1),  # text between is allowed
    (f"{THINK} {ANSWER} and that is that", 1, 1),  # and so it is after
    (f"Well, {THINK} {ANSWER}", 0, 1),  # but not before
    (f" {THINK} {ANSWER}", 0, 1),
    (f"\n{THINK} {ANSWER}", 0, 1),
    (ANSWER, 0, 1),
    (f"text {ANSWER} text", 0, 1),
    ("", 0, 0),
    ("42", 0, 0),
    (THINK, 0, 0),
    (f"{THINK} <answer> 42", 0, 0),
    (f"{THINK} 42 </answer>", 0, 0),
    (f"{THINK} </answer> 42 <answer>", 0, 0),
    (f"<think> 6 * 7 {ANSWER}", 0, 1),
    (f"6 * 7 </think> {ANSWER}", 0, 1),
    (f"<think> 6 * 7 {ANSWER} </think>", 0, 1),  # right tags in a wrong order
    (f"{ANSWER} {THINK}", 0, 1),
    (f"<think> 6 {ANSWER.replace('42', '42 </think>')}", 0, 1),
    (f"<think> {THINK} {ANSWER}", 0, 1),
    (f"{THINK} </think> {ANSWER}", 0, 1),
    (f"{THINK} <answer> {ANSWER}", 0, 0),
    (f"{THINK} {ANSWER} {ANSWER}", 0, 0),
    (f"{THINK} {ANSWER} </answer>", 0, 0),
    (f"{THINK} <Answer> 42 </Answer>", 0, 0),
    (f"{THINK} <answer > 42 </answer>", 0, 0),
  ],
)
def test_format_score(text, think, answer_only):
  assert rewards.format_score(text) == think
  assert rewards.format_score(text, "think") == think
  assert rewards.format_score(text, "answer_only") == answer_only


def test_format_score_of_every_order_of_the_tags():
  tags = rewards.TEMPLATE_TAGS["think"]
  for order in itertools.permutations(tags):
    assert rewards.format_score(" ".join(order)) == (order == tags)


def test_unknown_template_is_refused():
  with pytest.raises(ValueError, match="template 'r1': expected one of think, answer_only"):
    rewards.format_score(ANSWER, "r1")


def spread_out(occurrences):
  """Ten words, `occurrences` times, with a word of its own after each: no other window occurs twice."""
  return " ".join(f"a b c d e f g h i j end{i}" for i in range(occurrences))


@pytest.mark.parametrize("separator", [" ", "_", "\n", "\t \n", "__", " _ "])
def test_ten_occurrences_of_ten_words_are_penalised_and_nine_are_not(separator):
  assert rewards.repetition_penalty(spread_out(9).replace(" ", separator)) == 0
  assert rewards.repetition_penalty(spread_out(10).replace(" ", separator)) == -1
  assert rewards.repetition_penalty(separator + spread_out(10).replace(" ", separator) + separator) == -1


def test_windows_overlap():
  assert rewards.repetition_penalty("no " * 18) == 0
  assert rewards.repetition_penalty("no " * 19) == -1


def test_nine_repeated_words_are_not_a_window_of_ten():
  assert rewards.repetition_penalty(" ".join(f"a b c d e f g h i end{i}" for i in range(50))) == 0


def test_texts_of_a_window_or_less_are_never_penalised():
  for words in range(11):
    assert rewards.repetition_penalty("no " * words, limit=1) == 0
  assert rewards.repetition_penalty("no " * 11, limit=1) == -1
  assert rewards.repetition_penalty("_" * 500 + " " * 500) == 0  # not a word in it


@pytest.mark.parametrize(
  "sentence", ["三加四得七。", "さんたすよんはなな。", "สามบวกสี่เท่ากับเจ็ด", "三 plus 四 得 seven。"]
)
def test_scripts_without_spaces_repeat_by_characters(sentence):
  assert rewards.repetition_penalty(sentence * 60) == -1
  assert rewards.repetition_penalty(sentence) == 0
  if " " not in sentence:
    assert rewards.repetition_penalty(sentence * 60, characters=False) == 0  # one word


def test_characters_between_words_change_nothing_for_other_scripts():
  for text in (spread_out(9), spread_out(10), "naïve Übung здравствуй " * 9, "x²+y² = 한국어 문장 " * 30):
    assert rewards.repetition_penalty(text) == rewards.repetition_penalty(text, characters=False)


def test_repetition_against_counting_every_window_in_every_place():
  rng = random.Random(0)
  seen = set()
  for _ in range(300):
    window, limit, length = rng.randint(1, 4), rng.randint(2, 6), rng.randint(0, 30)
    words = rng.choices(["no", "yes", "so"], k=length)
    text = "".join(word + rng.choice([" ", "_", "\n"]) for word in words)
    most = max(
      [sum(words[j : j + window] == words[i : i + window] for j in range(length)) for i in range(length - window + 1)],
      default=0,
    )
    expected = -1.0 if most >= limit and length > window else 0.0
    assert rewards.repetition_penalty(text, window, limit) == expected
    seen.add(expected)
  assert seen == {0.0, -1.0}


@pytest.mark.parametrize(
  ("answer", "reference", "expected"),
  [
    (None, "42", 0),
    ("", "42", 0),
    ("4", "42", 0),
    ("41", "42", 0),
    (" 42 \n", "42", 0),
    ("42.", "42", -0.25),
    ("42.0", "42", -0.5),
    ("it is 42", "42", -0.5),
    ("x" * 15, "a reference", -0.5 * 4 / 11),
    ("x" * 15, "  a reference\n", -0.5 * 4 / 11),
    ("größer", "groß", -0.25),  # characters, not bytes
    ("", " ", 0),
    ("4", " ", -0.5),
  ],
)
def test_answer_length_penalty(answer, reference, expected):
  assert rewards.answer_length_penalty(answer, reference, 0.5) == pytest.approx(expected)
  assert rewards.answer_length_penalty(answer, reference, 2.0) == pytest.approx(4 * expected)
  assert rewards.answer_length_penalty(answer, reference, 0.0) == 0


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_mixture(weight):
  rng = np.random.default_rng(4)
  reference, verified = rng.random((3, 4)).astype(np.float32), rng.random((3, 4)) < 0.5
  mixed = rewards.mixture(reference, verified, weight)
  assert mixed.dtype == jnp.float32
  expected = reference.astype(np.float64) + weight * (verified - reference.astype(np.float64))
  np.testing.assert_allclose(mixed, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rate", [0.0, 1e-4, 0.3, 1.0])
def test_moving_average(rate):
  logps = np.array([-np.inf, -200.0, -90.0, -3.0, -1e-4, 0.0], np.float32)
  old, new = (array.ravel() for array in np.meshgrid([np.nan, *logps], logps))
  average = jax.jit(rewards.moving_average)(old, new, rate)
  assert average.dtype == jnp.float32
  with np.errstate(divide="ignore"):
    expected = np.log((1 - rate) * np.exp(old.astype(np.float64)) + rate * np.exp(new.astype(np.float64)))
  expected = np.where(np.isnan(old), new, expected)
  np.testing.assert_allclose(average, expected, rtol=2e-6, atol=2e-7)
  np.testing.assert_array_equal(np.asarray(average)[np.isnan(old)], new[np.isnan(old)])
  np.testing.assert_allclose(rewards.moving_average(old, new, rate), average, rtol=1e-6)


def test_moving_average_that_follows_a_constant_reaches_it():
  average = np.float32(np.nan)
  for logp in (-1.0, -2.0, -2.0, -2.0):
    average = rewards.moving_average(average, logp, 0.5)
  assert float(average) == pytest.approx(math.log(math.exp(-2) + (math.exp(-1) - math.exp(-2)) / 8), rel=1e-6)
  assert np.isnan(rewards.moving_average(average, np.nan, 0.5))


def test_gradient_of_the_moving_average():
  """Each takes its share of the probability; where the old is not known all of it is the new's."""
  gradient = jax.vmap(jax.grad(rewards.moving_average, (0, 1)), (0, 0, None))
  old, new = np.array([-1.0, np.nan, np.nan], np.float32), np.array([-3.0, -3.0, -np.inf], np.float32)
  of_old, of_new = gradient(old, new, 0.25)
  share = 0.25 * math.exp(-3) / (0.75 * math.exp(-1) + 0.25 * math.exp(-3))
  np.testing.assert_allclose(of_old, [1 - share, 0, 0], rtol=1e-5)
  np.testing.assert_allclose(of_new, [share, 1, 1], rtol=1e-5)


@pytest.mark.parametrize(
  ("debiased", "form", "coefficient", "penalty", "expected"),
  [
    (0.5, 1.0, 0.1, 0.0, 0.55),
    (0.5, 0.0, 0.1, 0.0, 0.45),
    (0.5, 1.0, 0.1, -1.0, -0.45),
    (0.5, 1.0, 0.0, 0.0, 0.5),
    (0.5, 0.0, 1.0, 0.0, 0.0),
    (0.5, 1.0, 1.0, 0.0, 1.0),
    (0.5, 1.0, -1, 0.0, 0.5),
    (0.5, 0.0, -1, 0.0, -1.0),
    (0.5, 1.0, -1, -1.0, -0.5),
    (0.5, 0.0, -1, -1.0, -2.0),
    (0.0, 1.0, -1.0, 0.0, 0.0),
  ],
)
def test_combine(debiased, form, coefficient, penalty, expected):
  assert float(rewards.combine(debiased, form, coefficient, penalty)) == pytest.approx(expected, abs=1e-7)
  shape = (2, 3)
  as_arrays = rewards.combine(*(np.full(shape, x, np.float32) for x in (debiased, form)), coefficient, penalty)
  np.testing.assert_allclose(as_arrays, np.full(shape, expected), atol=1e-7)


def test_combine_defaults_are_the_papers():
  assert float(rewards.combine(0.5, 1.0)) == pytest.approx(0.9 * 0.5 + 0.1)


@pytest.mark.parametrize("aggregate", rewards.AGGREGATES)
@pytest.mark.parametrize(("shaping", "coefficient"), [("clip", 0.1), ("identity", -1), ("threshold_0.25", 0.3)])
def test_score_groups_from_end_to_end(aggregate, shaping, coefficient):
  rng = np.random.default_rng(1)
  logps = -rng.exponential(0.7, (3, 4, 5)).astype(np.float32)
  mask = np.arange(5) < rng.integers(1, 6, (3, 4, 1))
  logps[~mask] = np.nan
  scorable = rng.random((3, 4)) < 0.7
  scorable[0], scorable[1] = True, False
  logps[2, ~scorable[2]] = np.nan  # what an unscorable row holds does not matter,
  mask[1] = False  # and it holds no answer
  baselines = np.array([0.1, 0.0, 0.4], np.float32)
  forms = rng.integers(0, 2, (3, 4)).astype(np.float32)
  repetition = -rng.integers(0, 2, (3, 4)).astype(np.float32)

  evidence = make_evidence(logps=logps, mask=mask, scorable=scorable, formats=forms, repetition=repetition)
  scoring = rewards.Scoring(aggregate=aggregate, shaping=shaping, format_coefficient=coefficient)
  parts = rewards.score_groups(evidence, baselines, scoring)

  lowest = math.log(1e-9) if aggregate == "mean_logprob" else 0.0
  for p, g in np.ndindex(3, 4):
    reference = AGGREGATE[aggregate](logps[p, g][mask[p, g]].astype(np.float64)) if scorable[p, g] else lowest
    debiased = SHAPE[shaping](reference - float(baselines[p]))
    if coefficient == -1:
      total = debiased if forms[p, g] else -1
    else:
      total = (1 - coefficient) * debiased + coefficient * forms[p, g]
    found = [float(field[p, g]) for field in (parts.reference, parts.debiased, parts.total)]
    np.testing.assert_allclose(found, [reference, debiased, total + repetition[p, g]], rtol=2e-6, atol=2e-6)
  np.testing.assert_array_equal(parts.baseline, baselines)
  np.testing.assert_array_equal(parts.format, forms)
  np.testing.assert_array_equal(parts.repetition, repetition)


def test_an_unscorable_response_is_worth_less_than_any_scored_one():
  logps, mask = np.log(np.array([[[1e-6], [0.5], [0.5]]], np.float32)), np.ones((1, 3, 1), bool)
  evidence = make_evidence(logps=logps, mask=mask, scorable=np.array([[True, True, False]]))
  for aggregate in rewards.AGGREGATES:
    scoring = rewards.Scoring(aggregate=aggregate, shaping="identity")
    parts = rewards.score_groups(evidence, np.zeros(1, np.float32), scoring)
    worst, best, unscorable = parts.total[0]
    assert unscorable < worst < best


@pytest.mark.parametrize("aggregate", rewards.AGGREGATES)
@pytest.mark.parametrize("shaping", ["clip", *SHAPE_GROUP])
def test_score_groups_with_token_weights_and_length_penalty(groups, aggregate, shaping):
  logps, mask, *_ = groups
  shape = mask.shape[:2]
  rng = np.random.default_rng(5)
  scorable, baselines = mask.any(-1), (rng.integers(0, 4, 8) / 8).astype(np.float32)
  forms, repetition = (rng.integers(low, low + 2, shape).astype(np.float32) for low in (0, -1))
  length = -rng.random(shape).astype(np.float32)
  weights = rewards.token_weights(logps, mask, "inverse")

  evidence = make_evidence(
    logps=logps, mask=mask, scorable=scorable, formats=forms, repetition=repetition, excess=length
  )
  scoring = rewards.Scoring(aggregate=aggregate, shaping=shaping, format_coefficient=0.2, length_coefficient=1.0)
  parts = jax.jit(rewards.score_groups, static_argnames="scoring")(evidence, baselines, scoring, weights)

  reference = by_hand_with_weights(logps, mask, np.asarray(weights), aggregate)
  if aggregate == "mean_logprob":
    reference[~scorable] = math.log(1e-9)
  np.testing.assert_allclose(parts.reference, reference, rtol=2e-5)
  found = np.asarray(parts.reference, np.float64) - baselines[:, None]  # equal scores must stay equal
  debiased = np.clip(found, 0, 1) if shaping == "clip" else np.apply_along_axis(SHAPE_GROUP[shaping], -1, found)
  np.testing.assert_allclose(parts.debiased, debiased, rtol=1e-4, atol=1e-5)
  total = 0.8 * debiased + 0.2 * forms + repetition + length
  np.testing.assert_allclose(parts.total, total, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(parts.length, length)
  np.testing.assert_array_equal(parts.repetition, repetition)


def test_score_groups_without_weights_or_penalty_is_uniform_and_free(groups):
  logps, mask, *_ = groups
  zeros = np.zeros(mask.shape[:2], np.float32)
  evidence = make_evidence(logps=logps, mask=mask, scorable=mask.any(-1))
  plain = rewards.score_groups(evidence, zeros[:, 0])
  assert plain.length.shape == zeros.shape
  np.testing.assert_array_equal(plain.length, 0)
  uniform = rewards.score_groups(
    evidence, zeros[:, 0], rewards.Scoring(length_coefficient=1.0), weights=np.ones(mask.shape)
  )
  for field, value in plain._asdict().items():
    np.testing.assert_array_equal(getattr(uniform, field), value, err_msg=field)
