"""grpo.py against float64 loops, and its gradients against the formula."""

import itertools
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


@pytest.mark.parametrize("size", [2, 3, 7, 8, 16, 33, 64])
def test_equal_rewards_of_any_size_have_no_advantage(size):
  """Their mean may be an ulp off, which at 17.3 is more than the floor of the deviation."""
  values = np.random.default_rng(size).uniform(-1, 1, 200) * 10.0 ** np.arange(-3, 7).repeat(20)
  rewards = np.repeat(np.append(values, 17.3).astype(np.float32)[:, None], size, axis=1)
  for transform in (lambda f, **_: f, jax.jit):
    for normalize in ("std", "none", "leave_one_out"):
      advantages, stds = transform(grpo.group_advantages, static_argnums=1)(rewards, normalize)
      np.testing.assert_array_equal(advantages, np.zeros_like(rewards))
      np.testing.assert_array_equal(stds, np.zeros(len(rewards)))


@pytest.mark.parametrize("normalize", grpo.NORMALIZATIONS)
@pytest.mark.parametrize("size", [1, 2, 8])
def test_advantages_of_parts_add_up_to_those_of_the_whole(normalize, size):
  parts = np.random.default_rng(0).normal(size=(3, 50, size)).astype(np.float32)
  whole = parts.sum(axis=0)
  advantages, stds = grpo.group_advantages(whole, normalize)
  found = [grpo.group_advantages(whole, normalize, part) for part in parts]
  np.testing.assert_allclose(sum(part for part, _ in found), advantages, atol=2e-5)
  for _, of_part in found:
    np.testing.assert_array_equal(of_part, stds)


def test_credit_by_parts_has_the_same_gradient_in_the_mean_and_less_variance():
  """Every group of two responses of a tiny policy, enumerated: a reasoning of two, then an answer of three.

  The reward is one of the reasoning (the reference's probability) and one of both (the format's), in the paper's
  shares. Parts that pull against each other, as large as each other, could have more variance apart.
  """
  rng = np.random.default_rng(0)
  logits = {"reasoning": rng.normal(size=2), "answer": rng.normal(size=(2, 3))}
  softmax = {name: np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True) for name, x in logits.items()}
  of_reasoning, of_both = 0.9 * np.array([0.2, 0.9]), 0.1 * np.array([[1, 0, 1], [0, 1, 1]])
  responses = [(z, a) for z in range(2) for a in range(3)]
  probability = np.array([softmax["reasoning"][z] * softmax["answer"][z, a] for z, a in responses])

  def scores(z, a):
    """Gradients of log p(reasoning) and of log p(answer), over all eight logits."""
    first, second = np.zeros(8), np.zeros((2, 3))
    first[:2] = np.eye(2)[z] - softmax["reasoning"]
    second[z] = np.eye(3)[a] - softmax["answer"][z]
    return first, np.concatenate([np.zeros(2), second.ravel()])

  def moments(by_parts):
    mean, square = np.zeros(8), 0.0
    for i, j in itertools.product(range(6), repeat=2):
      rest = np.array([[of_both[responses[k]] for k in (i, j)]])
      total = rest + of_reasoning[[responses[k][0] for k in (i, j)]]
      advantages = np.asarray(grpo.group_advantages(total, "leave_one_out")[0])[0]
      of_answer = np.asarray(grpo.group_advantages(total, "leave_one_out", rest)[0])[0] if by_parts else advantages
      gradient = sum(
        advantages[k] * scores(*responses[n])[0] + of_answer[k] * scores(*responses[n])[1] for k, n in enumerate((i, j))
      )
      weight = probability[i] * probability[j]
      mean, square = mean + weight * gradient, square + weight * (gradient**2).sum()
    return mean, square - (mean**2).sum()

  (whole, variance), (parts, less) = moments(by_parts=False), moments(by_parts=True)
  np.testing.assert_allclose(parts, whole, atol=1e-6)
  assert np.abs(whole).max() > 0.01
  assert less < 0.9 * variance


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


# --- parts of the reward apart ---


@pytest.mark.parametrize("normalize", grpo.NORMALIZATIONS)
@pytest.mark.parametrize("size", [1, 2, 8])
def test_separate_advantages(normalize, size):
  rng = np.random.default_rng(size)
  parts = [rng.normal(0.3, spread, (20, size)).astype(np.float32) for spread in (0.01, 0.4, 7.0)]
  parts[1][3] = 0.25  # a part that does not spread says nothing, and is not blown up
  weights = [0.9, 0.1, -2.0]
  separate = jax.jit(grpo.separate_advantages, static_argnums=2)
  advantages, stds = separate(parts, weights, normalize)
  by_hand = [advantages_by_hand(part, normalize) for part in parts]
  expected = sum(weight * part[0] for weight, part in zip(weights, by_hand, strict=True))
  _, expected_stds = advantages_by_hand(
    sum(weight * part.astype(np.float64) for weight, part in zip(weights, parts, strict=True)), normalize
  )
  assert (advantages.dtype, stds.dtype) == (jnp.float32, jnp.float32)
  np.testing.assert_allclose(advantages, expected, atol=1e-4)  # rounding, beside a spread of 0.01
  np.testing.assert_allclose(stds, expected_stds, rtol=1e-5)


def test_a_small_part_is_heard_beside_a_large_one():
  small = np.array([[1, 0, 1, 0]], np.float32)
  large = 1000 * np.array([[1, 1, 0, 0]], np.float32)
  separate, _ = grpo.separate_advantages([small, large], [1.0, 1.0])
  np.testing.assert_allclose(separate, np.sqrt(3) * np.array([[1, 0, 0, -1]]), atol=1e-5)
  together, _ = grpo.group_advantages(small + large)
  assert abs(together[0, 0] - together[0, 1]) < 0.01  # here it is all but lost


@pytest.mark.parametrize("part", [0, 1])
def test_a_bad_value_in_one_part_spoils_its_own_group_and_no_other(part):
  parts = np.random.default_rng(0).random((2, 5, 4)).astype(np.float32)
  good, good_stds = grpo.separate_advantages(list(parts), [0.5, 0.5])
  parts[part, 2, 1] = np.nan
  advantages, stds = grpo.separate_advantages(list(parts), [0.5, 0.5])
  assert not np.isfinite(stds[2])  # by which the filter drops it
  assert not np.any(np.isfinite(advantages[2]))
  others = [0, 1, 3, 4]
  np.testing.assert_array_equal(np.array(advantages)[others], np.array(good)[others])
  np.testing.assert_array_equal(np.array(stds)[others], np.array(good_stds)[others])


def test_as_many_weights_as_parts():
  with pytest.raises(ValueError, match="zip"):
    grpo.separate_advantages([np.zeros((1, 2), np.float32)], [1.0, 2.0])


# --- the answer's own gradient ---


group_bound = jax.jit(grpo.group_bound)


def log_mean(values):
  """log of the mean of exp, float64; -inf of nothing."""
  values = [float(value) for value in values]
  if not values:
    return -math.inf
  top = max(values)
  return top + math.log(sum(math.exp(value - top) for value in values) / len(values))


def bound_by_hand(logps, valid):
  bounds, advantages, weights = [], np.zeros(logps.shape), np.zeros(logps.shape)
  for p, (group, known) in enumerate(zip(logps, valid, strict=True)):
    bounds.append(log_mean(group[known]))
    for i in np.flatnonzero(known):
      others = [group[j] for j in np.flatnonzero(known) if j != i]
      advantages[p, i] = bounds[p] - log_mean(others) if others else 0
      weights[p, i] = 1 / sum(math.exp(min(float(group[j]) - float(group[i]), 700)) for j in np.flatnonzero(known))
  return np.array(bounds), advantages, weights


@pytest.mark.parametrize("spread", [0.1, 5.0, 1000.0])
@pytest.mark.parametrize(("size", "transform"), [(1, jax.jit), (3, jax.vmap), (8, jax.jit), (8, lambda f: f)])
def test_group_bound(size, transform, spread):
  rng = np.random.default_rng(size)
  logps = -rng.uniform(0, spread, (30, size)).astype(np.float32)
  valid = rng.random((30, size)) < 0.7
  valid[0], valid[1], logps[2] = True, False, -1000
  logps[~valid] = rng.choice([np.nan, np.inf, -np.inf, 1e38, 5.0], np.sum(~valid))
  found = transform(grpo.group_bound)(logps, valid)
  assert [x.dtype for x in found] == [jnp.float32] * 3
  for x, expected in zip(found, bound_by_hand(logps, valid), strict=True):
    np.testing.assert_allclose(x, expected, rtol=2e-6, atol=2e-6)
  _, advantages, weights = found
  np.testing.assert_array_equal(np.asarray(advantages)[~valid], 0)
  np.testing.assert_array_equal(np.asarray(weights)[~valid], 0)


def test_group_bound_of_answers_that_are_all_but_impossible():
  """exp(-1000) is 0 in float32 and in float64; the shares are those of the same group 1000 nats higher."""
  logps = np.array([[-3.0, -1.0, -2.0, -40.0]], np.float32)
  valid = np.ones((1, 4), bool)
  bound, *shares = group_bound(logps, valid)
  far, *far_shares = group_bound(logps - 1000, valid)
  np.testing.assert_allclose(far, bound - 1000, rtol=1e-6)
  jax.tree.map(np.testing.assert_array_equal, far_shares, shares)


def test_a_lone_answer_is_its_own_bound_and_has_no_advantage():
  logps, valid = np.array([[-5.0, np.nan, -1.0]], np.float32), np.array([[True, False, False]])
  bound, advantages, weights = group_bound(logps, valid)
  np.testing.assert_allclose(bound, [-5], rtol=1e-6)
  np.testing.assert_array_equal(advantages, [[0, 0, 0]])
  np.testing.assert_array_equal(weights, [[1, 0, 0]])


def test_a_group_without_an_answer():
  bad = np.array([[np.nan, -1.0, np.inf]], np.float32)
  valid = np.zeros((1, 3), bool)
  bound, advantages, weights = group_bound(bad, valid)
  np.testing.assert_array_equal(bound, [-np.inf])
  np.testing.assert_array_equal(advantages, np.zeros((1, 3)))
  np.testing.assert_array_equal(weights, np.zeros((1, 3)))
  np.testing.assert_array_equal(jax.grad(lambda x: group_bound(x, valid)[0].sum())(bad), np.zeros((1, 3)))


def test_the_bound_alone_carries_a_gradient():
  logps = np.array([[-5.0, -2.0, -1.0]], np.float32)
  valid = np.ones((1, 3), bool)
  for part in (1, 2):
    gradient = jax.grad(lambda x, part=part: jnp.sum(group_bound(x, valid)[part] ** 2))(logps)
    np.testing.assert_array_equal(gradient, np.zeros((1, 3)))
  gradient = jax.grad(lambda x: jnp.sum(grpo.verifree_weights(x) * x))(logps)
  np.testing.assert_array_equal(gradient, logps)


class Reasonings:
  """A policy of four reasonings z, small enough to sum over every group of three: E and its gradients are exact.

  p(z) = softmax(theta)_z and p(y*|z) = sigmoid(phi_z), all in float64.
  """

  theta, phi = np.array([0.3, -0.5, 0.0, 0.8]), np.array([-2.0, 1.0, 0.3, -0.7])
  groups = np.array(list(itertools.product(range(4), repeat=3)))

  def __init__(self, theta=theta, phi=phi):
    self.probability = np.exp(theta) / np.exp(theta).sum()
    self.answer = 1 / (1 + np.exp(-phi))
    self.chance = self.probability[self.groups].prod(axis=1)  # of each group

  def estimate(self, advantages, weights):
    """Mean over all groups of sum_i advantage_i grad log p(z_i) + weight_i grad log p(y*|z_i), by theta and by phi."""
    theta, phi = np.zeros(4), np.zeros(4)
    for chance, group, a, w in zip(self.chance, self.groups, np.asarray(advantages), np.asarray(weights), strict=True):
      for z, advantage, weight in zip(group, a, w, strict=True):
        theta += chance * float(advantage) * (np.eye(4)[z] - self.probability)
        phi[z] += chance * float(weight) * (1 - self.answer[z])
    return theta, phi

  @classmethod
  def gradient(cls, objective):
    """Central differences of an objective of a policy, by theta and by phi."""
    step = 1e-5 * np.eye(4)
    return (
      np.array([objective(cls(theta=cls.theta + d)) - objective(cls(theta=cls.theta - d)) for d in step]) / 2e-5,
      np.array([objective(cls(phi=cls.phi + d)) - objective(cls(phi=cls.phi - d)) for d in step]) / 2e-5,
    )


def test_verifree_is_the_gradient_of_the_answers_probability():
  policy = Reasonings()
  rewards = policy.answer[policy.groups].astype(np.float32)
  advantages, _ = grpo.group_advantages(rewards, "leave_one_out")
  found = policy.estimate(advantages / 3, grpo.verifree_weights(rewards) / 3)
  expected = Reasonings.gradient(lambda policy: policy.probability @ policy.answer)
  np.testing.assert_allclose(found, expected, atol=1e-6)
  assert np.abs(expected).max() > 0.01


def test_jepo_is_the_gradient_of_the_bound():
  policy = Reasonings()
  _, advantages, weights = group_bound(np.log(policy.answer)[policy.groups], np.ones((64, 3), bool))
  found = policy.estimate(advantages, weights)
  expected = Reasonings.gradient(lambda policy: policy.chance @ np.log(policy.answer[policy.groups].mean(axis=1)))
  np.testing.assert_allclose(found, expected, atol=1e-6)
  assert np.abs(expected).max() > 0.01


def test_jepo_with_a_reasoning_that_cannot_be_scored():
  """Reasoning 1 gives no answer. With the advantage of lone answers, which is left out, the gradient is exact again.

  So an invalid sample's advantage must be 0; log((G - 1) / G), which a mean over all G would give it, must not be.
  """

  def bounds(policy):
    return [log_mean(np.log(policy.answer)[group[group != 1]]) if any(group != 1) else 0 for group in policy.groups]

  policy = Reasonings()
  valid = policy.groups != 1
  _, advantages, weights = group_bound(np.where(valid, np.log(policy.answer)[policy.groups], np.nan), valid)
  lone = valid & (valid.sum(axis=1, keepdims=True) == 1)
  found = policy.estimate(np.where(lone, np.log(policy.answer)[policy.groups], advantages), weights)
  expected = Reasonings.gradient(lambda policy: policy.chance @ bounds(policy))
  np.testing.assert_allclose(found, expected, atol=1e-6)


# --- loss ---


def decided_by_clip(ratio, advantage, dual=math.inf):
  return (ratio > 1 + HIGH and advantage > 0) or (advantage < 0 and (ratio < 1 - LOW or ratio > dual))


def loss_by_hand(logps, old_logps, advantages, mask, aggregate, dual=math.inf):
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
      gain = min(ratio * advantage, min(max(ratio, 1 - LOW), 1 + HIGH) * advantage)
      total -= weight * (max(gain, dual * advantage) if advantage < 0 else gain)
      if decided_by_clip(ratio, advantage, dual):
        clipped += 1
      else:
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
@pytest.mark.parametrize(("dual", "transform"), [(None, lambda f: f), (None, jax.jit), (1.3, jax.jit)])
def test_policy_loss_and_its_gradient(batch, aggregate, dual, transform):
  logps, old_logps, advantages, mask = batch

  def loss(logps):
    return grpo.policy_loss(logps, old_logps, advantages, mask, LOW, HIGH, aggregate, dual)

  (value, metrics), gradient = transform(jax.value_and_grad(loss, has_aux=True))(logps)
  expected, expected_gradient, expected_metrics = loss_by_hand(*batch, aggregate, dual or math.inf)
  assert float(value) == pytest.approx(expected, abs=2e-6)
  np.testing.assert_allclose(gradient, expected_gradient, atol=1e-6)
  assert {name: float(value) for name, value in metrics.items()} == pytest.approx(expected_metrics, rel=1e-5)
  assert 0 < expected_metrics["clip_fraction"] < 1
  if dual:
    without, _, plain_metrics = loss_by_hand(*batch, aggregate)
    assert expected < without  # it took something off
    assert expected_metrics["clip_fraction"] > plain_metrics["clip_fraction"]
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

  grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
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

  (value, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(logps)
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
  gradient = jax.jit(jax.grad(lambda x: grpo.policy_loss(x, logps, advantages, mask)[0]))(logps)
  np.testing.assert_allclose(gradient, -advantages[:, None] * mask / 5, rtol=1e-6)


def test_dual_clip_limits_what_a_bad_token_costs():
  ratio = np.array([0.5, 1.0, 2.9, 3.1, 1e6, 1e30], np.float32)
  for advantage in (-2.0, 2.0):
    logps, old_logps = np.log(ratio), np.zeros(6, np.float32)
    loss, found, clipped = grpo.clipped_loss(logps, old_logps, np.float32(advantage), LOW, HIGH, 3)
    np.testing.assert_allclose(found, ratio, rtol=1e-5)  # the true ratio, for the metrics
    if advantage < 0:
      np.testing.assert_allclose(loss, 2 * np.array([0.8, 1, 2.9, 3, 3, 3]), rtol=1e-5)
      np.testing.assert_array_equal(clipped, [True, False, False, True, True, True])
    else:  # a good token is limited already
      np.testing.assert_allclose(loss, -2 * np.array([0.5, 1, 1.27, 1.27, 1.27, 1.27]), rtol=1e-5)


@pytest.mark.parametrize(("advantage", "dual"), [(1.0, None), (1.0, 3.0), (-1.0, 3.0)])
def test_where_a_clip_decides_an_infinite_ratio_has_gradient_zero(advantage, dual):
  def loss(logps):
    return grpo.clipped_loss(logps, np.float32(-200), np.float32(advantage), LOW, HIGH, dual)[0]

  value, gradient = jax.value_and_grad(loss)(np.float32(0))
  assert (float(value), float(gradient)) == (pytest.approx(-1.27 if advantage > 0 else 3.0), 0)


@pytest.mark.parametrize("dual", [1, 1.0, 0.5, 0, -3.0])
def test_a_dual_clip_that_would_clip_everything_is_refused(dual):
  with pytest.raises(ValueError, match=f"dual_clip {dual}: expected a number above 1"):
    grpo.policy_loss(*np.zeros((2, 1, 1), np.float32), np.ones(1, np.float32), np.ones((1, 1), bool), dual_clip=dual)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("cap", [0.5, 1.0, 2.0])
def test_truncated_loss(cap, transform):
  rng = np.random.default_rng(0)
  logps = -rng.exponential(1.0, (5, 7)).astype(np.float32)
  old_logps = logps + rng.normal(0, 0.7, logps.shape).astype(np.float32)
  old_logps[0, 0] = -500.0  # an infinite ratio
  advantages = np.array([1.5, -0.7, 2.0, 0.0, -2.0], np.float32)[:, None]

  def loss(logps):
    each, ratio, truncated = grpo.truncated_loss(logps, old_logps, advantages, cap)
    return jnp.sum(each), (each, ratio, truncated)

  (_, (each, ratio, truncated)), gradient = transform(jax.value_and_grad(loss, has_aux=True))(logps)
  exact = np.exp(logps.astype(np.float64) - old_logps)
  weight = np.minimum(exact, cap)
  assert 0 < np.mean(exact > cap) < 1
  np.testing.assert_allclose(each, -weight * advantages * logps, rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(gradient, -weight * advantages + 0 * logps, rtol=1e-5, atol=1e-7)
  np.testing.assert_array_equal(truncated, exact > cap)
  with np.errstate(over="ignore"):
    np.testing.assert_allclose(ratio, exact.astype(np.float32), rtol=1e-5)


def test_the_truncated_ratio_carries_no_gradient():
  gradient = jax.grad(lambda x: grpo.truncated_loss(x, np.float32(-1), np.float32(1), 2.0)[1])(np.float32(-1.2))
  assert float(gradient) == 0


def test_on_policy_both_losses_pull_alike():
  logps = -np.random.default_rng(0).random((2, 3)).astype(np.float32)
  advantages = np.array([[2.0], [-0.5]], np.float32)
  clip = jax.grad(lambda x: jnp.sum(grpo.clipped_loss(x, logps, advantages)[0]))(logps)
  truncated = jax.grad(lambda x: jnp.sum(grpo.truncated_loss(x, logps, advantages, 1.0)[0]))(logps)
  np.testing.assert_allclose(clip, truncated, rtol=1e-6)


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


def test_loss_weights():
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
    np.testing.assert_allclose(grpo.loss_weights(mask, aggregate), expected[aggregate], rtol=1e-6)
  np.testing.assert_allclose(grpo.loss_weights(mask, "seq_mean_token_sum", length=5), mask / 15, rtol=1e-6)
  assert float(jnp.sum(grpo.loss_weights(mask, "token_mean"))) == pytest.approx(1)
  by_row = jnp.sum(grpo.loss_weights(mask, "seq_mean_token_mean"), axis=1)
  np.testing.assert_allclose(by_row, [1 / 3, 1 / 3, 0, 1 / 3], rtol=1e-6)
  for aggregate in AGGREGATES:
    np.testing.assert_array_equal(grpo.loss_weights(np.zeros((2, 3), bool), aggregate), np.zeros((2, 3)))


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
    grpo.loss_weights(np.ones((1, 2), bool), "mean")
