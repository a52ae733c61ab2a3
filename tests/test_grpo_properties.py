"""grpo.py: what must hold whatever the rewards, ratios and masks are."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rlpr_jax import grpo

PROPERTY = settings(deadline=None, max_examples=25, derandomize=True)
SIZES = (2, 5, 8)
JUNK = st.sampled_from([math.nan, math.inf, -math.inf, float(np.float32(1e38)), -float(np.float32(1e38))])


def grid(shape, least=-128, most=128):
  """Multiples of 1/64, which float32 adds exactly: no group has a spread near the floor."""
  return hnp.arrays(np.int64, shape, elements=st.integers(least, most)).map(lambda x: (x / 64).astype(np.float32))


def floats(shape, least, most):
  return hnp.arrays(np.float32, shape, elements=st.floats(least, most, width=32))


groups = st.sampled_from(SIZES).flatmap(
  lambda size: st.tuples(grid((3, size)), grid((3, size)), st.permutations(range(size)).map(np.array))
)


def advantages_of(kind, one, other):
  """Advantages and spreads of rewards [P, G] and, where two parts are wanted, of a second."""
  if kind == "separate":
    return _separate([one, other], [0.8, 0.3])
  return _group(one, kind)


_group = jax.jit(grpo.group_advantages, static_argnums=1)
_separate = jax.jit(grpo.separate_advantages)
_bound = jax.jit(grpo.group_bound)
_bound_gradient = jax.jit(jax.grad(lambda logps, valid: jnp.sum(grpo.group_bound(logps, valid)[0])))


# --- advantages ---


@pytest.mark.parametrize("kind", [*grpo.NORMALIZATIONS, "separate"])
@PROPERTY
@given(groups)
def test_permuting_samples_permutes_advantages(kind, group):
  one, other, order = group
  advantages, stds = advantages_of(kind, one, other)
  found, found_stds = advantages_of(kind, one[:, order], other[:, order])
  np.testing.assert_allclose(found, np.asarray(advantages)[:, order], atol=1e-5)
  np.testing.assert_allclose(found_stds, stds, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [*grpo.NORMALIZATIONS, "separate"])
@PROPERTY
@given(groups, grid((2, 3, 1)))
def test_a_constant_added_to_a_group_changes_nothing(kind, group, constants):
  one, other, _ = group
  advantages, stds = advantages_of(kind, one, other)
  found, found_stds = advantages_of(kind, one + constants[0], other + constants[1])
  np.testing.assert_allclose(found, advantages, atol=2e-4)  # the means of larger numbers are rounded further
  np.testing.assert_allclose(found_stds, stds, rtol=2e-5, atol=5e-6)


@pytest.mark.parametrize("kind", [*grpo.NORMALIZATIONS, "separate"])
@PROPERTY
@given(groups)
def test_advantages_of_a_group_add_up_to_nothing(kind, group):
  advantages, _ = advantages_of(kind, *group[:2])
  np.testing.assert_allclose(np.sum(advantages, axis=1), 0, atol=5e-4)


@PROPERTY
@given(groups, st.integers(0, 6))
def test_the_unit_of_a_part_does_not_matter(group, power):
  """Normalised apart, a part counts by its weight and not by how large its numbers are."""
  one, other, _ = group
  advantages, _ = _separate([one, other], [0.8, 0.3])
  found, _ = _separate([one * np.float32(2.0**power), other], [0.8, 0.3])
  np.testing.assert_allclose(found, advantages, atol=1e-3)  # not nearer, for the 1e-6 in the quotient


# --- the answer's own gradient ---


bounds = st.sampled_from(SIZES).flatmap(
  lambda size: st.tuples(
    floats((4, size), -1000, 0), hnp.arrays(bool, (4, size)), st.permutations(range(size)).map(np.array), JUNK
  )
)


@PROPERTY
@given(bounds)
def test_the_weights_are_the_gradient_of_the_bound(group):
  logps, valid, _, junk = group
  logps = np.where(valid, logps, np.float32(junk))
  _, _, weights = _bound(logps, valid)
  np.testing.assert_allclose(_bound_gradient(logps, valid), weights, rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(np.sum(weights, axis=1), valid.any(axis=1), rtol=1e-5)


@PROPERTY
@given(bounds)
def test_the_bound_lies_between_the_mean_and_the_largest(group):
  logps, valid, _, _ = group
  bound, advantages, _ = (np.asarray(x) for x in _bound(logps, valid))
  for p in np.flatnonzero(valid.any(axis=1)):
    known = logps[p, valid[p]].astype(np.float64)
    rounding = 1e-6 * abs(known.min()) + 1e-6
    assert known.mean() - rounding <= bound[p] <= known.max() + rounding
    assert bound[p] >= known.max() - math.log(known.size) - rounding
    # The best raises the bound, the worst lowers it, and neither by more than it can.
    gains = advantages[p, valid[p]]
    assert gains[known.argmax()] >= -1e-6
    assert gains[known.argmin()] <= 1e-6
    if known.size > 1:
      assert gains.min() >= math.log(1 - 1 / known.size) - 1e-6
      assert gains.max() <= known.max() - known.min() + 1e-4


@PROPERTY
@given(bounds)
def test_permuting_samples_permutes_what_the_bound_needs(group):
  logps, valid, order, _ = group
  bound, *each = _bound(logps, valid)
  found, *found_each = _bound(logps[:, order], valid[:, order])
  np.testing.assert_allclose(found, bound, rtol=1e-6, atol=1e-6)
  for x, expected in zip(found_each, each, strict=True):
    np.testing.assert_allclose(x, np.asarray(expected)[:, order], rtol=1e-5, atol=1e-6)


@PROPERTY
@given(bounds)
def test_an_invalid_sample_never_matters(group):
  logps, valid, _, junk = group
  spoilt = np.where(valid, logps, np.float32(junk))
  clean = _bound(np.where(valid, logps, 0), valid)
  jax.tree.map(np.testing.assert_array_equal, _bound(spoilt, valid), clean)
  gradient = np.asarray(_bound_gradient(spoilt, valid))
  np.testing.assert_array_equal(gradient[~valid], 0)
  assert np.all(np.isfinite(gradient))


@PROPERTY
@given(grid((2, 4), 0, 64))
def test_verifree_weights_are_the_rewards(rewards):
  np.testing.assert_array_equal(grpo.verifree_weights(rewards), rewards)
  np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(grpo.verifree_weights(x)))(rewards), 0 * rewards)


# --- losses ---

SHAPE = (3, 5)


@pytest.mark.parametrize(("aggregate", "dual"), [*((name, None) for name in grpo.AGGREGATES), ("token_mean", 2.0)])
@PROPERTY
@given(
  hnp.arrays(bool, SHAPE),
  floats(SHAPE, -5, 0),
  floats(SHAPE, -2, 2),
  grid(3),
  hnp.arrays(np.float32, (2, *SHAPE), elements=JUNK),
)
def test_masked_tokens_never_matter(aggregate, dual, mask, logps, differences, advantages, junk):
  """To the bit: not to the loss, its gradients by both log-probabilities and by the advantages, or the metrics."""
  old_logps = logps - differences
  function = _masked_loss(aggregate, dual)
  expected = function(np.where(mask, logps, 0), np.where(mask, old_logps, 0), advantages, mask)
  found = function(np.where(mask, logps, junk[0]), np.where(mask, old_logps, junk[1]), advantages, mask)
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  (value, _), gradients = found
  assert np.isfinite(value)
  assert all(np.all(np.isfinite(gradient)) for gradient in gradients)
  for gradient in gradients[:2]:
    np.testing.assert_array_equal(np.asarray(gradient)[~mask], 0)


@functools.cache
def _masked_loss(aggregate, dual):
  """Loss, metrics and gradients, compiled once for each setting."""

  def loss(logps, old_logps, advantages, mask):
    return grpo.policy_loss(logps, old_logps, advantages, mask, aggregate=aggregate, dual_clip=dual)

  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


@functools.cache
def _clipped_loss(clips):
  """Gradients, losses and what was clipped, compiled once for each setting."""

  def loss(logps, advantages):
    each, _, clipped = grpo.clipped_loss(logps, jnp.zeros_like(logps), advantages, *clips)
    return jnp.sum(each), (each, clipped)

  return jax.jit(jax.grad(loss, has_aux=True))


@PROPERTY
@given(
  hnp.arrays(np.float32, 16, elements=st.one_of(st.floats(-3, 3, width=32), st.sampled_from([-200.0, 200.0]))),
  grid(16),
  st.sampled_from([(0.2, 0.27, None), (0.2, 0.27, 3.0), (0.5, 0.05, 1.05), (0.05, 0.5, 10.0), (0.4, 0.4, None)]),
)
def test_where_a_clip_decides_the_gradient_is_zero_and_elsewhere_the_plain_one(differences, advantages, clips):
  low, high, dual = clips
  gradient, (each, clipped) = _clipped_loss(clips)(differences, advantages)
  for i, (difference, advantage) in enumerate(zip(differences.tolist(), advantages.tolist(), strict=True)):
    ratio = math.exp(difference)
    if any(math.isclose(ratio, bound, rel_tol=1e-5) for bound in (1 - low, 1 + high, dual or 1)):
      continue  # float32 may decide otherwise
    gain = min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    decided = gain != ratio * advantage
    if dual and advantage < 0 and gain < dual * advantage:
      gain, decided = dual * advantage, True
    assert bool(clipped[i]) == decided
    if decided:
      assert float(gradient[i]) == 0  # and not nearly so, nor NaN
    elif ratio < 1e38:
      assert float(gradient[i]) == pytest.approx(-ratio * advantage, rel=1e-5, abs=1e-30)
    if decided or ratio < 1e38:
      assert float(each[i]) == pytest.approx(-gain, rel=1e-5, abs=1e-30)
    elif dual and advantage < 0:
      pytest.fail("a dual clip leaves no loss without a limit")


@PROPERTY
@given(floats(16, -3, 3), floats(16, -5, 0), grid(16), st.floats(0.1, 5))
def test_truncation_leaves_every_token_its_gradient(differences, logps, advantages, cap):
  def loss(logps):
    each, _, truncated = grpo.truncated_loss(logps, old_logps, advantages, cap)
    return jnp.sum(each), truncated

  old_logps = logps - differences
  gradient, truncated = jax.grad(loss, has_aux=True)(logps)
  ratio = np.exp(logps.astype(np.float64) - old_logps)
  np.testing.assert_allclose(gradient, -np.minimum(ratio, cap) * advantages, rtol=1e-5)
  near = np.isclose(ratio, cap, rtol=1e-5)
  np.testing.assert_array_equal(np.asarray(truncated)[~near], (ratio > cap)[~near])


@PROPERTY
@given(hnp.arrays(bool, (4, 6)), st.integers(1, 20))
def test_the_three_means_add_up_as_they_should(mask, length):
  tokens = mask.sum(axis=1)
  sequences = np.sum(tokens > 0)
  weights = {name: np.asarray(grpo.loss_weights(mask, name, length), np.float64) for name in grpo.AGGREGATES}
  for weight in weights.values():
    np.testing.assert_array_equal(weight[~mask], 0)
    assert np.all(weight[mask] > 0)
  assert weights["token_mean"].sum() == pytest.approx(1 if sequences else 0)
  assert len(set(weights["token_mean"][mask])) <= 1
  each = np.where(tokens > 0, 1 / max(sequences, 1), 0)
  np.testing.assert_allclose(weights["seq_mean_token_mean"].sum(axis=1), each, rtol=1e-6)
  np.testing.assert_allclose(weights["seq_mean_token_sum"].sum(axis=1), each * tokens / length, rtol=1e-6)
