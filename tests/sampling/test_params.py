"""Drawing tokens: the right distribution, cut where it is to be cut, and log-probabilities of the whole of it."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from rlpr_jax.sampling.params import SamplingParams, sample_token, stack, truncate

DRAWS = 20_000
LOGITS = np.random.default_rng(0).normal(size=24).astype(np.float32) * 1.5

sample_jitted = jax.jit(sample_token)


def sample(logits, keys, sampling):
  return sample_jitted(logits, keys, stack([sampling] * len(logits)))


@functools.cache
def keys(count, seed=0):
  return jax.random.split(jax.random.key(seed), count)


def draw(logits, sampling, count=DRAWS, seed=0):
  rows = jnp.broadcast_to(jnp.asarray(logits), (count, len(logits)))
  return jax.device_get(sample(rows, keys(count, seed), sampling))


def softmax(logits, temperature=1.0):
  """In float64."""
  exponents = np.exp((logits - logits.max()).astype(np.float64) / temperature)
  return exponents / exponents.sum()


def allowed(logits, sampling):
  """Which tokens may be drawn, bool[V], token by token as the definitions say; in float64."""
  probabilities = softmax(logits, sampling.temperature or 1.0)
  order = np.sort(probabilities)[::-1]
  keep = np.ones(len(logits), bool)
  if sampling.top_k:
    keep = probabilities >= order[min(sampling.top_k, len(order)) - 1]
  if sampling.top_p < 1:
    left = np.where(keep, probabilities, 0) / probabilities[keep].sum()
    before = np.array([left[left > p].sum() for p in left])  # how probable all are that are more probable
    assert np.abs(before[before > 0] - sampling.top_p).min(initial=1) > 1e-5, "too near the edge for float32 to tell"
    keep &= (before < sampling.top_p) | (left == left.max())
  if sampling.min_p:
    keep &= probabilities >= sampling.min_p * probabilities.max()
  return keep


def kept_by_truncate(logits, sampling):
  logps = jax.nn.log_softmax(jnp.asarray(logits)[None] / (sampling.temperature or 1.0))
  found = np.asarray(truncate(logps, stack([sampling])))[0]
  kept = np.isfinite(found)
  np.testing.assert_array_equal(found[kept], np.asarray(logps)[0][kept])  # what stays is as it was
  return kept


def chi_square(tokens, probabilities):
  """p-value; tokens that are expected fewer than five times are taken together."""
  counts, expected = np.bincount(tokens, minlength=len(probabilities)), probabilities * len(tokens)
  rare = expected < 5
  found = np.append(counts[~rare], counts[rare].sum())
  expected = np.append(expected[~rare], expected[rare].sum())
  return stats.chisquare(found[expected > 0], expected[expected > 0]).pvalue


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("seed", [0, 1])
def test_frequencies_are_the_softmax(temperature, seed):
  """The keys are fixed, so this passes always or never; of a thousand sets of fair draws one would fail."""
  tokens, _ = draw(LOGITS, SamplingParams(temperature), seed=seed)
  assert chi_square(tokens, softmax(LOGITS, temperature)) > 1e-3
  # The test can tell: other temperatures, or tokens in another order, are out of the question.
  assert chi_square(tokens, softmax(LOGITS, 1.1 * temperature)) < 1e-6
  assert chi_square(tokens, softmax(LOGITS, temperature / 1.1)) < 1e-6
  assert chi_square(tokens, softmax(LOGITS[::-1], temperature)) < 1e-6


@pytest.mark.parametrize(
  "sampling",
  [
    SamplingParams(0.8, top_k=5),
    SamplingParams(1.0, top_p=0.7),
    SamplingParams(1.3, min_p=0.2),
    SamplingParams(0.9, 9, 0.9, 0.1),
  ],
)
def test_frequencies_of_what_is_left_are_in_proportion(sampling):
  probabilities = np.where(allowed(LOGITS, sampling), softmax(LOGITS, sampling.temperature), 0)
  assert 1 < np.sum(probabilities > 0) < len(LOGITS)
  tokens, _ = draw(LOGITS, sampling)
  assert (probabilities[tokens] > 0).all()
  assert chi_square(tokens, probabilities / probabilities.sum()) > 1e-3


@pytest.mark.parametrize(
  "sampling",
  [SamplingParams(1.0), SamplingParams(0.6), SamplingParams(1.4, top_k=3, top_p=0.8, min_p=0.05), SamplingParams(0)],
)
def test_log_probabilities_are_of_the_whole_distribution_at_the_temperature(sampling):
  """What a trainer computes: not of the truncated distribution; greedy tokens at temperature 1."""
  logits = np.random.default_rng(1).normal(size=(200, 50)).astype(np.float32) * 4
  tokens, logps = sample(logits, keys(200), sampling)
  wide = logits.astype(np.float64) / (sampling.temperature or 1.0)
  expected = wide - np.log(np.sum(np.exp(wide), axis=1, keepdims=True))
  np.testing.assert_allclose(logps, expected[np.arange(200), tokens], atol=1e-5)
  assert logps.dtype == np.float32
  assert tokens.dtype == np.int32


def test_greedy_takes_the_first_of_the_best_whatever_the_key_and_the_truncation():
  logits = np.random.default_rng(2).normal(size=(100, 50)).astype(np.float32)
  logits[:50, 7] = logits[:50, 9] = 9.0
  for sampling in (SamplingParams(0), SamplingParams(0.0, top_k=4, top_p=0.5, min_p=0.3)):
    for seed in (0, 1):
      tokens, _ = sample(logits, keys(100, seed), sampling)
      np.testing.assert_array_equal(tokens, logits.argmax(axis=1))
      assert (tokens[:50] == 7).all()


def test_a_rows_token_depends_on_its_logits_and_its_key_alone():
  logits = np.random.default_rng(3).normal(size=(40, 30)).astype(np.float32)
  expected, _ = sample(logits, keys(40), SamplingParams(1.0, top_p=0.9))
  order = np.random.default_rng(4).permutation(40)[:17]
  found, _ = sample(logits[order], keys(40)[order], SamplingParams(1.0, top_p=0.9))
  np.testing.assert_array_equal(found, expected[order])
  others, _ = sample(logits, keys(40, seed=1), SamplingParams(1.0, top_p=0.9))
  assert np.mean(np.asarray(others) == expected) < 0.7


def log(*probabilities):
  return np.log(np.array(probabilities)).astype(np.float32)


@pytest.mark.parametrize(
  ("logits", "sampling", "expected"),
  [
    # The cases of the definitions, by hand.
    (log(0.1, 0.4, 0.2, 0.3), SamplingParams(top_k=1), [1]),
    (log(0.1, 0.4, 0.2, 0.3), SamplingParams(top_k=2), [1, 3]),
    (log(0.1, 0.4, 0.2, 0.3), SamplingParams(top_k=4), [0, 1, 2, 3]),
    (log(0.1, 0.4, 0.2, 0.3), SamplingParams(top_k=1000), [0, 1, 2, 3]),  # more than there are
    (log(0.1, 0.4, 0.2, 0.3), SamplingParams(top_p=0.35), [1]),
    (log(0.1, 0.4, 0.2, 0.3), SamplingParams(top_p=0.45), [1, 3]),  # the one that goes beyond p is in
    (log(0.1, 0.4, 0.2, 0.3), SamplingParams(top_p=0.95), [0, 1, 2, 3]),
    (log(0.1, 0.4, 0.2, 0.3), SamplingParams(min_p=0.6), [1, 3]),
    (log(0.1, 0.4, 0.2, 0.3), SamplingParams(min_p=1.0), [1]),
    # Ties stay together.
    (log(0.3, 0.1, 0.3, 0.3), SamplingParams(top_k=1), [0, 2, 3]),
    (log(0.2, 0.4, 0.2, 0.2), SamplingParams(top_k=2), [0, 1, 2, 3]),
    (log(0.2, 0.4, 0.2, 0.2), SamplingParams(top_p=0.5), [0, 1, 2, 3]),
    (log(0.4, 0.1, 0.4, 0.1), SamplingParams(top_p=0.1), [0, 2]),
    (log(0.4, 0.1, 0.4, 0.1), SamplingParams(min_p=1.0), [0, 2]),
    # The best always stays.
    (log(0.1, 0.4, 0.2, 0.3), SamplingParams(top_p=1e-9), [1]),
    (log(0.1, 0.4, 0.2, 0.3), SamplingParams(top_p=0.0), [1]),
    # top-p is of what top-k left: 0.57 and 0.43. min-p comes last: before top-p it would have left it 0.57 and 0.43.
    (log(0.1, 0.4, 0.2, 0.3), SamplingParams(top_k=2, top_p=0.5), [1]),
    (log(0.1, 0.4, 0.2, 0.3), SamplingParams(top_p=0.5, min_p=0.7), [1, 3]),
    (log(0.1, 0.4, 0.2, 0.3), SamplingParams(top_p=0.5, min_p=0.8), [1]),
    # The temperature comes first: it makes 0.53 of 0.4.
    (log(0.1, 0.4, 0.2, 0.3), SamplingParams(temperature=0.5, top_p=0.5), [1]),
  ],
)
def test_what_is_left_by_hand(logits, sampling, expected):
  assert np.flatnonzero(kept_by_truncate(logits, sampling)).tolist() == expected
  tokens, _ = draw(logits, sampling, count=500)
  assert np.unique(tokens).tolist() == expected


@pytest.mark.parametrize("size", [3, 200])
def test_what_is_left_is_what_the_definitions_say(size):
  """Logits with many ties and without, against float64."""
  rng = np.random.default_rng(size)
  seen = set()
  for top_k, top_p, min_p in itertools.product((0, 1, 5, 2000), (1.0, 0.9, 0.5, 1e-7), (0.0, 0.03, 0.5)):
    sampling = SamplingParams(0.7, top_k, top_p, min_p)
    # In quarters: sums of float32 are far from the edges, and values coincide.
    for logits in (rng.normal(size=size) * 2, np.round(rng.normal(size=size) * 8) / 4):
      logits = logits.astype(np.float32)
      expected = allowed(logits, sampling)
      np.testing.assert_array_equal(kept_by_truncate(logits, sampling), expected, str(sampling))
      assert expected[logits.argmax()]
      seen.add(int(expected.sum()))
  assert len(seen) > 2


@pytest.mark.parametrize(
  "sampling", [SamplingParams(0.7, top_p=1e-3), SamplingParams(0.7, top_k=1), SamplingParams(0.7, min_p=1.0)]
)
def test_where_only_the_best_is_left_it_is_drawn(sampling):
  """Over many rows compiled as one program, where the same sum may be rounded differently in two places."""
  logits = np.random.default_rng(5).normal(size=(4096, 64)).astype(np.float32) * 3
  tokens, _ = sample(logits, keys(4096), sampling)
  np.testing.assert_array_equal(tokens, logits.argmax(axis=1))
