"""What rows say of the rewards in them: whether they tell right from wrong, and what goes with them."""

import collections
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rlpr_jax import splicing
from rlpr_jax.diagnosis import statistics, texts
from rlpr_jax.diagnosis.rows import Row, number_groups
from rlpr_jax.diagnosis.statistics import Interval
from rlpr_jax.training.reward import first_reference
from rlpr_jax.types import Evidence

_PARTS = ("total", "reference", "debiased")  # of a reward, which are compared with a verdict
_WORDS = 10  # shown of each end
_FEWEST = 5  # groups in which a word must be in some responses and not in others


class Graded(NamedTuple):
  """Responses and what is known of each, N of them in P groups."""

  rows: list[Row]
  right: np.ndarray  # bool[N]
  groups: np.ndarray  # int[N] from 0 to P - 1
  draws: np.ndarray  # int[R, P] how often each group is in a resample

  def take(self, which: np.ndarray) -> "Graded":
    """Some of the responses, bool[N], of the same groups."""
    rows = [row for row, taken in zip(self.rows, which, strict=True) if taken]
    return Graded(rows, self.right[which], self.groups[which], self.draws)


def graded(rows: Sequence[Row], right: np.ndarray, seed: int) -> Graded:
  """Puts rows and their grades together, without those that were not judged.

  Args:
    right: [N] 1 right, 0 wrong, NaN not judged.
  """
  judged = [row for row, grade in zip(rows, right, strict=True) if np.isfinite(grade)]
  groups = number_groups(judged)
  draws = statistics.resample(int(groups.max(initial=-1)) + 1, seed=seed)
  return Graded(judged, right[np.isfinite(right)] > 0, groups, draws)


def scores(rows: Sequence[Row]) -> dict[str, np.ndarray]:
  """The rewards of rows by name, float64[N] each: the total, its likelihood parts, and each shadow; NaN: not there.

  >>> list(scores([{"reward_total": 0.6, "shadow_product": 0.2, "advantage": 1.0}]))
  ['total', 'shadow product']
  """
  names = {f"reward_{part}": part for part in _PARTS}
  names |= {key: f"shadow {key.removeprefix('shadow_')}" for row in rows for key in row if key.startswith("shadow_")}
  return {name: column(rows, key) for key, name in names.items() if any(key in row for row in rows)}


def column(rows: Sequence[Row], key: str) -> np.ndarray:
  """float64[N] of a field; NaN where it is missing or no number.

  >>> column([{"length": 3}, {}], "length").tolist()
  [3.0, nan]
  """
  values = (row.get(key) for row in rows)
  return np.array([value if isinstance(value, int | float) else np.nan for value in values], np.float64)


def compare_with_verdicts(found: Graded) -> dict[str, Any]:
  """AUC of each score against the verdicts, and of the total by source and by length.

  Returns:
    `scores`, `by_source`, `by_length`: by name {all, within, between}, as `statistics.auc_intervals` has them.
  """
  total = column(found.rows, "reward_total")

  def aucs(part: Graded, values: np.ndarray) -> dict[str, Interval | None]:
    return statistics.auc_intervals(values, part.right, part.groups, part.draws)

  sources = np.array([str(row.get("source") or "") for row in found.rows])
  lengths = column(found.rows, "length")
  parts = {
    "by_source": {source: sources == source for source in sorted(set(sources.tolist()))},
    "by_length": {
      f"{low:.0f} to {high:.0f} tokens": (lengths >= low) & (lengths <= high)
      for low, high in statistics.terciles(lengths[np.isfinite(lengths)])
    },
  }
  return {
    "responses": len(found.rows),
    "groups": found.draws.shape[1],
    "right": statistics.mean_interval(found.right.astype(np.float64), found.groups, found.draws),
    "scores": {name: aucs(found, values) for name, values in scores(found.rows).items()},
    **{
      name: {label: aucs(found.take(which), total[which]) for label, which in of_part.items()}
      for name, of_part in parts.items()
    },
  }


def accuracy(rows: Sequence[Row], right: np.ndarray, seed: int) -> dict[str, Interval | None]:
  """Share of right responses, `all` and of each source.

  Args:
    rows: with the number of their prompt as `row`, or one a prompt.
    right: [N], NaN where it is not known.
  """
  keys = [row.get("row", i) for i, row in enumerate(rows)]
  numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
  groups, draws = np.array([numbers[key] for key in keys], int), statistics.resample(len(numbers), seed=seed)
  sources = np.array([str(row.get("source") or "") for row in rows])
  values = {"all": right} | {
    source: np.where(sources == source, right, np.nan) for source in sorted(set(sources.tolist()))
  }
  return {name: statistics.mean_interval(value, groups, draws) for name, value in values.items()}


def likelihood(evidence: Evidence, seed: int) -> dict[str, Interval | None]:
  """How probable the first reference is, in nats: a token of it after the reasoning, one without, and all of it.

  `marginal` is the mean over prompts of log(1/G sum_g p(reference | reasoning g)), the likelihood of the reference with
  the reasoning summed out, as far as G samples tell; of scorable responses alone, as is `token`.
  """
  if evidence.logps.ndim == 4:
    evidence = first_reference(evidence)
  logps, mask, scorable = np.float64(evidence.logps), np.asarray(evidence.mask), np.asarray(evidence.scorable)
  num_prompts, samples = scorable.shape
  draws, prompts = statistics.resample(num_prompts, seed=seed), np.arange(num_prompts)
  sums, counts = np.where(mask, logps, 0.0).sum(axis=-1), mask.sum(axis=-1)
  known = np.isfinite(np.asarray(evidence.baseline_logps))
  without = np.where(known, evidence.baseline_logps, 0.0).sum(axis=-1)
  some, marginal = scorable.any(axis=1), np.full(num_prompts, np.nan)
  of_scorable = np.where(scorable, sums, -np.inf)[some]
  marginal[some] = np.logaddexp.reduce(of_scorable, axis=1) - np.log(scorable[some].sum(axis=1))
  return {
    "token": statistics.mean_interval(
      np.where(scorable, sums / np.maximum(counts, 1), np.nan).ravel(), np.repeat(prompts, samples), draws
    ),
    "token_without": statistics.mean_interval(
      np.where(known.any(axis=-1), without / np.maximum(known.sum(axis=-1), 1), np.nan), prompts, draws
    ),
    "marginal": statistics.mean_interval(marginal, prompts, draws),
  }


def preferences(found: Graded) -> dict[str, Any]:
  """What goes with the total reward within a group, and how the same goes with being right.

  Returns:
    `lengths`: by what is measured, {score or `right`: correlation}; `words`: of both ends, the most liked first,
    {word, reward, right, responses}, the correlations of their being in a response.
  """
  answers = [splicing.extract_answer(row["response"]) for row in found.rows]
  measures = {
    "tokens of the response": column(found.rows, "length"),
    "characters of the response": np.array([len(row["response"]) for row in found.rows], np.float64),
    "characters of the own answer": np.array([len(answer or "") for answer in answers], np.float64),
  }
  values = scores(found.rows) | {"right": found.right.astype(np.float64)}
  lengths = {
    name: {
      score: statistics.correlation_within(measure, value, found.groups, found.draws) for score, value in values.items()
    }
    for name, measure in measures.items()
  }
  return {"lengths": lengths, "words": liked_words(found)}


def liked_words(found: Graded) -> list[dict[str, Any]]:
  """The words that go most with the total reward within a group, and those that go most against it.

  Words that are in some and not in other responses of fewer than five groups are left out: chance would choose them.
  """
  found = found.take(np.isfinite(column(found.rows, "reward_total")))
  groups, num_groups = found.groups, found.draws.shape[1]
  total, right = column(found.rows, "reward_total"), found.right.astype(np.float64)
  inside = [texts.words(row["response"]) for row in found.rows]
  places: dict[str, list[int]] = collections.defaultdict(list)
  for i, of_response in enumerate(inside):
    for word in of_response:
      places[word].append(i)
  # Of 1 in the responses with a word and 0 in the others: a product with what is centred needs only the former.
  centred, sizes = statistics.center(total, groups, num_groups), np.bincount(groups, minlength=num_groups)
  strength = {}
  for word, responses in sorted(places.items()):
    with_word = np.bincount(groups[responses], minlength=num_groups)
    variation = with_word * (1 - with_word / np.maximum(sizes, 1))
    if np.sum(variation > 0) >= _FEWEST:
      strength[word] = centred[responses].sum() / np.sqrt(variation.sum())
  ordered = sorted(strength, key=lambda word: -strength[word])
  shown = ordered if len(ordered) <= 2 * _WORDS else ordered[:_WORDS] + ordered[-_WORDS:]
  table = []
  for word in shown:
    present = np.array([word in of_response for of_response in inside], np.float64)
    of_reward, of_right = (
      statistics.correlation_within(present, values, groups, found.draws) for values in (total, right)
    )
    table.append({"word": word, "reward": of_reward, "right": of_right, "responses": len(places[word])})
  return table


def choose(found: Graded, count: int = 2) -> list[int]:
  """Numbers of scorable responses to look at: wrong ones of the highest reward, right ones of the lowest, and so on.

  Of each of the four kinds `count`, of different groups.

  >>> rows = [{"step": 0, "row": i, "scorable": True, "reward_total": r} for i, r in enumerate([0.9, 0.2, 0.5])]
  >>> choose(graded(rows, np.array([0.0, 0.0, 1.0]), seed=0), count=1)
  [0, 2, 1]
  """
  total = column(found.rows, "reward_total")
  usable = np.array([bool(row.get("scorable")) for row in found.rows], bool) & np.isfinite(total)
  chosen: list[int] = []
  for right, sign in ((False, -1), (True, 1), (True, -1), (False, 1)):
    order = sorted(np.flatnonzero(usable & (found.right == right)).tolist(), key=lambda i: sign * total[i])
    groups, taken = set(), 0
    for i in order:
      if taken < count and i not in chosen and found.groups[i] not in groups:
        chosen.append(i)
        groups.add(found.groups[i])
        taken += 1
  return chosen
