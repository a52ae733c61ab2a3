"""Figures of a diagnosis against sums over all pairs, and numbers worked out elsewhere."""

import itertools

import numpy as np
import pytest

from rlpr_jax.diagnosis import statistics
from rlpr_jax.grading.agreement import auc, group_auc, within_group_correlation

RAGEN = np.array([[-1, -3], [-2, -4], [-5, -2], [-3, -2.5]])


def some_rows(seed: int, groups: int = 7, samples: int = 6):
  """Scores with ties and gaps, verdicts that go with them, and groups."""
  rng = np.random.default_rng(seed)
  right = rng.random((groups, samples)) < rng.random((groups, 1))
  scores = np.round(0.4 * right + rng.random((groups, samples)), 1)
  scores[rng.random(scores.shape) < 0.1] = np.nan
  return scores.ravel(), right.ravel(), np.repeat(np.arange(groups), samples)


def brute_force(scores, right, groups, weights):
  """(all, within, between): share of ordered pairs, pair by pair; `weights`: how often each group was drawn.

  Of a group that was drawn twice, the pairs within are those of each copy, and none is between its copies.
  """
  sums = np.zeros((3, 2))
  for i, j in itertools.product(range(len(scores)), repeat=2):
    if right[i] and not right[j] and np.isfinite(scores[i] + scores[j]):
      above = float(scores[i] > scores[j]) + 0.5 * float(scores[i] == scores[j])
      same, (p, q) = groups[i] == groups[j], (groups[i], groups[j])
      for kind, weight in enumerate((weights[p] * weights[q], same * weights[p], (not same) * weights[p] * weights[q])):
        sums[kind] += weight * above, weight
  return sums[:, 0] / sums[:, 1]


@pytest.mark.parametrize("seed", range(4))
def test_auc_is_the_share_of_pairs(seed):
  scores, right, groups = some_rows(seed)
  draws = statistics.resample(7, resamples=40, seed=seed)
  found = statistics.auc_intervals(scores, right, groups, draws)
  expected = brute_force(scores, right, groups, np.ones(7))
  np.testing.assert_allclose([found[name].value for name in ("all", "within", "between")], expected, rtol=1e-12)
  assert found["all"].value == pytest.approx(auc(scores, right))
  assert found["within"].value == pytest.approx(group_auc(scores.reshape(7, 6), right.reshape(7, 6)))
  resampled = np.array([brute_force(scores, right, groups, weights) for weights in draws])
  for kind, name in enumerate(("all", "within", "between")):
    ends = np.nanquantile(resampled[:, kind], [0.025, 0.975])
    np.testing.assert_allclose([found[name].low, found[name].high], ends, rtol=1e-12)


def test_an_auc_needs_both_kinds():
  draws = statistics.resample(2, 10)
  scores, groups = np.array([0.1, 0.2, 0.3]), np.array([0, 0, 1])
  found = statistics.auc_intervals(scores, np.ones(3, bool), groups, draws)
  assert found == {"all": None, "within": None, "between": None}
  found = statistics.auc_intervals(scores, np.array([True, True, False]), groups, draws)
  assert found["within"] is None
  assert found["between"].value == found["all"].value == 0
  assert found["all"].groups == 2


def test_the_interval_of_a_mean_is_that_of_a_cluster_bootstrap():
  rng = np.random.default_rng(0)
  groups = np.repeat(np.arange(200), 3)
  values = rng.normal(size=200)[groups] + 0.1 * rng.normal(size=600)
  found = statistics.mean_interval(values, groups, statistics.resample(200, 4000))
  assert found.value == pytest.approx(values.mean())
  spread = values.reshape(200, 3).mean(axis=1).std() / np.sqrt(200)  # normal, as the bootstrap is in the limit
  np.testing.assert_allclose([found.low, found.high], found.value + 1.96 * np.array([-spread, spread]), atol=0.02)
  assert found.groups == 200


def test_means_leave_out_what_is_not_finite():
  values, groups = np.array([1.0, np.nan, 3.0, np.inf]), np.array([0, 0, 1, 2])
  found = statistics.mean_interval(values, groups, statistics.resample(3, 100))
  assert (found.value, found.groups) == (2.0, 2)
  assert statistics.mean_interval(np.array([np.nan]), np.array([0]), statistics.resample(1, 10)) is None


def test_no_groups_at_all():
  none, groups = np.zeros(0), np.zeros(0, int)
  draws = statistics.resample(0, 10)
  assert statistics.mean_interval(none, groups, draws) is None
  assert statistics.correlation_within(none, none, groups, draws) is None
  assert statistics.auc_intervals(none, none.astype(bool), groups, draws)["all"] is None


@pytest.mark.parametrize("seed", range(3))
def test_correlation_is_that_of_what_groups_leave(seed):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(6, 5)) + 10 * rng.normal(size=(6, 1))
  y = 0.5 * x + rng.normal(size=(6, 5)) - 20 * rng.normal(size=(6, 1))
  groups, draws = np.repeat(np.arange(6), 5), statistics.resample(6, 50, seed)
  found = statistics.correlation_within(x.ravel(), y.ravel(), groups, draws)
  assert found.value == pytest.approx(within_group_correlation(x, y), rel=1e-12)
  # In a resample each copy of a group is centred by itself, which gives what the group gave.
  resampled = [within_group_correlation(*(np.repeat(z, weights, axis=0) for z in (x, y))) for weights in draws]
  np.testing.assert_allclose([found.low, found.high], np.quantile(resampled, [0.025, 0.975]), rtol=1e-9)


def test_what_does_not_vary_within_groups_has_no_correlation():
  groups = np.array([0, 0, 1, 1])
  steady = np.array([0.1, 0.1, 0.7, 0.7])
  assert statistics.correlation_within(steady, np.arange(4.0), groups, statistics.resample(2, 10)) is None


def test_mutual_information_of_the_paper_s_estimator():
  own = np.array([0, 0, 1, 1])
  information, retrieval = statistics.mutual_information(RAGEN, own, np.eye(2, dtype=bool))
  assert information == pytest.approx(0.499017091099997, abs=1e-14)
  assert retrieval == 1
  assert statistics.information_terms(RAGEN, own).mean() == pytest.approx(information, abs=1e-15)


def test_mutual_information_between_nothing_and_everything():
  own, apart = np.arange(5), np.eye(5, dtype=bool)
  assert statistics.mutual_information(np.full((5, 5), -40.0), own, apart)[0] == pytest.approx(0, abs=1e-14)
  told = np.where(apart, -3.0, -2000.0)  # whose exponentials are 0
  information, retrieval = statistics.mutual_information(told, own, apart)
  assert (information, retrieval) == (pytest.approx(np.log(5), abs=1e-12), 1)
  assert statistics.mutual_information(-told, own, apart)[1] == 0


def test_the_same_prompt_twice_is_retrieved_by_either():
  logps = np.array([[-1.0, -1.0, -9.0], [-9.0, -9.0, -1.0], [-2.0, -1.0, -9.0]])
  own = np.array([1, 2, 0])
  equal = np.array([[True, True, False], [True, True, False], [False, False, True]])
  assert statistics.mutual_information(logps, own, equal)[1] == 1
  assert statistics.mutual_information(logps, own, np.eye(3, dtype=bool))[1] == pytest.approx(1 / 3)


@pytest.mark.parametrize("values", [[1, 2, 3, 4, 5, 6, 7], [3, 3, 3, 3], [1, 1, 1, 9], [5]])
def test_terciles_hold_every_value_once(values):
  parts = statistics.terciles(np.array(values, float))
  inside = [sum(low <= value <= high for low, high in parts) for value in values]
  assert inside == [1] * len(values)
  assert len(parts) == min(3, len(set(values)))
