"""What is drawn of a run, by theme, and how a long curve is thinned and smoothed; the drawing is the pages' own."""

import dataclasses

import numpy as np

from rlpr_jax.report.records import EXACT, Run, Series
from rlpr_jax.runs import ACCURACY

POINTS = 400  # a curve is thinned to this many: more cannot be seen and makes the file large
SMOOTH_FROM = 12  # shorter curves are shown as they are


@dataclasses.dataclass(frozen=True)
class Panel:
  """One small chart."""

  title: str
  unit: str  # what the vertical axis counts
  lines: dict[str, str]  # metric -> its name in the legend
  stacked: bool = False
  whole: bool = False  # counts: ticks at whole numbers only


HELD_OUT = "Held-out questions"
THEMES: dict[str, tuple[Panel, ...]] = {
  HELD_OUT: (
    Panel("Accuracy", "share correct", {ACCURACY: "all domains", EXACT: "the reference's text"}),
    Panel("Format", "share of responses", {"held_out/format": "every tag once, in order"}),
  ),
  "Reward": (
    Panel("Total reward", "reward", {"reward/total": "mean of responses"}),
    Panel(
      "Probability of the reference",
      "probability",
      {
        "reward/reference": "after reasoning, r",
        "reward/baseline": "without, r'",
        "reward/debiased": "debiased",
      },
    ),
    Panel(
      "Spread within a group",
      "reward",
      {"reward/group_std": "standard deviation", "filter/threshold": "least to be kept"},
    ),
    Panel("Prompts", "prompts a step", {"filter/drawn": "drawn", "filter/kept": "kept"}, whole=True),
    Panel("Format term", "share of responses", {"reward/format": "well formed"}),
    Panel("Repetition", "reward", {"reward/repetition": "penalty"}),
  ),
  "Responses": (
    Panel("Length", "tokens a response", {"rollout/response_length": "mean"}),
    Panel("Own answers", "share of responses", {"answer/exact": "the reference's text", "answer/empty": "empty"}),
    Panel("Length of own answers", "times the reference's", {"answer/length": "characters"}),
    Panel("Ends", "share of responses", {"rollout/scorable": "scorable", "rollout/truncated": "cut at the limit"}),
  ),
  "Update": (
    Panel("Loss", "loss", {"update/loss": "clipped policy loss"}),
    Panel("Entropy", "nats a token", {"update/entropy": "mean"}),
    Panel("Gradient", "norm before clipping", {"update/grad_norm": "global norm"}),
    Panel("Policy change", "KL, nats a token", {"update/step_kl": "from before the step to after it"}),
    Panel("Clipped", "share of tokens", {"update/clip_fraction": "outside the clip range"}),
    Panel("Probability ratio", "new / old", {"update/ratio_mean": "mean", "update/ratio_worst": "farthest from 1"}),
  ),
  "Speed": (
    Panel(
      "Time of a step",
      "seconds",
      {
        "seconds/rollout": "rollout",
        "seconds/score": "score",
        "seconds/update": "update",
        "seconds/step": "other",
      },
      stacked=True,
    ),
    Panel(
      "Throughput",
      "tokens a second",
      {"tokens_per_second/rollout": "rollout", "tokens_per_second/update": "update"},
    ),
    Panel("Compilations", "programs", {"compilations": "in the step"}, whole=True),
  ),
}


def domain_panels(run: Run) -> tuple[Panel, Panel]:
  """Accuracy, and share of the answers with a reference's text, over steps, one line a domain.

  >>> run = Run("first", rows={0: {"held_out/accuracy/law": 0.5}}, config={}, rollouts=[], unreadable=0)
  >>> [panel.lines for panel in domain_panels(run)]
  [{'held_out/accuracy/law': 'law'}, {'held_out/exact/law': 'law'}]
  """
  accuracy, exact = ({f"{key}/{domain}": domain for domain in run.domains()} for key in (ACCURACY, EXACT))
  return Panel("Accuracy by domain", "share correct", accuracy), Panel("Exact by domain", "share of answers", exact)


def other_panels(run: Run, known: set[str]) -> tuple[Panel, ...]:
  """A panel for each metric that no theme names, so that nothing written stays unseen.

  >>> run = Run("first", rows={0: {"mine": 0.5}}, config={}, rollouts=[], unreadable=0)
  >>> [panel.title for panel in other_panels(run, known=set())]
  ['mine']
  """
  return tuple(Panel(key, "value", {key: "value"}) for key in run.metrics() if key not in known)


def all_themes(run: Run) -> dict[str, tuple[Panel, ...]]:
  """The themes of this run: the fixed ones, its domains, and whatever else it wrote.

  >>> list(all_themes(Run("first", rows={}, config={}, rollouts=[], unreadable=0)))
  ['Held-out questions', 'Reward', 'Responses', 'Update', 'Speed', 'Everything else']
  """
  themes = dict(THEMES)
  themes[HELD_OUT] += domain_panels(run)
  known = {key for panels in themes.values() for panel in panels for key in panel.lines}
  return themes | {"Everything else": other_panels(run, known)}


def thin(series: Series) -> Series:
  """At most POINTS points: means of equal bins, at the last step of each.

  >>> len(thin(Series(np.arange(1000), np.ones(1000))))
  400
  """
  if len(series) <= POINTS:
    return series
  bins = np.array_split(np.arange(len(series)), POINTS)
  means = np.array([series.values[index].mean() for index in bins])
  return Series(series.steps[[index[-1] for index in bins]], means)


def smooth(values: np.ndarray) -> np.ndarray:
  """A centred moving mean over a twelfth of the curve. It narrows to the ends, where a trend would bend it.

  >>> smooth(np.array([0.0, 3.0, 0.0])).tolist()
  [0.0, 1.0, 0.0]
  """
  index = np.arange(len(values))
  half = np.minimum(np.minimum(index, index[::-1]), len(values) // 24 + 1)
  sums = np.concatenate([[0.0], np.cumsum(values)])
  return (sums[index + half + 1] - sums[index - half]) / (2 * half + 1)
