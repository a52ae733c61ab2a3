"""grpo.py against float64 loops, and its gradients against the formula."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlpr_jax import grpo

LOW, HIGH = 0.2, 0.27
AGGREGATES = grpo.AGGREGATES


# --- advantages ---


def advantages_by_hand(rewards, normalize):
  rows, stds = [], []
  for group in rewards.astype(np.float64):
    mean = 0.0 if len(group) == 1 else sum(group) / len(group)
    std = 1.0 if len(group) == 1 else math.sqrt(sum((r - mean) ** 2 for r in group) / (len(group) - 1))
    if normalize == "std":
      rows.append([(r - mean) / (std + 1e-6) if std >= 1e-6 else 0.0 for r in group])
    elif normalize == "none":
      rows.append([r - mean for r in group])
    else:
      others = [np.delete(group, i) for i in range(len(group))]
      rows.append([r - (sum(o) / len(o) if len(o) else 0.0) for r, o in zip(group, others, strict=True)])
    stds.append(std)
  return np.array(rows), np.array(stds)


@pytest.mark.parametrize("normalize", grpo.NORMALIZATIONS)
@pytest.mark.parametrize("size", [1, 2, 3, 8, 16])
def test_group_advantages(normalize, size):
  rewards = np.random.default_rng(size).normal(0.3, 0.4, (20, size)).astype(np.float32)
  advantages, stds = jax.jit(grpo.group_advantages, static_argnums=1)(rewards, normalize)
  expected, expected_stds = advantages_by_hand(rewards, normalize)
  assert (advantages.dtype, stds.dtype) == (jnp.float32, jnp.float32)
  np.testing.assert_allclose(advantages, expected, atol=5e-6)
  np.testing.assert_allclose(stds, expected_stds, rtol=2e-6)


@pytest.mark.parametrize("normalize", grpo.NORMALIZATIONS)
def test_a_group_of_one_has_mean_zero_and_std_one(normalize):
  advantages, stds = grpo.group_advantages(np.array([[0.5], [-1.0], [0.0]], np.float32), normalize)
  np.testing.assert_allclose(advantages, [[0.5], [-1.0], [0.0]], rtol=2e-6)
  np.testing.assert_array_equal(stds, [1, 1, 1])


@pytest.mark.parametrize("size", [2, 3, 7, 8, 16, 64])
def test_a_constant_group_teaches_nothing(size):
  """The float32 mean of eight times 0.1 need not be 0.1: what is left over must not be blown up."""
  values = np.array([0.1, 0.2, 0.3, 0.55, 0.7, 0.9, 1 / 3, 1.0, 0.0, -0.9, -1.0, 0.1 + 1e-8], np.float32)
  rewards = np.repeat(values[:, None], size, axis=1)
  for transform in (lambda f, **_: f, jax.jit):
    advantages, stds = transform(grpo.group_advantages, static_argnums=1)(rewards, "std")
    np.testing.assert_array_equal(advantages, np.zeros_like(rewards))
    assert np.max(stds) < 1e-6
  for normalize in ("none", "leave_one_out"):
    np.testing.assert_allclose(grpo.group_advantages(rewards, normalize)[0], 0, atol=1e-6)


def test_spread_just_under_and_just_over_the_floor():
  rewards = np.array([[0.0, 1.2e-6], [0.0, 1.6e-6]], np.float32)  # stds are these by the square root of two
  advantages, stds = grpo.group_advantages(rewards)
  np.testing.assert_allclose(stds, [1.2e-6 / math.sqrt(2), 1.6e-6 / math.sqrt(2)], rtol=1e-5)
  np.testing.assert_array_equal(advantages[0], [0, 0])
  np.testing.assert_allclose(advantages[1], np.array([-0.8e-6, 0.8e-6]) / (1.6e-6 / math.sqrt(2) + 1e-6), rtol=1e-5)


@pytest.mark.parametrize("normalize", grpo.NORMALIZATIONS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size", [1, 4])
def test_a_bad_reward_spoils_its_own_group_and_no_other(normalize, bad, size):
  rewards = np.random.default_rng(0).random((5, size)).astype(np.float32)
  good, good_stds = grpo.group_advantages(rewards, normalize)
  rewards[2, 0] = bad
  advantages, stds = grpo.group_advantages(rewards, normalize)
  assert not np.isfinite(stds[2])  # by which the filter drops it
  assert not np.any(np.isfinite(advantages[2]))
  others = [0, 1, 3, 4]
  np.testing.assert_array_equal(np.array(advantages)[others], np.array(good)[others])
  np.testing.assert_array_equal(np.array(stds)[others], np.array(good_stds)[others])


def test_leave_one_out_of_two_is_the_difference():
  advantages, _ = grpo.group_advantages(np.array([[1.0, 0.25]], np.float32), "leave_one_out")
  np.testing.assert_array_equal(advantages, [[0.75, -0.75]])


def test_unknown_normalization_is_refused():
  with pytest.raises(ValueError, match="normalize 'max': expected one of std, none, leave_one_out"):
    grpo.group_advantages(np.zeros((1, 2), np.float32), "max")


# --- loss ---


def decided_by_clip(ratio, advantage):
  return (ratio > 1 + HIGH and advantage > 0) or (ratio < 1 - LOW and advantage < 0)


def loss_by_hand(logps, old_logps, advantages, mask, aggregate):
  """Float64, token by token: the loss, its gradient by logps, and the metrics."""
  batch, length = mask.shape
  counts = mask.sum(axis=1)
  rows, tokens = max(sum(counts > 0), 1), max(counts.sum(), 1)
  total, gradient, ratios, clipped = 0.0, np.zeros((batch, length)), [], 0
  for b in range(batch):
    weight = {
      "token_mean": 1 / tokens,
      "seq_mean_token_sum": 1 / (rows * length),
      "seq_mean_token_mean": 1 / (rows * max(counts[b], 1)),
    }[aggregate]
    for t in np.flatnonzero(mask[b]):
      advantage = float(advantages[b])
      ratio = math.exp(float(logps[b, t]) - float(old_logps[b, t]))
      ratios.append(ratio)
      if decided_by_clip(ratio, advantage):
        clipped += 1
        total -= weight * min(max(ratio, 1 - LOW), 1 + HIGH) * advantage
      else:
        total -= weight * ratio * advantage
        gradient[b, t] = -weight * ratio * advantage
  metrics = {
    "ratio_mean": sum(ratios) / tokens,
    "ratio_worst": max((abs(ratio - 1) for ratio in ratios), default=0.0),
    "clip_fraction": clipped / tokens,
  }
  return total, gradient, metrics


@pytest.fixture(scope="module")
def batch():
  """Six sequences of different lengths, one without tokens; nonsense outside the mask."""
  rng = np.random.default_rng(3)
  logps = -rng.exponential(1.0, (6, 9)).astype(np.float32)
  old_logps = logps + rng.normal(0, 0.35, logps.shape).astype(np.float32)
  advantages = np.array([1.5, -0.7, 2.0, -2.0, 0.0, 0.4], np.float32)
  starts, ends = np.array([0, 2, 3, 1, 0, 4]), np.array([9, 5, 4, 8, 6, 4])
  places = np.arange(9)
  mask = (places >= starts[:, None]) & (places < ends[:, None])
  for array in (logps, old_logps):
    array[~mask] = rng.choice([np.nan, np.inf, -np.inf, 1e30, -1e30], np.sum(~mask))
  return logps, old_logps, advantages, mask


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_policy_loss_and_its_gradient(batch, aggregate, transform):
  logps, old_logps, advantages, mask = batch

  def loss(logps):
    return grpo.policy_loss(logps, old_logps, advantages, mask, LOW, HIGH, aggregate)

  (value, metrics), gradient = transform(jax.value_and_grad(loss, has_aux=True))(logps)
  expected, expected_gradient, expected_metrics = loss_by_hand(*batch, aggregate)
  assert float(value) == pytest.approx(expected, abs=2e-6)
  np.testing.assert_allclose(gradient, expected_gradient, atol=1e-6)
  assert {name: float(value) for name, value in metrics.items()} == pytest.approx(expected_metrics, rel=1e-5)
  assert 0 < expected_metrics["clip_fraction"] < 1
  # Where the clip decides, the gradient is zero and not nearly so; and so it is outside the mask.
  np.testing.assert_array_equal(np.asarray(gradient)[expected_gradient == 0], 0)


def test_what_is_masked_never_matters():
  """Not in the loss, not in its gradients by log-probabilities, old ones and advantages."""
  rng = np.random.default_rng(0)
  mask = rng.random((4, 6)) < 0.5
  clean = np.where(mask, -rng.random((4, 6)), 0.0).astype(np.float32)
  advantages = rng.normal(size=4).astype(np.float32)

  def loss(logps, old_logps, advantages):
    return grpo.policy_loss(logps, old_logps, advantages, mask)[0]

  grad = jax.value_and_grad(loss, argnums=(0, 1, 2))
  expected = grad(clean, clean * 0.9, advantages)
  for new in (np.nan, np.inf, -np.inf, 1e38):
    for old in (np.nan, np.inf, -np.inf, -1e38):
      found = grad(np.where(mask, clean, new), np.where(mask, clean * np.float32(0.9), old), advantages)
      jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_a_batch_that_is_masked_out_has_loss_and_gradient_zero(aggregate):
  logps = np.full((3, 4), np.nan, np.float32)

  def loss(logps):
    return grpo.policy_loss(logps, logps, np.ones(3, np.float32), np.zeros((3, 4), bool), aggregate=aggregate)

  (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(logps)
  assert float(value) == 0
  assert {name: float(metric) for name, metric in metrics.items()} == dict.fromkeys(metrics, 0.0)
  np.testing.assert_array_equal(gradient, np.zeros((3, 4)))


def test_the_clip_is_not_symmetric():
  """1.25 is inside [0.8, 1.27] and 0.75 is not; a clip to [0.73, 1.2] would have it the other way round."""
  ratio = np.array([0.75, 0.79, 0.81, 1.0, 1.19, 1.25, 1.26, 1.28, 3.0], np.float32)
  for advantage in (1.0, -1.0):
    loss, found, clipped = grpo.clipped_loss(np.log(ratio), np.zeros(9, np.float32), np.float32(advantage))
    np.testing.assert_allclose(found, ratio, rtol=1e-6)
    np.testing.assert_array_equal(clipped, (ratio > 1.27) if advantage > 0 else (ratio < 0.8))
    kept = np.minimum(ratio, 1.27) if advantage > 0 else np.maximum(ratio, 0.8)
    np.testing.assert_allclose(loss, -advantage * kept, rtol=1e-6)


def test_bad_steps_are_pulled_back_without_limit():
  """A likelier bad token, or an unlikelier good one, is never clipped."""
  ratio = np.array([5.0, 0.2], np.float32)
  loss, _, clipped = grpo.clipped_loss(np.log(ratio), np.zeros(2, np.float32), np.array([-1.0, 1.0], np.float32))
  np.testing.assert_allclose(loss, [5.0, -0.2], rtol=1e-6)
  assert not np.any(clipped)


def test_on_policy_the_gradient_is_the_policy_gradient():
  logps = -np.random.default_rng(0).random((2, 3)).astype(np.float32)
  advantages = np.array([2.0, -0.5], np.float32)
  mask = np.array([[1, 1, 0], [1, 1, 1]], bool)
  gradient = jax.grad(lambda x: grpo.policy_loss(x, logps, advantages, mask)[0])(logps)
  np.testing.assert_allclose(gradient, -advantages[:, None] * mask / 5, rtol=1e-6)


def test_kl_k3():
  rng = np.random.default_rng(0)
  logps, reference = np.log(rng.dirichlet(np.ones(50), 2)).astype(np.float32)
  k3 = grpo.kl_k3(logps, reference)
  ratio = np.exp(reference.astype(np.float64) - logps.astype(np.float64))
  np.testing.assert_allclose(k3, ratio - 1 - np.log(ratio), rtol=1e-4, atol=2e-6)
  assert np.min(k3) >= 0
  policy = np.exp(logps.astype(np.float64))
  kl = np.sum(policy * (logps.astype(np.float64) - reference))
  assert float(np.sum(policy * np.asarray(k3))) == pytest.approx(kl, rel=1e-5)  # unbiased
  np.testing.assert_array_equal(grpo.kl_k3(logps, logps), np.zeros(50))


def test_token_weights():
  mask = np.zeros((4, 10), bool)
  for row, tokens in enumerate((2, 7, 0, 1)):
    mask[row, row : row + tokens] = True
  each = mask.sum(axis=1, keepdims=True)
  expected = {
    "token_mean": mask / 10,
    "seq_mean_token_sum": mask / (3 * 10),
    "seq_mean_token_mean": mask / (3 * np.maximum(each, 1)),
  }
  for aggregate in AGGREGATES:
    np.testing.assert_allclose(grpo.token_weights(mask, aggregate), expected[aggregate], rtol=1e-6)
  np.testing.assert_allclose(grpo.token_weights(mask, "seq_mean_token_sum", length=5), mask / 15, rtol=1e-6)
  assert float(jnp.sum(grpo.token_weights(mask, "token_mean"))) == pytest.approx(1)
  by_row = jnp.sum(grpo.token_weights(mask, "seq_mean_token_mean"), axis=1)
  np.testing.assert_allclose(by_row, [1 / 3, 1 / 3, 0, 1 / 3], rtol=1e-6)
  for aggregate in AGGREGATES:
    np.testing.assert_array_equal(grpo.token_weights(np.zeros((2, 3), bool), aggregate), np.zeros((2, 3)))


def test_token_mean_weighs_tokens_and_not_sequences():
  """The mean over the minibatch, which the mean of the sequences' means is not."""
  mask = np.arange(8) < np.array([[8], [1]])
  logps = np.zeros((2, 8), np.float32)
  advantages = np.array([1.0, -1.0], np.float32)
  loss = {name: float(grpo.policy_loss(logps, logps, advantages, mask, aggregate=name)[0]) for name in AGGREGATES}
  assert loss["token_mean"] == pytest.approx(-7 / 9)
  assert loss["seq_mean_token_mean"] == pytest.approx(0)
  assert loss["seq_mean_token_sum"] == pytest.approx(-7 / 16)


def test_unknown_aggregate_is_refused():
  with pytest.raises(ValueError, match="aggregate 'mean': expected one of token_mean, "):
    grpo.token_weights(np.ones((1, 2), bool), "mean")
