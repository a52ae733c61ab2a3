"""Figures with intervals: how well scores tell right from wrong, what goes with them, what reasoning says of prompts.

Responses to one prompt are alike, so prompts are resampled and never responses: an interval says how far a figure would
move with other prompts of the same kind. Everything is numpy and float64. R resamples, P groups, N responses or rows.
"""

from typing import NamedTuple

import numpy as np

_ENDS = (0.025, 0.975)  # quantiles, of 95% intervals


class Interval(NamedTuple):
  """A figure and its 95% percentile bootstrap interval (Efron 1979)."""

  value: float
  low: float
  high: float
  groups: int  # that say something about it


class Pairs(NamedTuple):
  """How often right responses score above wrong ones, by the groups of both."""

  above: np.ndarray  # float64[P, P] pairs of a right response of group p and a wrong one of q; a tie counts half
  total: np.ndarray  # float64[P, P] all such pairs


def resample(count: int, resamples: int = 1000, seed: int = 0) -> np.ndarray:
  """int64[R, count]: how often each of `count` groups is drawn, in draws of as many with replacement.

  >>> resample(5, resamples=2).sum(axis=1).tolist()
  [5, 5]
  """
  if not count:
    return np.zeros((resamples, 0), int)
  return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)


def ratio_interval(numerators: np.ndarray, denominators: np.ndarray, draws: np.ndarray) -> Interval | None:
  """A ratio of sums over groups: a mean where these are sums and counts of the groups' responses.

  Args:
    numerators, denominators: [P].
    draws: [R, P] of `resample`.

  Returns:
    None where the denominators are all 0.

  >>> ratio_interval(np.array([1.0, 3.0]), np.array([2.0, 2.0]), resample(2)).value
  1.0
  """
  if not denominators.sum():
    return None
  resampled = _quotients(draws @ numerators, draws @ denominators)
  return _interval(numerators.sum() / denominators.sum(), resampled, denominators > 0)


def mean_interval(values: np.ndarray, groups: np.ndarray, draws: np.ndarray) -> Interval | None:
  """Mean over responses.

  Args:
    values: [N]; those that are not finite are left out.
    groups: int[N], from 0 to P - 1.
    draws: [R, P] of `resample`.

  >>> mean_interval(np.array([0.0, 1.0, np.nan]), np.array([0, 1, 1]), resample(2)).value
  0.5
  """
  finite = np.isfinite(values)
  sums, counts = (
    np.bincount(groups[finite], weights, draws.shape[1]) for weights in (values[finite], np.ones(finite.sum()))
  )
  return ratio_interval(sums, counts, draws)


def count_pairs(scores: np.ndarray, right: np.ndarray, groups: np.ndarray, num_groups: int) -> Pairs:
  """Counts the pairs of a right and a wrong response, of which an AUC is the share that the score orders.

  Args:
    scores: [N]; responses whose score is not finite are left out.
    right: bool[N].
    groups: int[N], from 0 to num_groups - 1.

  >>> count_pairs(np.array([0.9, 0.4, 0.5]), np.array([True, True, False]), np.array([0, 1, 1]), 2).above.tolist()
  [[0.0, 1.0], [0.0, 0.0]]
  """
  finite = np.isfinite(scores)
  good, bad = finite & right.astype(bool), finite & ~right.astype(bool)
  above, total = np.zeros((2, num_groups, num_groups))
  num_good = np.bincount(groups[good], minlength=num_groups)
  for q in np.unique(groups[bad]):
    wrong = np.sort(scores[bad & (groups == q)])
    below, up_to = (np.searchsorted(wrong, scores[good], side) for side in ("left", "right"))
    above[:, q] = np.bincount(groups[good], (below + up_to) / 2, num_groups)
    total[:, q] = num_good * wrong.size
  return Pairs(above, total)


def auc_intervals(
  scores: np.ndarray, right: np.ndarray, groups: np.ndarray, draws: np.ndarray
) -> dict[str, Interval | None]:
  """Area under the ROC curve of a score: how often a right response scores above a wrong one, a tie counting half.

  Args:
    scores, right, groups: as for `count_pairs`.
    draws: [R, P] of `resample`.

  Returns:
    `all` pairs; those `within` a group, which are all that an advantage compares; those `between` groups, on which a
    filter or a threshold over prompts would depend. None where there is no pair.

  >>> found = auc_intervals(np.array([0.9, 0.4, 0.5]), np.array([True, True, False]), np.array([0, 1, 1]), resample(2))
  >>> found["all"].value, found["within"].value, found["between"].value
  (0.5, 0.0, 1.0)
  """
  pairs = count_pairs(scores, right, groups, draws.shape[1])
  twice = draws.astype(np.float64) ** 2
  # Of each resample the pairs (above, total): all, of each group by itself, and of each group with all of its copies.
  everything = [np.sum((draws @ x) * draws, axis=1) for x in pairs]
  inside = [draws @ np.diagonal(x) for x in pairs]
  copies = [twice @ np.diagonal(x) for x in pairs]
  sums, traces = [x.sum() for x in pairs], [np.trace(x) for x in pairs]
  some = np.any(pairs.total + pairs.total.T > 0, axis=1)

  def figure(values: list[float], resampled: list[np.ndarray], groups: np.ndarray) -> Interval | None:
    above, total = values
    return _interval(above / total, _quotients(*resampled), groups) if total else None

  return {
    "all": figure(sums, everything, some),
    "within": figure(traces, inside, np.diagonal(pairs.total) > 0),
    "between": figure(
      [x - y for x, y in zip(sums, traces, strict=True)],
      [x - y for x, y in zip(everything, copies, strict=True)],
      some,
    ),
  }


def correlation_within(x: np.ndarray, y: np.ndarray, groups: np.ndarray, draws: np.ndarray) -> Interval | None:
  """Pearson correlation over responses, after each group's means are taken off.

  Args:
    x, y: [N]; responses where either is not finite are left out.
    groups, draws: as for `mean_interval`.

  Returns:
    None where one of them does not vary within any group.

  >>> x, y = np.array([0.0, 1.0, 5.0, 7.0]), np.array([3.0, 2.0, 9.0, 7.0])
  >>> correlation_within(x, y, np.array([0, 0, 1, 1]), resample(2)).value
  -1.0
  """
  finite = np.isfinite(x) & np.isfinite(y)
  groups, num_groups = groups[finite], draws.shape[1]
  x, y = (center(values[finite], groups, num_groups) for values in (x, y))
  products, of_x, of_y = (np.bincount(groups, values, num_groups) for values in (x * y, x * x, y * y))
  if not of_x.sum() * of_y.sum():
    return None
  norms = np.sqrt((draws @ of_x) * (draws @ of_y))
  value = products.sum() / np.sqrt(of_x.sum() * of_y.sum())
  return _interval(value, _quotients(draws @ products, norms), (of_x > 0) & (of_y > 0))


def center(values: np.ndarray, groups: np.ndarray, num_groups: int) -> np.ndarray:
  """Takes its group's mean off each of some finite values [N]; what is left of equal ones is 0.

  >>> center(np.array([1.0, 3.0, 5.0]), np.array([0, 0, 1]), num_groups=2).tolist()
  [-1.0, 1.0, 0.0]
  """
  values = values.astype(np.float64)
  counts = np.bincount(groups, minlength=num_groups)
  off = values - (np.bincount(groups, values, num_groups) / np.maximum(counts, 1))[groups]
  size = np.abs(values).max(initial=0.0)
  return np.where(np.abs(off) <= 1e-12 * size, 0.0, off)  # rounding of the mean is no variation


def mutual_information(logps: np.ndarray, own: np.ndarray, equal_prompts: np.ndarray) -> tuple[float, float]:
  """How much reasoning says about its prompt: 0 where it would be as probable behind any other one.

  MI = mean over i of L[i, own_i] - log(1/N sum_j exp L[i, j]), at most log N (RAGEN-2, arXiv 2604.06268). A policy
  whose reasoning has become a template has a low one, while its entropy may be as before.

  Args:
    logps: [R, N] log-probability of each reasoning behind each prompt.
    own: int[R] column of the prompt that it was written for.
    equal_prompts: bool[N, N] which columns are the same prompt, each with itself.

  Returns:
    MI in nats, and retrieval: the share of reasoning that is most probable behind its own prompt.

  >>> logps = np.array([[-1, -3], [-2, -4], [-5, -2], [-3, -2.5]])
  >>> mutual_information(logps, np.array([0, 0, 1, 1]), np.eye(2, dtype=bool))
  (0.4990, 1.0)
  """
  terms = information_terms(logps, own)
  return float(np.mean(terms)), float(np.mean(equal_prompts[own, np.argmax(logps, axis=1)]))


def information_terms(logps: np.ndarray, own: np.ndarray) -> np.ndarray:
  """[R] what each reasoning contributes to the mean that `mutual_information` is; arguments as there.

  >>> information_terms(np.array([[0.0, 0.0]]), np.array([1])).tolist()
  [0.0]
  """
  logps = np.asarray(logps, np.float64)
  largest = logps.max(axis=1)
  marginal = largest + np.log(np.mean(np.exp(logps - largest[:, None]), axis=1))
  return logps[np.arange(len(logps)), own] - marginal


def terciles(values: np.ndarray) -> list[tuple[float, float]]:
  """Splits finite values [N] in three parts of about as many; in fewer where many are equal.

  Returns:
    (lowest, highest) of each part that holds a value.

  >>> terciles(np.array([1, 2, 3, 4, 5, 60]))
  [(1.0, 2.0), (3.0, 4.0), (5.0, 60.0)]
  """
  if not values.size:
    return []
  edges = np.quantile(values, [1 / 3, 2 / 3], method="lower")
  parts = np.searchsorted(edges, values, "left")
  inside = [values[parts == part] for part in range(3)]
  return [(float(part.min()), float(part.max())) for part in inside if part.size]


def _quotients(numerators: np.ndarray, denominators: np.ndarray) -> np.ndarray:
  """NaN where a resample has nothing to divide by."""
  return np.divide(numerators, denominators, out=np.full(len(numerators), np.nan), where=denominators > 0)


def _interval(value: float, resampled: np.ndarray, known_of: np.ndarray) -> Interval:
  """`known_of`: bool[P] the groups that say something about it."""
  known = resampled[np.isfinite(resampled)]
  low, high = np.quantile(known, _ENDS) if known.size else (np.nan, np.nan)
  return Interval(float(value), float(low), float(high), int(np.sum(known_of)))
