"""Curves as inline SVG, one small panel a theme's quantity."""

import dataclasses
import io
import re

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlpr_jax.report import style
from rlpr_jax.report.markup import Markup, tag
from rlpr_jax.report.records import ACCURACY, EXACT, Run, Series

POINTS = 400  # a curve is thinned to this many: more cannot be seen and makes the file large
SMOOTH_FROM = 12  # shorter curves are shown as they are
SETTINGS = {
  "svg.fonttype": "none",  # text stays text, in the page's own font
  "svg.hashsalt": "rlpr_jax",
  "text.parse_math": False,  # a dollar sign in a name is a dollar sign
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.edgecolor": style.LINE,
  "axes.labelcolor": style.MUTED,
  "axes.grid": True,
  "axes.axisbelow": True,
  "grid.color": style.FAINT,
  "xtick.color": style.MUTED,
  "ytick.color": style.MUTED,
  "font.size": 9,
  "text.color": style.INK,
}


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
    Panel("Compilations", "programs", {"compilations": "so far"}, whole=True),
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


def draw_line(axes: Axes, series: Series, color: str, smoothed: bool = True) -> None:
  """The smoothed curve with the measured one faint behind it; dots where there are few points."""
  series = thin(series)
  smoothed = smoothed and len(series) >= SMOOTH_FROM
  if smoothed:
    axes.plot(series.steps, series.values, color=color, linewidth=0.8, alpha=0.3)
  values = smooth(series.values) if smoothed else series.values
  marker = "o" if len(series) < 2 * SMOOTH_FROM and not smoothed else ""
  axes.plot(series.steps, values, color=color, linewidth=1.6, marker=marker, markersize=3.5)


def draw_stack(axes: Axes, run: Run, panel: Panel) -> None:
  """Areas of the parts of a step; the last line of the panel is the whole, its area what the parts leave."""
  *part_keys, total_key = panel.lines
  total = thin(run.series(total_key))
  heights = []
  for key in part_keys:
    part = run.series(key)
    heights.append(np.interp(total.steps, part.steps, part.values) if len(part) else np.zeros(len(total)))
  heights.append(np.maximum(total.values - np.sum(heights, axis=0), 0.0))
  axes.stackplot(total.steps, heights, colors=style.SERIES[: len(heights)], alpha=0.85, linewidth=0)
  axes.set_ylim(bottom=0)


def label_axes(axes: Axes, unit: str, whole: bool = False) -> None:
  axes.set_xlabel("step")
  axes.set_ylabel(unit)
  axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
  axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=whole))
  axes.margins(x=0.02, y=0.12)


def draw_panel(axes: Axes, run: Run, panel: Panel) -> None:
  """Everything of `panel` that the run wrote."""
  if panel.stacked:
    draw_stack(axes, run, panel)
  else:
    for key, color in zip(panel.lines, style.cycle(len(panel.lines)), strict=True):
      draw_line(axes, run.series(key), color, smoothed=not key.startswith("held_out/"))
  label_axes(axes, panel.unit, panel.whole)


def to_svg(figure: Figure) -> Markup:
  """The figure as an `<svg>` element that takes the width it is given.

  >>> to_svg(Figure()).startswith("<svg")
  True
  """
  buffer = io.StringIO()
  figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
  text = buffer.getvalue()
  return Markup(re.sub(r' (width|height)="[\d.]+pt"', "", text[text.index("<svg") :], count=2))


def legend(run: Run, panel: Panel) -> Markup:
  """Name, colour and latest value of each line that has one.

  >>> run = Run("first", rows={0: {"loss": 0.5}}, config={}, rollouts=[], unreadable=0)
  >>> legend(run, Panel("Loss", "loss", {"loss": "mean"}))
  '<span class="legend"><span><i style="background:#0f766e"></i>mean <b>0.5</b></span></span>'
  """
  items = []
  for (key, label), color in zip(panel.lines.items(), style.cycle(len(panel.lines)), strict=True):
    series = run.series(key)
    if not len(series):
      continue
    dot = tag("i", style=f"background:{color}")
    # The whole of a stack is drawn as what its parts leave: its own value would be read as that.
    latest = "" if panel.stacked else tag("b", style.compact(series.values[-1]))
    items.append(tag("span", dot, label, " ", latest))
  return tag("span", *items, class_="legend")


def render(run: Run, panel: Panel) -> Markup | None:
  """One `<figure>`, or None where the run wrote nothing for it.

  >>> run = Run("first", rows={0: {"loss": 0.5}}, config={}, rollouts=[], unreadable=0)
  >>> render(run, Panel("Entropy", "nats", {"entropy": "mean"})) is None
  True
  """
  needed = list(panel.lines)[-1:] if panel.stacked else list(panel.lines)
  if not any(len(run.series(key)) for key in needed):
    return None
  with matplotlib.rc_context(SETTINGS):
    figure = Figure(figsize=(3.9, 2.15), layout="constrained")
    figure.patch.set_alpha(0)
    draw_panel(figure.subplots(), run, panel)
    drawing = to_svg(figure)
  caption = tag("figcaption", tag("strong", panel.title), legend(run, panel))
  return tag("figure", caption, drawing)
