"""Accuracy over questions and samples, and how sure one may be of it.

Samples are an array [questions, samples]: 1 right, 0 wrong, NaN not judged. What was not judged is left out of its
question; a question of which too little was judged is NaN, and left out of means and intervals. Everything is numpy
and float64.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_DRAWS = 2**22  # numbers held at once while resampling
_ENDS = (0.025, 0.975)  # quantiles, of 95% intervals


class Difference(NamedTuple):
  """How much better `a` is than `b` on the same questions."""

  difference: float
  low: float
  high: float
  p: float  # two-sided, of no difference


def mean_at_k(right: np.ndarray) -> np.ndarray:
  """Share of right samples of each question (Avg@k).

  Args:
    right: [Q, K], 1, 0 or NaN.

  Returns:
    [Q]; its `np.nanmean` is the benchmark's figure.

  >>> mean_at_k(np.array([[1, 0, 1, np.nan], [0, 0, 0, 0]])).tolist()
  [0.6666666666666666, 0.0]
  """
  right = np.asarray(right, np.float64)
  judged = np.sum(~np.isnan(right), axis=1)
  return np.where(judged > 0, np.nansum(right, axis=1) / np.maximum(judged, 1), np.nan)


def pass_at_k(right: np.ndarray, k: int) -> np.ndarray:
  """Probability that at least one of `k` samples of a question is right, without bias.

  1 - C(n - c, k) / C(n, k), with n judged samples of which c are right (Chen et al. 2021, arXiv 2107.03374).

  Args:
    right: [Q, K], 1, 0 or NaN.
    k: samples one may take, at least 1.

  Returns:
    [Q]; NaN where fewer than k samples were judged.

  >>> pass_at_k(np.array([[1, 0, 0, 0]]), k=2).tolist()
  [0.5]
  """
  right = np.asarray(right, np.float64)
  n, c = np.sum(~np.isnan(right), axis=1), np.nansum(right, axis=1)
  # As a product of k quotients: the binomials themselves overflow. A quotient of 0 says that too few are wrong.
  drawn = np.arange(k)
  wrong_remaining, remaining = (n - c)[:, None] - drawn, n[:, None] - drawn
  all_wrong = np.prod(np.maximum(wrong_remaining, 0) / np.maximum(remaining, 1), axis=1)
  return np.where(n >= k, 1 - all_wrong, np.nan)


def majority_at_k(answers: Sequence[Sequence[str | None]], right: np.ndarray) -> np.ndarray:
  """The grade of each question's most frequent answer (Maj@k).

  Answers are the same if they are so but for case and runs of whitespace; of two as frequent ones the first seen wins.
  A sample without an answer has no vote.

  Args:
    answers: [Q][K], None where a sample has none.
    right: [Q, K], 1, 0 or NaN.

  Returns:
    [Q]; 0 where no sample has an answer, NaN where the winner was not judged.

  >>> majority_at_k([["42", "42", "41"]], np.array([[1, 1, 0]])).tolist()
  [1.0]
  """
  right = np.asarray(right, np.float64)
  grades = np.zeros(len(right))
  for question, texts in enumerate(answers):
    plain = [None if text is None else " ".join(text.lower().split()) for text in texts]
    votes = Counter(text for text in plain if text)
    if votes:
      winner = votes.most_common(1)[0][0]  # of equal counts the first that was counted
      judged = [grade for text, grade in zip(plain, right[question], strict=True) if text == winner and grade == grade]
      grades[question] = judged[0] if judged else np.nan
  return grades


def bootstrap_interval(values: np.ndarray, resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
  """95% percentile bootstrap interval of the mean over questions (Efron 1979).

  It says how much the mean would move with other questions of the same kind. Values that are all the same give an
  interval without width.

  Args:
    values: [Q], one a question; NaN are left out.

  Returns:
    (low, high); NaN twice without values.

  >>> low, high = bootstrap_interval(np.array([0.0, 1.0, 1.0, 1.0]))
  >>> bool(low < 0.75 < high)
  True
  """
  values = _known(values)
  if not len(values):
    return np.nan, np.nan
  low, high = np.quantile(_resampled_means(values, resamples, seed), _ENDS)
  return float(low), float(high)


def paired_difference(a: np.ndarray, b: np.ndarray, resamples: int = 10_000, seed: int = 0) -> Difference:
  """Mean of `a - b` over questions, its 95% bootstrap interval, and the probability of one as large by chance.

  p = (1 + #{|d* - d| >= |d|}) / (1 + resamples), d* the mean of resampled differences (Davison and Hinkley 1997).

  Args:
    a: [Q], one value a question.
    b: [Q], of the same questions in the same order. A question that is NaN in either is left out.

  Returns:
    the difference; NaN throughout without questions.

  >>> paired_difference(np.array([1.0, 0.75]), np.array([0.5, 0.25])).difference
  0.5
  """
  differences = _known(np.asarray(a, np.float64) - np.asarray(b, np.float64))
  if not len(differences):
    return Difference(np.nan, np.nan, np.nan, np.nan)
  mean = float(np.mean(differences))
  means = _resampled_means(differences, resamples, seed)
  low, high = np.quantile(means, _ENDS)
  # What is equal but for rounding counts as equal.
  extreme = np.sum(np.abs(means - mean) >= abs(mean) - 1e-12)
  return Difference(mean, float(low), float(high), float((1 + extreme) / (1 + resamples)))


def _known(values: np.ndarray) -> np.ndarray:
  values = np.asarray(values, np.float64)
  return values[~np.isnan(values)]


def _resampled_means(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
  """Means of `resamples` draws of as many values, with replacement."""
  rng, rows = np.random.default_rng(seed), max(_DRAWS // len(values), 1)
  parts = [
    values[rng.integers(len(values), size=(min(rows, resamples - start), len(values)))].mean(axis=1)
    for start in range(0, resamples, rows)
  ]
  return np.concatenate(parts)
