"""How well a score tells right responses from wrong ones, and how alike two scores are."""

import numpy as np


def auc(scores: np.ndarray, right: np.ndarray) -> float | None:
  """Area under the ROC curve: how often a right response scores above a wrong one, ties half; None without both.

  Scores that are not finite are left out.

  >>> auc(np.array([0.9, 0.4, 0.5]), np.array([1, 1, 0]))
  0.5
  """
  finite, right = np.isfinite(scores), right.astype(bool)
  good, bad = scores[finite & right], np.sort(scores[finite & ~right])
  if not good.size or not bad.size:
    return None
  below, up_to = np.searchsorted(bad, good, "left"), np.searchsorted(bad, good, "right")
  return float(np.mean(below + up_to) / 2 / bad.size)


def group_auc(scores: np.ndarray, right: np.ndarray) -> float | None:
  """`auc` over the pairs within each group of [P, G] alone, which are all that an advantage compares.

  >>> group_auc(np.array([[0.9, 0.4], [0.1, 0.3]]), np.array([[1, 0], [1, 0]]))
  0.5
  """
  finite, right = np.isfinite(scores), right.astype(bool)
  pairs = (finite & right)[:, :, None] & (finite & ~right)[:, None, :]
  p, good, bad = np.nonzero(pairs)
  return float((np.sign(scores[p, good] - scores[p, bad]) + 1).mean() / 2) if p.size else None


def within_group_correlation(totals: np.ndarray, others: np.ndarray) -> float | None:
  """Pearson correlation of two rewards [P, G] after each group's means are taken off; None if one does not vary.

  >>> within_group_correlation(np.array([[0.0, 1.0], [5.0, 7.0]]), np.array([[3.0, 2.0], [9.0, 7.0]]))
  -1.0
  """
  totals, others = (x - x.mean(axis=1, keepdims=True) for x in (totals, others))
  norm = np.sqrt((totals**2).sum() * (others**2).sum())
  return float((totals * others).sum() / norm) if norm > 0 else None
