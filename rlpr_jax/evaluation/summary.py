"""Figures, tables and a picture of graded samples."""

import itertools
import pathlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rlpr_jax.evaluation import statistics
from rlpr_jax.evaluation.benchmarks import Question
from rlpr_jax.evaluation.responses import Response
from rlpr_jax.grading.graders import Grade
from rlpr_jax.judging.judge import Verdict

Json = dict[str, Any]
MOST_MISSING = 0.05  # share of the samples without a response, or a verdict, beyond which there is no accuracy


class Sample(NamedTuple):
  """A response with its grades."""

  response: Response
  grade: Grade
  verdict: Verdict | None  # None: the judge was not asked


class Graded(NamedTuple):
  """All samples of a model on a benchmark, of one mode."""

  model: str
  benchmark: str
  mode: str  # sampled | greedy
  questions: Sequence[Question]
  samples: Sequence[Sequence[Sample]]  # [Q][K]
  judged: bool  # whether a judge looks at this benchmark

  @property
  def rule(self) -> np.ndarray:
    """[Q, K] 1 right, 0 wrong, by rule; NaN throughout where too many were refused to say anything."""
    return self._known(np.array([[float(sample.grade.right) for sample in row] for row in self.samples]))

  @property
  def judge(self) -> np.ndarray:
    """[Q, K] the same by the judge, where it was asked, else by rule; NaN: unjudged, too."""
    return self._known(np.array([[_final(sample) for sample in row] for row in self.samples]))

  def _known(self, right: np.ndarray) -> np.ndarray:
    refused = np.array([[sample.response.refused for sample in row] for row in self.samples])
    return np.full_like(right, np.nan) if refused.mean() > MOST_MISSING else right

  @property
  def final(self) -> np.ndarray:
    """[Q, K] by the judge where there is one that left next to nothing unjudged."""
    return self.judge if self.judged and np.isnan(self.judge).mean() <= MOST_MISSING else self.rule


def _final(sample: Sample) -> float:
  if sample.verdict is None:
    return float(sample.grade.right)
  return np.nan if sample.verdict.right is None else float(sample.verdict.right)


def summarize(everything: Sequence[Graded], resamples: int, seed: int) -> Json:
  """All figures. Accuracies are shares, 0 to 1; intervals are 95% bootstrap intervals over questions.

  >>> summarize([], resamples=100, seed=0)
  {'models': {}, 'averages': {}, 'differences': []}
  """
  models: Json = {}
  for graded in everything:
    figures = _figures(graded, resamples, seed)
    models.setdefault(graded.model, {}).setdefault(graded.benchmark, {})[graded.mode] = figures
  names = list(models)
  return {
    "models": models,
    "averages": {name: _average(models[name]) for name in names},
    "differences": [
      difference for name in names[1:] for difference in _differences(everything, names[0], name, resamples, seed=seed)
    ],
  }


def _figures(graded: Graded, resamples: int, seed: int) -> Json:
  flat = [sample for row in graded.samples for sample in row]
  samples, answered = len(graded.samples[0]), [sample.response for sample in flat if not sample.response.refused]
  figures: Json = {
    "questions": len(graded.questions),
    "samples": samples,
    "rule": _accuracy(graded, graded.rule, resamples, seed),
    "cut_off": _or_none(_nanmean(np.array([not response.finished for response in answered], np.float64))),
    "refused": len(flat) - len(answered),
    "tokens": _or_none(_nanmean(np.array([response.tokens for response in answered], np.float64))),
    "found_by": dict(Counter(sample.grade.path for sample in flat).most_common()),
  }
  if graded.judged:
    figures["unjudged"] = sum(sample.verdict is not None and sample.verdict.right is None for sample in flat)
    figures["judge"] = _by_judge(graded, resamples, seed)
  kinds = [kind for kind in ("rule", "judge") if figures.get(kind, {}).get("avg") is not None]
  by_category = defaultdict(list)
  for i, question in enumerate(graded.questions):
    by_category[question.category].append(i)
  figures["categories"] = {
    name: {"questions": len(rows)} | {kind: _mean(getattr(graded, kind)[rows]) for kind in kinds}
    for name, rows in sorted(by_category.items())
  }
  return figures


def _by_judge(graded: Graded, resamples: int, seed: int) -> Json:
  """The judge's figures, and between which accuracies they would be whatever it had said of what it left unjudged.

  It is asked about what the rule calls wrong, so what is left out is not left out at random: the figures are None where
  it is more than a few.
  """
  right = graded.judge
  figures = _accuracy(graded, right, resamples, seed)
  if np.isnan(right).mean() > MOST_MISSING:
    figures = {"avg": None, "low": None, "high": None}
  figures["bounds"] = [_mean(np.nan_to_num(right, nan=value)) for value in (0.0, 1.0)]
  return figures


def _accuracy(graded: Graded, right: np.ndarray, resamples: int, seed: int) -> Json:
  each, samples = statistics.mean_at_k(right), right.shape[1]
  low, high = statistics.bootstrap_interval(each, resamples=resamples, seed=seed)
  figures = {"avg": _mean(right), "low": _or_none(low), "high": _or_none(high)}
  if samples > 1:
    powers = [2**i for i in range(1, samples.bit_length()) if 2**i < samples]
    figures["pass"] = {
      str(k): _or_none(_nanmean(statistics.pass_at_k(right, k))) for k in sorted({1, *powers, samples})
    }
    answers = [[sample.grade.answer for sample in row] for row in graded.samples]
    figures["majority"] = _or_none(_nanmean(statistics.majority_at_k(answers, right)))
  return figures


def _mean(right: np.ndarray) -> float | None:
  return _or_none(_nanmean(statistics.mean_at_k(right)))


def _nanmean(values: np.ndarray) -> float:
  known = values[~np.isnan(values)]
  return float(known.mean()) if known.size else np.nan


def _or_none(value: float) -> float | None:
  return None if np.isnan(value) else float(value)  # JSON has no NaN


def _average(benchmarks: Json) -> Json:
  """The mean over benchmarks of each mode: by rule; by the judge on those it looks at, and by rule on the others."""
  modes = list(dict.fromkeys(mode for by_mode in benchmarks.values() for mode in by_mode))
  averages = {}
  for mode in modes:
    of_mode = [by_mode[mode] for by_mode in benchmarks.values() if mode in by_mode]
    rule = [figures["rule"]["avg"] for figures in of_mode]
    final = [figures.get("judge", figures["rule"])["avg"] for figures in of_mode]
    averages[mode] = {
      "benchmarks": len(of_mode),
      "rule": None if None in rule else float(np.mean(rule)),
      "judge": None if None in final or not any("judge" in figures for figures in of_mode) else float(np.mean(final)),
    }
  return averages


def _differences(everything: Sequence[Graded], base: str, other: str, resamples: int, seed: int) -> list[Json]:
  """`other` minus `base` on the questions of each benchmark and mode."""
  by_key = {(graded.model, graded.benchmark, graded.mode): graded for graded in everything}
  rows = []
  for (model, benchmark, mode), ours in by_key.items():
    theirs = by_key.get((base, benchmark, mode))
    if model != other or theirs is None:
      continue
    pair = (statistics.mean_at_k(graded.final) for graded in (ours, theirs))
    difference = statistics.paired_difference(*pair, resamples=resamples, seed=seed)
    values = {name: _or_none(value) for name, value in difference._asdict().items()}
    rows.append({"model": other, "base": base, "benchmark": benchmark, "mode": mode} | values)
  return rows


# --- Markdown ---


_COLUMNS = (
  "benchmark",
  "mode",
  "questions",
  "k",
  "Avg@k by rule",
  "Avg@k by judge",
  "pass@k",
  "majority@k",
  "unjudged",
  "refused",
  "cut off",
  "tokens",
)


def to_markdown(summary: Json, notes: Sequence[str]) -> str:
  """The page: both graders side by side, differences, categories, how answers were found.

  >>> to_markdown({"models": {}, "averages": {}, "differences": []}, notes=["No models."]).splitlines()[:3]
  ['# Evaluation', '', 'No models.']
  """
  picture = "![Accuracy of each model on each benchmark](summary.png)"
  parts = ["# Evaluation", *notes, picture, *accuracy_tables(summary, "##")]
  for model, benchmarks in summary["models"].items():
    for benchmark, by_mode in benchmarks.items():
      figures = next(iter(by_mode.values()))
      path_counts = ", ".join(f"{path} {count}" for path, count in figures["found_by"].items())
      rows = [
        [name, row["questions"], percent(row.get("rule")), percent(row.get("judge"))]
        for name, row in figures["categories"].items()
      ]
      parts += [f"### {model}, {benchmark}", f"Answers were found by: {path_counts}."]
      if len(rows) > 1:
        parts.append(_table(["category", "questions", "by rule", "by judge"], rows))
  return "\n\n".join(parts) + "\n"


def accuracy_tables(summary: Json, heading: str) -> list[str]:
  """Both graders side by side for each model, what the figures are, and the differences between models, in Markdown.

  Args:
    heading: begins headings, such as "##".

  >>> accuracy_tables({"models": {}, "averages": {}, "differences": []}, "##")[0][:43]
  'Intervals are 95% bootstrap intervals over '
  """
  parts = []
  for model, benchmarks in summary["models"].items():
    rows = [
      _row(benchmark, mode, figures) for benchmark, by_mode in benchmarks.items() for mode, figures in by_mode.items()
    ]
    for mode, average in summary["averages"][model].items():
      if average["benchmarks"] > 1:
        rows.append(["mean of the benchmarks", mode, "", "", percent(average["rule"]), percent(average["judge"])])
    parts += [f"{heading} {model}", _table(_COLUMNS, rows)]
  parts.append(
    "Intervals are 95% bootstrap intervals over questions. pass@k and majority@k are by the judge where there is one."
    " By judge: where the judge was asked, its verdict; elsewhere the rule's. What it left unjudged is left out; a"
    " sample that was refused, its prompt being too long or the endpoint not taking it, is wrong. Where either is more"
    f" than {MOST_MISSING:.0%}, there is no figure; what an endpoint refused, the same command asks again."
  )
  if summary["differences"]:
    rows = [
      [row["benchmark"], row["mode"], f"{row['model']} - {row['base']}", _points(row), _or_dash(row["p"], ".4f")]
      for row in summary["differences"]
    ]
    parts += [
      f"{heading} Differences on the same questions",
      _table(["benchmark", "mode", "models", "points", "p"], rows),
    ]
  return parts


def _row(benchmark: str, mode: str, figures: Json) -> list[Any]:
  final = figures.get("judge", figures["rule"])
  return [
    benchmark,
    mode,
    figures["questions"],
    figures["samples"],
    _interval(figures["rule"]),
    _judged(figures) if "judge" in figures else "-",
    percent(final["pass"][str(figures["samples"])]) if "pass" in final else "-",
    percent(final["majority"]) if "majority" in final else "-",
    figures.get("unjudged", "-"),
    figures["refused"],
    percent(figures["cut_off"]),
    _or_dash(figures["tokens"], ".0f"),
  ]


def _judged(figures: Json) -> str:
  text, (low, high) = _interval(figures["judge"]), figures["judge"]["bounds"]
  return f"{text}, {percent(low)} to {percent(high)} with the unjudged" if figures["unjudged"] else text


def _interval(accuracy: Json) -> str:
  if accuracy["avg"] is None:
    return "-"
  return f"{percent(accuracy['avg'])} [{100 * accuracy['low']:.1f}, {100 * accuracy['high']:.1f}]"


def _points(row: Json) -> str:
  if row["difference"] is None:
    return "-"
  return f"{100 * row['difference']:+.1f} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"


def percent(share: float | None) -> str:
  """A share as a figure of a table.

  >>> percent(0.4375), percent(None)
  ('43.8%', '-')
  """
  return "-" if share is None else f"{100 * share:.1f}%"


def _or_dash(value: float | None, form: str) -> str:
  return "-" if value is None else format(value, form)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  padded = [[*row, *[""] * (len(head) - len(row))] for row in rows]
  lines = [head, ["---"] * len(head), *padded]
  return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


# --- the picture ---


def draw(summary: Json, path: pathlib.Path) -> None:
  """Accuracy of each model on each benchmark, by both graders, with intervals. PNG."""
  import matplotlib  # takes a second, and nothing else here needs it
  from matplotlib import pyplot as plt

  models = summary["models"]
  benchmarks = list(dict.fromkeys(itertools.chain.from_iterable(models.values())))
  with matplotlib.rc_context({"font.size": 9}):
    figure, axes = plt.subplots(figsize=(1.2 + 1.3 * len(benchmarks), 3.2), layout="constrained")
    width = 0.8 / len(models)
    for i, (model, by_benchmark) in enumerate(models.items()):
      for kind, marker in (("rule", "o"), ("judge", "s")):
        points = []
        for place, benchmark in enumerate(benchmarks):
          for mode, figures in by_benchmark.get(benchmark, {}).items():
            accuracy = figures.get(kind)
            if mode == "sampled" and accuracy and accuracy["avg"] is not None:
              shift = (i - (len(models) - 1) / 2) * width + (0.08 * width if kind == "judge" else -0.08 * width)
              points.append((place + shift, *(100 * accuracy[name] for name in ("avg", "low", "high"))))
        if points:
          x, y, low, high = map(np.array, zip(*points, strict=True))
          axes.errorbar(
            x, y, np.maximum([y - low, high - y], 0), fmt=marker, color=f"C{i}", capsize=2, label=f"{model}, by {kind}"
          )
    axes.set(xticks=range(len(benchmarks)), xticklabels=benchmarks, ylabel="Avg@k (%)", ylim=(0, 100))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, format="png", dpi=150)
    plt.close(figure)
