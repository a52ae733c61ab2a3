"""Rewards published since RLPR, at values computed in float64 from their papers' formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlpr_jax import filtering, grpo, rewards

P = np.array([0.6, 0.3, 0.05])
Q = np.array([[0.6, 0.2, 0.05], [0.3, 0.4, 0.1], [0.05, 0.05, 0.8]])
KNOWN = np.array([0.9, 0.25, 0.05])
C = np.array([[0.9, 0.5, 0.2], [0.8, 0.2, 0.04], [0.95, 0.4, 0.1]])
conditional_expectation = jax.jit(rewards.conditional_expectation)


def logs(x):
  return jnp.asarray(np.log(x), jnp.float32)


def close(found, expected, rtol=1e-6):
  np.testing.assert_allclose(found, expected, rtol=rtol, atol=1e-7)


# Conditional expectation (CER, arXiv 2603.10624).


def test_conditional_expectation():
  everyone = np.ones(3, bool)
  found = conditional_expectation(logs(P), logs(Q), everyone)
  close(found, [0.4763157894736842, 0.373076923076923, 0.10526315789473684])
  advantages, _ = grpo.group_advantages(found[None], "leave_one_out")
  close(advantages[0], [0.23714574898785432, 0.08228744939271249, -0.3194331983805667])


def test_the_reasoning_of_an_empty_answer_still_counts():
  found = conditional_expectation(logs(P), logs(Q), np.array([True, True, False]))
  close(found, [0.4763157894736842, 0.373076923076923, 0])


def test_equal_answers_have_equal_rewards():
  q = Q[:, [0, 0, 2]]
  close(conditional_expectation(logs(P), logs(q), np.ones(3, bool)), [0.4763157894736842] * 2 + [0.10526315789473684])


def test_pairs_that_were_not_scored_are_no_part_of_the_sums():
  others = ~np.eye(3, dtype=bool)
  q = np.where(others, Q, np.nan)  # whatever stands there
  close(
    conditional_expectation(logs(P), logs(q), np.ones(3, bool), others), [0.2642857142857143, 0.49, 0.3999999999999999]
  )
  own = np.eye(3, dtype=bool)
  close(conditional_expectation(logs(P), logs(Q), np.ones(3, bool), own), P)
  nothing = np.zeros((3, 3), bool)
  close(conditional_expectation(logs(P), logs(Q), np.ones(3, bool), nothing), np.zeros(3))


def test_far_below_what_float32_can_hold():
  p, q = np.array([-800.0, -805, -790]), np.array([[-700.0, -900, 0], [-710, -650, 0], [-1000, -655, 0]])
  found = rewards._log_conditional_expectation(jnp.asarray(p), jnp.asarray(q), np.ones(3, bool), None)
  close(found[:2], [-800.0000450929971, -795.00666994959])


def test_an_answer_that_every_reasoning_likes_earns_the_mean():
  """What its docstring's paper does not say: such an answer can beat two specific wrong ones."""
  p, q = np.array([0.02, 0.02, 0.2]), np.array([[0.9, 0.05, 0.5], [0.05, 0.9, 0.5], [0.01, 0.01, 0.5]])
  found = conditional_expectation(logs(p), logs(q), np.ones(3, bool))
  close(found, [0.021875, 0.021875, 0.08])
  close(grpo.group_advantages(found[None], "leave_one_out")[0][0], [-0.0290625, -0.0290625, 0.058125], rtol=1e-5)


@given(seed=st.integers(0, 10**6), size=st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_properties_of_the_conditional_expectation(seed, size):
  rng = np.random.default_rng(seed)
  p, q = -rng.exponential(5, size), -rng.exponential(20, (size, size))
  answered = np.ones(size, bool)
  r = np.asarray(rewards.conditional_expectation(p, q, answered))
  weights = np.exp(q - q.max(axis=0))
  np.testing.assert_allclose(r, (weights * np.exp(p)[:, None]).sum(0) / weights.sum(0), rtol=1e-4)
  assert (r >= np.exp(p).min() * (1 - 1e-5)).all()
  assert (r <= np.exp(p).max() * (1 + 1e-5)).all()
  shifted = rewards.conditional_expectation(p, q + rng.normal(size=size), answered)
  np.testing.assert_allclose(shifted, r, rtol=1e-4)
  flat = rewards.conditional_expectation(p, np.full((size, size), -3.0), answered)
  np.testing.assert_allclose(flat, np.exp(p).mean(), rtol=1e-5)


# Weighted sums (NRT, arXiv 2602.11549).


@pytest.mark.parametrize(
  ("aggregate", "expected"),
  [
    ("mean_prob", [0.533333333333333, 0.346666666666667, 0.483333333333333]),
    ("geometric_mean", [0.448140474655716, 0.185663553344511, 0.336197540679896]),
    ("product", [0.09, 0.0064, 0.038]),
    ("mean_logprob", np.array([-2.40794560865187, -5.05145728861651, -3.27016911925575]) / 3),
  ],
)
def test_aggregates(aggregate, expected):
  close(rewards.reference_probability(logs(C), np.ones((3, 3)), aggregate), expected)


@pytest.mark.parametrize(
  ("kind", "weights", "sums", "none", "gradient", "normalised", "advantages"),
  [
    (
      "inverse_base",
      [1.11111111111111, 4, 20],
      [2.33333333333333, 0.82962962962963, 1.55185185185185],
      1.0,
      [0.333333333333333, 0.666666666666667, 1.33333333333333],
      [0.278761061946903, 0.0991150442477876, 0.185398230088496],
      [1.01287414740312, -0.986608367243561, -0.0262657801595623],
    ),
    (
      "surprise",
      [0.105360515657826, 1.38629436111989, 2.99573227355399],
      [0.462372699787596, 0.160458858564133, 0.318061153892763],
      0.197061556016572,
      [0.0316081546973479, 0.231049060186648, 0.199715484903599],
      [0.309114870835304, 0.10727324377546, 0.212636759368479],
      [0.985008021332039, -1.01434632251286, 0.029338301180822],
    ),
  ],
)
def test_weighted_sums(kind, weights, sums, none, gradient, normalised, advantages):
  everything = np.ones((3, 3), bool)
  found = rewards.token_weights(logs(C), everything, kind, logs(KNOWN), everything[0])
  close(found[0], weights)
  total = rewards.reference_probability(logs(C), everything, "weighted_sum", found)
  close(total, sums)
  close(rewards.reference_probability(logs(KNOWN), everything[0], "weighted_sum", found[0]), none)
  close(rewards.answer_gradient(logs(C), everything, "weighted_sum", found)[0], gradient)
  close(rewards.reference_probability(logs(C), everything, "mean_prob", found), normalised)
  close(grpo.group_advantages(total[None])[0][0], advantages, rtol=1e-5)
  if kind == "surprise":
    positive = rewards.debias(total, none, "positive")
    close(positive, [0.265311143771024, 0, 0.120999597876191])
    close(
      grpo.group_advantages(positive[None])[0][0], [1.02796692753728, -0.969464524754906, -0.0585024027823732], 2e-5
    )


def test_what_is_hardly_known_does_not_weigh_without_end():
  known = np.array([-np.inf, -1e30, 0.0], np.float32)
  for kind, expected in (("inverse_base", [1e6, 1e6, 1]), ("surprise", [np.log(1e6), np.log(1e6), 0])):
    close(rewards.token_weights(logs(C), np.ones((3, 3)), kind, known, np.ones(3))[0], expected, rtol=1e-5)


@pytest.mark.parametrize("kind", rewards.ANSWER_GRADIENTS)
def test_gradients_of_the_answer_are_the_numerical_ones(kind):
  """u_t = c_t df / dc_t, of formulas in float64, tokens off the mask having none."""
  rng = np.random.default_rng(0)
  c, w = rng.uniform(0.05, 0.95, (4, 5)), rng.uniform(0.1, 3, (4, 5))
  mask = np.arange(5) < np.array([[5], [3], [1], [0]])
  formulas = {
    "mean_prob": lambda c, w: (w * c).sum() / w.sum(),
    "geometric_mean": lambda c, w: np.exp((w * np.log(c)).sum() / w.sum()),
    "product": lambda c, w: np.exp(len(c) * (w * np.log(c)).sum() / w.sum()),
    "mean_logprob": lambda c, w: (w * np.log(c)).sum() / w.sum(),
    "weighted_sum": lambda c, w: (w * c).sum() / len(c),
    "log_probability": lambda c, w: np.log(c).sum(),
  }
  found = rewards.answer_gradient(logs(c), mask, kind, w)
  for row in range(4):
    count, step = mask[row].sum(), 1e-6
    for t in range(5):
      expected = 0.0
      if t < count:
        up, down = c[row, :count].copy(), c[row, :count].copy()
        up[t] *= 1 + step
        down[t] *= 1 - step
        expected = (formulas[kind](up, w[row, :count]) - formulas[kind](down, w[row, :count])) / (2 * step)
      np.testing.assert_allclose(found[row, t], expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize(
  ("kind", "expected"),
  [
    ("mean_prob", lambda c: c / 3),
    ("geometric_mean", lambda c: np.full(3, np.prod(c) ** (1 / 3) / 3)),
    ("product", lambda c: np.full(3, np.prod(c))),
    ("mean_logprob", lambda c: np.full(3, 1 / 3)),
    ("log_probability", lambda c: np.ones(3)),
  ],
)
def test_the_table_of_answer_gradients(kind, expected):
  found = rewards.answer_gradient(logs(C), np.ones((3, 3)), kind)
  close(found, [expected(c) for c in C])


def test_an_unknown_answer_gradient_is_refused():
  with pytest.raises(ValueError, match="expected one of mean_prob, geometric_mean"):
    rewards.answer_gradient(logs(C), np.ones((3, 3)), "bound")


# Weights from the spread over the group (R3 / DRO, arXiv 2506.13351).

SPREAD = np.array([[0.9, 0.8, 0.6], [0.95, 0.3, 0.7], [0.85, 0.4, 0.65]])
MASKED = np.array([0.9, 0.35, 0.65])


@pytest.mark.parametrize(
  ("kind", "weights", "plain", "masked"),
  [
    (
      "logprob_spread",
      [0.0873287375024236, 0.791625639297034, 0.121045623200542],
      [-0.247680363254684, -1.00074906043105, -0.791696195877669],
      [0.644731134557313, -0.108337562619053, 0.100715301934327],
    ),
    (
      "logprob_variance",
      [0.0117517747464078, 0.965670131266558, 0.0225780939870345],
      None,
      [0.796491594505466, -0.14655010465761, 0.12827556463962],
    ),
    (
      "spread",
      [0.137145942588716, 0.725708114822568, 0.137145942588716],
      None,
      [0.588949816318671, -0.0942896915374318, 0.089065770668219],
    ),
  ],
)
def test_weights_from_the_spread(kind, weights, plain, masked):
  everything = np.ones((3, 3), bool)
  found = rewards.token_weights(logs(SPREAD), everything, kind)
  close(found[0] / found[0].sum(), weights, rtol=2e-6)
  score = rewards.reference_probability(logs(SPREAD), everything, "mean_logprob", found)
  if plain is not None:
    close(score, plain, rtol=2e-6)
    close(np.std(np.log(SPREAD), axis=0, ddof=1), [0.0556199763188559, 0.504189119989033, 0.0770943779615327])
  none = rewards.reference_probability(logs(MASKED), everything[0], "mean_logprob", found[0])
  close(score - none, masked, rtol=1e-5)


def test_one_tiny_probability_has_not_all_the_weight():
  logps = jnp.array([[-1e30, -0.5], [-0.1, -2.0], [-0.1, -1.0]])
  found = rewards.token_weights(logps, np.ones((3, 2)), "logprob_spread")
  assert np.isfinite(found).all()
  np.testing.assert_allclose(found[0, 0], np.std([np.log(1e-9), -0.1, -0.1], ddof=1), rtol=1e-5)


def test_two_sided_length():
  close(rewards.two_sided_length(np.array([[0, 4, 8, 12, 99]]), np.array([[8]]), 0.5), [[-0.5, -0.25, 0, -0.25, -0.5]])
  close(rewards.two_sided_length(np.array([0, 3]), 0, 0.5), [0, -0.5])


# Groups of equals (RLCPR, arXiv 2610.01458), overlong responses (DAPO, arXiv 2503.14476).


def test_concentration_penalty():
  p = np.array([[0.40, 0.42, 0.41], [0.10, 0.70, 0.30]])
  lengths = np.array([[900, 1000, 1200], [300, 500, 400]])
  found = p + rewards.concentration_penalty(p, lengths, np.ones((2, 3), bool), 0.5, 0.5)
  close(found, [[0.4, 0.0866666666666667, -0.59], [0.1, 0.7, 0.3]])


def test_a_response_without_a_score_has_no_part_in_the_penalty():
  p = np.array([[0.40, np.nan, 0.42, 0.41], [0.10, 0.70, 0.30, -np.inf], [np.nan] * 4])
  lengths = np.array([[900, 5, 1000, 1200], [300, 500, 400, 9000], [1, 2, 3, 4]])
  valid = np.array([[1, 0, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]], bool)
  found = rewards.concentration_penalty(p, lengths, valid)
  close(found, [[0, 0, -1 / 3, -1], [0] * 4, [0] * 4])


def test_overlong_penalty():
  lengths = np.array([0, 3584, 3585, 3840, 4095, 4096, 5000])
  close(rewards.overlong_penalty(lengths, 4096, 512), [0, 0, -1 / 512, -0.5, -511 / 512, -1, -1])


# A baseline by an average of weights (RLP, arXiv 2510.01265).


def test_gain_over_a_baseline_in_logarithms():
  gain = rewards.debias(
    rewards.reference_probability(logs([[0.5], [0.2], [0.35]]), np.ones((3, 1)), "mean_logprob"),
    rewards.reference_probability(logs([0.3]), np.ones(1), "mean_logprob"),
    "identity",
  )
  close(gain, [0.510825623765991, -0.405465108108164, 0.154150679827258])
  advantages, _ = grpo.group_advantages(gain[None], "leave_one_out")
  close(advantages[0], [0.636482837906444, -0.737953259904789, 0.101470421998345], rtol=2e-6)


# The filter by share (RAGEN-2, arXiv 2604.06268).


@pytest.mark.parametrize(
  ("spreads", "kept"),
  [
    ([0.5, 0.4, 0.1, 0.0], [1, 1, 0, 0]),  # 0.9 of 1 less 0.01 is 0.89: two are 0.9
    ([0.1, 0.3, 0.3, 0.3], [0, 1, 1, 1]),
    ([0.25, 0.25, 0.25, 0.25], [1, 1, 1, 1]),
    ([0.004, 0.003, 0.0, 0.0], [0, 0, 0, 0]),  # together less than what may be missing
    ([np.nan, 0.5, np.inf, 1e-11], [0, 1, 0, 0]),
    ([0.0, 0.0, 0.0, 0.0], [0, 0, 0, 0]),
  ],
)
def test_keep_by_share(spreads, kept):
  found = filtering.keep_by_share(np.array(spreads, np.float32))
  np.testing.assert_array_equal(found, np.array(kept, bool))
  config = filtering.FilterConfig(kind="share")
  np.testing.assert_array_equal(filtering.keep(filtering.init(config), np.array(spreads, np.float32), config), found)


@given(seed=st.integers(0, 10**6), share=st.floats(0.05, 1.0))
@settings(max_examples=40, deadline=None)
def test_what_is_kept_by_share_is_what_spreads_most(seed, share):
  spreads = np.random.default_rng(seed).exponential(1, 9).astype(np.float32)
  kept = np.asarray(filtering.keep_by_share(spreads, share))
  assert kept.any()
  assert spreads[kept].min() >= spreads[~kept].max(initial=0)
  needed = share * spreads.sum(dtype=np.float64) - 0.01
  assert spreads[kept].sum() >= needed - 1e-4
  assert spreads[kept].sum() - spreads[kept].min() < needed + 1e-4  # without the last one it was not enough


# The ratio of whole sequences (GSPO, arXiv 2507.18071).


def test_the_ratio_of_a_sequence_is_the_geometric_mean_of_its_tokens():
  rng = np.random.default_rng(0)
  new, old = -rng.exponential(1, (2, 3, 8))
  ids = np.array([[1, 1, 2, 2, 2, 3, 3, 0], [1] * 8, [1, 2, 2, 2, 2, 2, 3, 3]])
  mask = rng.random((3, 8)) < 0.7
  found = np.exp(np.asarray(grpo.with_sequence_ratios(new, old, mask, ids)) - old)
  for row, place in np.ndindex(3, 8):
    sequence = mask[row] & (ids[row] == ids[row, place])
    expected = np.exp((new - old)[row, sequence].mean()) if mask[row, place] else np.exp((new - old)[row, place])
    np.testing.assert_allclose(found[row, place], expected, rtol=1e-5)


def test_loss_and_gradient_are_those_of_gspo():
  """-mean over sequences of min(s A, clip(s) A), s = exp(mean of log ratios), by hand and by differences."""
  rng = np.random.default_rng(1)
  lengths, total = np.array([5, 2, 4, 6]), 6
  old = -rng.exponential(1, (4, total))
  new = old + rng.normal(0, 0.2, (4, total))
  mask = np.arange(total) < lengths[:, None]
  advantages = np.array([1.0, -0.5, 0.7, -2.0])

  def by_hand(new):
    s = np.array([np.exp((new - old)[i, :n].mean()) for i, n in enumerate(lengths)])
    return -np.mean(np.minimum(s * advantages, np.clip(s, 0.9, 1.1) * advantages))

  def ours(new):
    return grpo.policy_loss(
      new, jnp.asarray(old), jnp.asarray(advantages), mask, 0.1, 0.1, "seq_mean_token_mean",
      sequence_ids=jnp.zeros((4, total), jnp.int32),
    )[0]  # fmt: skip

  np.testing.assert_allclose(ours(jnp.asarray(new)), by_hand(new), rtol=1e-5)
  gradient = jax.grad(ours)(jnp.asarray(new))
  for place in np.ndindex(4, total):
    step = np.zeros((4, total))
    step[place] = 1e-6
    numeric = (by_hand(new + step) - by_hand(new - step)) / 2e-6
    np.testing.assert_allclose(gradient[place], numeric, rtol=1e-4, atol=1e-6)
