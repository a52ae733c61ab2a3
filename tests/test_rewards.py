"""rewards.py against float64 numpy and plain loops."""

import itertools
import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlpr_jax import rewards

AGGREGATE = {
  "mean_prob": lambda logps: np.mean(np.exp(logps)),
  "geometric_mean": lambda logps: np.prod(np.exp(logps)) ** (1 / len(logps)),
  "product": lambda logps: np.prod(np.exp(logps)),
  "mean_logprob": np.mean,
}
SHAPE = {
  "clip": lambda d: min(max(d, 0), 1),
  "identity": lambda d: d,
  "one_minus": lambda d: 1 - d,
  "threshold_0.25": lambda d: d if d >= 0.25 else 0,
  "leaky_0.25": lambda d: d if d >= 0.25 else d / 100,
  "sigmoid_6": lambda d: 1 / (1 + math.exp(6 - 12 * d)),
  "sigmoid_0": lambda d: 1 / (1 + math.exp(-d)),
  "bins_5": lambda d: min((k / 5 for k in range(6)), key=lambda edge: abs(edge - d)),
}
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

  assert names(SHAPE) == names(rewards.SHAPINGS)


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
  ],
)
def test_bad_shapings_are_refused(shaping):
  with pytest.raises(ValueError, match="expected one of clip, identity, threshold_T"):
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
def test_assess_from_end_to_end(aggregate, shaping, coefficient):
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

  parts = rewards.assess(
    logps, mask, scorable, baselines, forms, repetition,
    aggregate=aggregate, shaping=shaping, format_coefficient=coefficient,
  )  # fmt: skip

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
  zeros = np.zeros((1, 3), np.float32)
  for aggregate in rewards.AGGREGATES:
    parts = rewards.assess(
      logps, mask, np.array([[True, True, False]]), np.zeros(1, np.float32), zeros, zeros,
      aggregate=aggregate, shaping="identity",
    )  # fmt: skip
    worst, best, unscorable = parts.total[0]
    assert unscorable < worst < best
