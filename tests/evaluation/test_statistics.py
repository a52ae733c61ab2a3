"""evaluation/statistics.py against enumeration and simulation."""

import itertools

import numpy as np
import pytest

from rlpr_jax.evaluation.statistics import bootstrap_interval, majority_at_k, mean_at_k, paired_difference, pass_at_k

NAN = np.nan


def test_mean_at_k_leaves_out_what_was_not_judged():
  right = [[1, 0, 1, 0], [1, NAN, NAN, 0], [NAN] * 4, [1, 1, 1, NAN]]
  np.testing.assert_array_equal(mean_at_k(right), [0.5, 0.5, NAN, 1.0])


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(k):
  rng = np.random.default_rng(k)
  right = rng.choice([0.0, 1.0, NAN], size=(40, 7), p=[0.6, 0.25, 0.15])
  expected = []
  for row in right:
    judged = [grade for grade in row if grade == grade]
    subsets = list(itertools.combinations(judged, k))
    expected.append(np.mean([max(subset) for subset in subsets]) if subsets else NAN)
  np.testing.assert_allclose(pass_at_k(right, k), expected, atol=1e-12)


def test_pass_at_1_is_the_mean_and_large_counts_stay_finite():
  right = (np.random.default_rng(0).random((5, 1000)) < 0.01).astype(float)
  np.testing.assert_allclose(pass_at_k(right, 1), mean_at_k(right))
  values = pass_at_k(right, 500)
  assert np.all((values > 0.9) & (values <= 1))


def test_majority_is_of_normalised_answers_and_ties_go_to_the_first():
  answers = [
    ["Paris", "rome", " ROME "],
    ["4", "5", None],
    ["a", "B", "b", "A"],
    [None, None],
    ["x", "x", "y"],
    ["x", "X", "y"],
  ]
  right = [[1, 0, 0], [1, 0, 0], [1, 0, 0, 1], [0, 0], [NAN, NAN, 1], [NAN, 1, 0]]
  grades = [majority_at_k([texts], np.array([row], float))[0] for texts, row in zip(answers, right, strict=True)]
  np.testing.assert_array_equal(grades, [0, 1, 1, 0, NAN, 1])


def test_interval_holds_the_true_mean_as_often_as_it_says():
  rng, true = np.random.default_rng(0), 0.3
  held = 0
  for trial in range(400):
    low, high = bootstrap_interval(rng.random(150) < true, resamples=500, seed=trial)
    held += low <= true <= high
  assert 0.91 <= held / 400 <= 0.98


def test_interval_is_the_same_every_time_and_shrinks_with_more_questions():
  values = np.random.default_rng(1).random(400)
  low, high = bootstrap_interval(values)
  assert (low, high) == bootstrap_interval(values)
  assert low < values.mean() < high
  # Of a mean of n values the interval is 2 * 1.96 standard errors wide.
  assert high - low == pytest.approx(3.92 * values.std() / 20, rel=0.05)


def test_interval_leaves_out_nan_and_knows_nothing_of_nothing():
  values = np.random.default_rng(2).random(50)
  assert bootstrap_interval(np.concatenate([values, [NAN] * 9])) == bootstrap_interval(values)
  assert np.isnan(bootstrap_interval([NAN, NAN])).all()
  assert bootstrap_interval([1, 1, 1]) == (1.0, 1.0)


def test_resampling_in_parts_draws_as_many():
  low, high = bootstrap_interval(np.random.default_rng(3).random(30_000), resamples=300)
  assert 0.49 < low < high < 0.51


def test_paired_difference_finds_what_unpaired_intervals_do_not():
  rng = np.random.default_rng(4)
  hardness = rng.random(300)
  b, a = hardness, np.clip(hardness + rng.normal(0.03, 0.08, 300), 0, 1)
  result = paired_difference(a, b)
  assert result.difference == pytest.approx(np.mean(a - b))
  assert 0 < result.low < result.difference < result.high
  assert result.p < 0.001
  assert bootstrap_interval(a)[0] < bootstrap_interval(b)[1]  # they overlap
  swapped = paired_difference(b, a)
  assert swapped.difference == -result.difference
  assert swapped.high == pytest.approx(-result.low, abs=1e-3)


def test_p_of_no_difference_is_uniform():
  rng = np.random.default_rng(5)
  p = [paired_difference(rng.random(60), rng.random(60), resamples=400, seed=i).p for i in range(300)]
  assert np.mean(np.array(p) < 0.1) == pytest.approx(0.1, abs=0.06)
  assert np.mean(p) == pytest.approx(0.5, abs=0.06)


def test_paired_difference_of_the_same_and_of_nothing():
  assert paired_difference([1, 0, NAN], [1, 0, 1]) == (0.0, 0.0, 0.0, 1.0)
  assert np.isnan(paired_difference([NAN], [1.0])).all()
