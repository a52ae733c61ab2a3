"""What holds for the rewards whatever the answers are. The values themselves: test_rewards.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlpr_jax import rewards
from tests.evidence import make_evidence

P, A = 2, 4
GROUPS = (1, 3)  # few shapes, so that little compiles
PROBABILITY = ("mean_prob", "geometric_mean", "product")
GROUP_SHAPINGS = ("rank", "zscore")
many = settings(deadline=None, max_examples=25, derandomize=True)
few = settings(many, max_examples=15)  # for plain calls, which are slow
aggregates = pytest.mark.parametrize("aggregate", rewards.AGGREGATES)
kinds = pytest.mark.parametrize("kind", rewards.TOKEN_WEIGHTS)
group_shapings = pytest.mark.parametrize("shaping", GROUP_SHAPINGS)

LOGPS = np.float32([-np.inf, -np.inf, 0, 0, *np.log(np.arange(1, 20) / 20), *-np.geomspace(1e-6, 20, 50)])
WEIGHTS = np.float32([0, 0, 0, 0, 1, 1, *np.geomspace(2**-10, 2**10, 20)])
INTEGERS = np.arange(-8, 9, dtype=np.float32)
NONSENSE = np.float32([np.nan, np.inf, -np.inf, 1e30, -1e30, -1])


def arrays(shape, values):
  """Arrays of any of the values; one draw for all of it, which is fast."""
  values, size = np.asarray(values), int(np.prod(shape))
  return st.binary(min_size=size, max_size=size).map(
    lambda drawn: values[np.frombuffer(drawn, np.uint8) % len(values)].reshape(shape)
  )


@st.composite
def masks(draw, shape):
  """Mostly rows of three tokens side by side, wherever they begin; sometimes any tokens at all."""
  if draw(st.booleans()):
    return draw(arrays(shape, [False, True]))
  counts = draw(arrays(shape[:-1], [3, 3, 3, 2, 0]))
  starts = draw(arrays(shape[:-1], range(shape[-1] - 2)))
  place = np.arange(shape[-1]) - starts[..., None]
  return (place >= 0) & (place < counts[..., None])


@st.composite
def answers(draw, groups=GROUPS):
  """(logps [P, G, A], mask, baseline_logps [P, A], baseline_mask)."""
  shape = (P, draw(st.sampled_from(groups)), A)
  parts = []
  for part in (shape, (P, A)):
    parts += [draw(arrays(part, LOGPS)), draw(masks(part))]
  return tuple(parts)


def draw_weights(data, mask):
  return data.draw(arrays(mask.shape, WEIGHTS))


def spoil(data, values, mask):
  """The same on the mask, and nonsense everywhere else."""
  return np.where(mask, values, data.draw(arrays(mask.shape, NONSENSE)))


@functools.partial(jax.jit, static_argnames="aggregate")
def probability(logps, mask, aggregate, weights=None):
  return rewards.reference_probability(logps, mask, aggregate, weights)


@functools.partial(jax.jit, static_argnames="aggregate")
def gradient(logps, mask, aggregate, weights):
  return jax.grad(lambda *args: jnp.sum(rewards.reference_probability(args[0], mask, aggregate, args[1])), (0, 1))(
    logps, weights
  )


token_weights = jax.jit(rewards.token_weights, static_argnames="kind")
debias = jax.jit(rewards.debias, static_argnames="shaping")
score_groups = jax.jit(rewards.score_groups, static_argnames="scoring")


@aggregates
@many
@given(data=st.data())
def test_what_stands_off_the_mask_never_matters_to_a_score(aggregate, data):
  logps, mask, *_ = data.draw(answers())
  weights = draw_weights(data, mask)
  spoilt = spoil(data, logps, mask), mask, aggregate, spoil(data, weights, mask)
  np.testing.assert_array_equal(probability(*spoilt), probability(logps, mask, aggregate, weights))
  np.testing.assert_array_equal(probability(*spoilt[:3]), probability(logps, mask, aggregate))


@aggregates
@many
@given(data=st.data())
def test_what_stands_off_the_mask_never_matters_to_a_gradient(aggregate, data):
  logps, mask, *_ = data.draw(answers())
  logps = np.maximum(logps, -20)  # finite
  weights = draw_weights(data, mask)
  found = gradient(spoil(data, logps, mask), mask, aggregate, spoil(data, weights, mask))
  for spoilt, clean in zip(found, gradient(logps, mask, aggregate, weights), strict=True):
    np.testing.assert_array_equal(spoilt, clean)
    np.testing.assert_array_equal(np.asarray(spoilt)[~mask], 0)
    assert np.isfinite(spoilt).all()


@kinds
@many
@given(data=st.data())
def test_what_stands_off_the_mask_never_matters_to_token_weights(kind, data):
  logps, mask, baseline, baseline_mask = data.draw(answers())
  weights = np.asarray(token_weights(logps, mask, kind, baseline, baseline_mask))
  spoilt = spoil(data, logps, mask), mask, kind, spoil(data, baseline, baseline_mask), baseline_mask
  np.testing.assert_array_equal(token_weights(*spoilt), weights)
  np.testing.assert_array_equal(weights[~mask], 0)
  assert (weights >= 0).all()
  assert np.isfinite(weights).all()


@aggregates
@many
@given(answers=answers(), value=st.floats(2**-100, 2**100, width=32))
def test_uniform_weights_are_no_weights(aggregate, answers, value):
  logps, mask, *_ = answers
  uniform = np.full(mask.shape, value, np.float32)
  none = probability(logps, mask, aggregate)
  if aggregate == "weighted_sum":  # which takes the weights as they are
    np.testing.assert_allclose(probability(logps, mask, aggregate, uniform), value * none, rtol=2e-5)
    return
  np.testing.assert_allclose(probability(logps, mask, aggregate, uniform), none, rtol=2e-5)
  np.testing.assert_allclose(probability(logps, mask, aggregate, 0 * uniform), none, rtol=2e-5)


@aggregates
@many
@given(data=st.data(), exponent=st.integers(-100, 100))
def test_scale_of_weights_does_not_matter(aggregate, data, exponent):
  logps, mask, *_ = data.draw(answers())
  weights = draw_weights(data, mask)
  scaled = np.ldexp(weights, exponent)
  score = probability(logps, mask, aggregate, weights)
  if aggregate == "weighted_sum":  # is on the scale of its weights
    np.testing.assert_allclose(probability(logps, mask, aggregate, 3 * weights), 3 * score, rtol=2e-5, atol=1e-37)
    return
  np.testing.assert_allclose(probability(logps, mask, aggregate, scaled), score, rtol=1e-5)
  np.testing.assert_allclose(probability(logps, mask, aggregate, 3 * weights), score, rtol=2e-5)


@aggregates
@many
@given(data=st.data())
def test_a_token_of_weight_zero_is_as_good_as_none_but_in_the_product(aggregate, data):
  logps, mask, *_ = data.draw(answers())
  weights = draw_weights(data, mask)
  less = mask & (weights > 0)
  score, without = (np.asarray(probability(logps, own, aggregate, weights)) for own in (mask, less))
  left = less.any(-1)  # else they count as uniform
  if aggregate == "product":
    exponent = mask.sum(-1)[left] / less.sum(-1)[left]
    np.testing.assert_allclose(score[left], without[left] ** exponent, rtol=1e-4, atol=1e-37)
  elif aggregate == "weighted_sum":  # over the number of all tokens
    share = less.sum(-1)[left] / mask.sum(-1)[left]
    np.testing.assert_allclose(score[left], without[left] * share, rtol=1e-5, atol=1e-37)
  else:
    np.testing.assert_allclose(score[left], without[left], rtol=1e-6)


@many
@given(data=st.data())
def test_inequalities_of_the_means(data):
  """The smallest p <= geometric mean <= mean <= the largest p, and the product is at most the smallest."""
  logps, mask, *_ = data.draw(answers())
  some = mask.any(-1)
  smallest = np.exp(np.where(mask, logps, 0).min(-1))[some]
  largest = np.exp(np.where(mask, logps, -np.inf).max(-1, initial=-np.inf))[some]
  slack = 1 + 1e-5
  for weights in (None, draw_weights(data, mask)):
    mean, geometric, product = (np.asarray(probability(logps, mask, name, weights))[some] for name in PROBABILITY)
    assert (smallest <= geometric * slack).all()
    assert (geometric <= mean * slack).all()
    assert (mean <= largest * slack).all()
    assert (product <= geometric * slack).all()
    if weights is None:
      assert (product <= smallest * slack).all()


@aggregates
@many
@given(data=st.data())
def test_score_rises_with_each_probability(aggregate, data):
  logps, mask, *_ = data.draw(answers())
  weights = draw_weights(data, mask)
  higher = np.minimum(logps + data.draw(st.floats(0, 5, width=32)), 0)
  before, after = (np.asarray(probability(values, mask, aggregate, weights)) for values in (logps, higher))
  assert (after >= before - 1e-5 * np.abs(before)).all()


@kinds
@many
@given(data=st.data())
def test_token_weights_follow_the_samples(kind, data):
  logps, mask, *baseline = data.draw(answers())
  order = np.array(data.draw(st.permutations(range(mask.shape[1]))))
  weights = np.asarray(token_weights(logps, mask, kind, *baseline))
  permuted = token_weights(logps[:, order], mask[:, order], kind, *baseline)
  np.testing.assert_allclose(permuted, weights[:, order], rtol=1e-4, atol=2e-6)


@kinds
@many
@given(data=st.data())
def test_token_weights_follow_the_tokens_wherever_they_stand(kind, data):
  """Only the order of the answer's own tokens matters, not where the mask has them."""
  logps, mask, *baseline = data.draw(answers())
  weights = np.asarray(token_weights(logps, mask, kind, *baseline))
  front = np.argsort(~mask, axis=-1, kind="stable")
  to_front = [np.take_along_axis(array, front, axis=-1) for array in (logps, mask)]
  np.testing.assert_array_equal(token_weights(*to_front, kind, *baseline), np.take_along_axis(weights, front, axis=-1))


@kinds
@many
@given(answers=answers())
def test_token_weights_leave_the_other_groups_alone(kind, answers):
  both = token_weights(*answers[:2], kind, *answers[2:])
  for p in range(P):
    logps, mask, *baseline = (array[p : p + 1] for array in answers)
    np.testing.assert_allclose(token_weights(logps, mask, kind, *baseline)[0], both[p], rtol=1e-5, atol=2e-6)


@kinds
@many
@given(answers=answers())
def test_rows_of_the_same_number_of_tokens_have_the_same_weights(kind, answers):
  logps, mask, *baseline = answers
  weights = np.asarray(token_weights(logps, mask, kind, *baseline))
  for p in range(P):
    seen = {}
    for row, own in zip(weights[p], mask[p], strict=True):
      np.testing.assert_array_equal(row[own], seen.setdefault(own.sum(), row[own]))


@group_shapings
@many
@given(data=st.data())
def test_group_shapings_follow_the_samples(shaping, data):
  score = data.draw(arrays((P, data.draw(st.sampled_from(GROUPS))), INTEGERS))
  order = np.array(data.draw(st.permutations(range(score.shape[1]))))
  shaped = np.asarray(debias(score / 32, 0.0, shaping))
  np.testing.assert_allclose(debias(score[:, order] / 32, 0.0, shaping), shaped[:, order], rtol=1e-5, atol=1e-5)


@group_shapings
@many
@given(data=st.data())
def test_group_shapings_do_not_see_a_constant(shaping, data):
  """Sixty-fourths and their sums are exact, so ties stay ties."""
  score = data.draw(arrays((P, data.draw(st.sampled_from(GROUPS))), INTEGERS)) / 64
  constant = data.draw(arrays((P, 1), INTEGERS)) / 64
  shaped = np.asarray(debias(score, np.zeros_like(constant), shaping))
  found = np.asarray(debias(score + constant, np.zeros_like(constant), shaping))
  np.testing.assert_allclose(found, shaped, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(debias(score, -constant, shaping), found)
  if shaping == "rank":
    np.testing.assert_array_equal(found, shaped)


@many
@given(data=st.data())
def test_ranks_and_zscores_are_centred_and_ordered_as_the_scores(data):
  score = data.draw(arrays((P, data.draw(st.sampled_from(GROUPS))), INTEGERS))
  rank, zscore = (np.asarray(debias(score / 8, 0.0, shaping)) for shaping in GROUP_SHAPINGS)
  np.testing.assert_allclose(rank.mean(-1), 0.5, rtol=1e-5)
  np.testing.assert_allclose(zscore.mean(-1), 0, atol=1e-5)
  assert ((rank >= 0) & (rank <= 1)).all()
  for group in range(P):
    higher = score[group][:, None] > score[group]
    same = score[group][:, None] == score[group]
    for shaped in (rank[group], zscore[group]):
      assert (shaped[:, None] > shaped)[higher].all()
      assert (shaped[:, None] == shaped)[same].all()
  np.testing.assert_array_equal(rank, debias(np.exp(score.astype(np.float64)).astype(np.float32), 0.0, "rank"))


@pytest.mark.parametrize(
  ("aggregate", "kind", "shaping"),
  [
    *((aggregate, kind, "clip") for aggregate in ("mean_prob", "product") for kind in rewards.TOKEN_WEIGHTS),
    *(("mean_prob", None, shaping) for shaping in GROUP_SHAPINGS),
  ],
)
@many
@given(data=st.data())
def test_rewards_follow_the_samples(aggregate, kind, shaping, data):
  logps, mask, *baseline = data.draw(answers())
  logps = np.log(np.exp(logps).round(1) + np.float32(0.05))  # not as close as makes rounding into spread
  order = np.array(data.draw(st.permutations(range(mask.shape[1]))))
  form, repetition, length = (
    data.draw(arrays(mask.shape[:2], np.float32(values))) for values in ([0.0, 1.0], [-1.0, 0.0], [-0.5, -0.25, 0.0])
  )
  baselines = np.array([0.25, 0.5], np.float32)

  def parts(order):
    evidence = make_evidence(
      logps=logps[:, order],
      mask=mask[:, order],
      scorable=mask[:, order].any(-1),
      formats=form[:, order],
      repetition=repetition[:, order],
      excess=length[:, order],
    )
    weights = None if kind is None else token_weights(evidence.logps, evidence.mask, kind, *baseline)
    scoring = rewards.Scoring(aggregate=aggregate, shaping=shaping, length_coefficient=1.0)
    return score_groups(evidence, baselines, scoring, weights)

  plain, permuted = parts(np.arange(len(order))), parts(order)
  for field in ("reference", "debiased", "format", "repetition", "length", "total"):
    expected = np.asarray(getattr(plain, field))[:, order]
    np.testing.assert_allclose(getattr(permuted, field), expected, rtol=1e-4, atol=1e-4, err_msg=field)


@aggregates
@few
@given(data=st.data())
def test_scores_under_jit_and_vmap_are_those_of_plain_calls(aggregate, data):
  logps, mask, *_ = data.draw(answers((3,)))
  weights = draw_weights(data, mask)
  plain = rewards.reference_probability(logps, mask, aggregate, weights)
  np.testing.assert_allclose(probability(logps, mask, aggregate, weights), plain, rtol=2e-5)
  mapped = jax.vmap(jax.vmap(lambda *row: probability(*row[:2], aggregate, row[2])))
  np.testing.assert_allclose(mapped(logps, mask, weights), plain, rtol=2e-5)
  unweighted = rewards.reference_probability(logps, mask, aggregate)
  np.testing.assert_allclose(probability(logps, mask, aggregate), unweighted, rtol=2e-5)
  mapped = jax.vmap(lambda *row: probability(*row, aggregate))
  np.testing.assert_allclose(mapped(logps, mask), unweighted, rtol=2e-5)


@kinds
@few
@given(answers=answers((3,)))
def test_token_weights_under_jit_and_vmap_are_those_of_plain_calls(kind, answers):
  plain = rewards.token_weights(*answers[:2], kind, *answers[2:])
  mapped = jax.vmap(lambda logps, mask, *baseline: token_weights(logps, mask, kind, *baseline))
  np.testing.assert_allclose(token_weights(*answers[:2], kind, *answers[2:]), plain, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(mapped(*answers), plain, rtol=1e-5, atol=1e-6)


@group_shapings
@few
@given(data=st.data())
def test_group_shapings_under_jit_and_vmap_are_those_of_plain_calls(shaping, data):
  shape = (P, 3)
  score = data.draw(arrays(shape, INTEGERS)) / 8
  baseline = np.full((P, 1), 0.25, np.float32)
  plain = rewards.debias(score, baseline, shaping)
  mapped = jax.vmap(lambda score, baseline: debias(score, baseline, shaping))
  np.testing.assert_allclose(debias(score, baseline, shaping), plain, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(mapped(score, baseline), plain, rtol=1e-5, atol=1e-6)


@many
@given(
  pair=arrays((2, 7), LOGPS),
  unknown=arrays(7, [False, True]),
  rate=st.sampled_from([0.0, 2**-10, 0.25, 0.5, 1.0]),
)
def test_moving_average_lies_between_the_two(pair, unknown, rate):
  old, new = np.where(unknown, np.nan, pair[0]), pair[1]
  average = np.asarray(jax.jit(rewards.moving_average)(old, new, rate))
  np.testing.assert_array_equal(average[unknown], new[unknown])
  least, most = np.exp(np.minimum(*pair)), np.exp(np.maximum(*pair))
  found = np.exp(average)[~unknown]
  assert (found >= least[~unknown] * (1 - 1e-5)).all()
  assert (found <= most[~unknown] * (1 + 1e-5)).all()
  np.testing.assert_allclose(rewards.moving_average(old, new, rate), average, rtol=1e-6, atol=1e-6)
  mapped = jax.vmap(rewards.moving_average, (0, 0, None))(old, new, rate)
  np.testing.assert_allclose(mapped, average, rtol=1e-6, atol=1e-6)
  swapped = rewards.moving_average(new, old, 1 - rate)
  np.testing.assert_allclose(np.asarray(swapped)[~unknown], average[~unknown], rtol=1e-5, atol=1e-6)


@many
@given(
  pair=arrays((2, P, 3), INTEGERS),
  weight=st.floats(0, 1, width=32),
)
def test_mixture_lies_between_its_parts(pair, weight):
  reference, verified = pair = pair / 64
  mixed = np.asarray(jax.jit(rewards.mixture)(reference, verified, weight))
  assert (mixed >= pair.min(0) - 1e-6).all()
  assert (mixed <= pair.max(0) + 1e-6).all()
  np.testing.assert_array_equal(rewards.mixture(reference, verified, 0.0), reference)
  np.testing.assert_array_equal(rewards.mixture(reference, verified, 1.0), verified)
  np.testing.assert_allclose(rewards.mixture(verified, reference, 1 - weight), mixed, atol=1e-6)


@many
@given(answer=st.text(), more=st.text(alphabet="ab", min_size=1), reference=st.text(), coefficient=st.floats(0, 4))
def test_longer_answers_are_never_penalised_less(answer, more, reference, coefficient):
  penalty = rewards.answer_length_penalty(answer, reference, coefficient)
  longer = rewards.answer_length_penalty(answer + more, reference, coefficient)
  assert -coefficient <= longer <= penalty <= 0
  assert rewards.answer_length_penalty(reference, reference, coefficient) == 0
  assert rewards.answer_length_penalty(f" {answer}\n", reference, coefficient) == penalty
