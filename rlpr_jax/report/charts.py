"""Curves as inline SVG, one small panel a theme's quantity. Values at the pointer, and dark pages, by style alone."""

import io
import re

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlpr_jax.report import style
from rlpr_jax.report.markup import Markup, join, tag
from rlpr_jax.report.panels import SMOOTH_FROM, Panel, smooth, thin
from rlpr_jax.report.records import Run, Series

STRIPS = 48  # steps of a panel whose values the pointer shows, at most
# Of two names of one colour the first: a line of the chart is teal as a series is.
_SHADES = {shades[0]: f"var(--{name})" for name, shades in reversed(style.SHADES.items())}
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


def values_at_pointer(axes: Axes, run: Run, panel: Panel) -> Markup:
  """Strips over a drawn panel, each with the values of its step, which the style sheet shows where the pointer is."""
  lines = {label: run.series(key) for key, label in panel.lines.items()}
  if panel.stacked:  # of whose last line the area is what the parts leave
    *parts, last = lines
    lines = {**{label: lines[label] for label in parts}, "all": lines[last]}
  known = {label: dict(zip(series.steps.tolist(), series.values, strict=True)) for label, series in lines.items()}
  steps = np.unique(np.concatenate([series.steps for series in lines.values()]))
  steps = steps[:: -(-len(steps) // STRIPS)]
  points = 72 / axes.figure.dpi
  box = axes.get_window_extent()
  left, right, height = box.x0 * points, box.x1 * points, axes.figure.bbox.height * points
  top, bottom = height - box.y1 * points, height - box.y0 * points
  places = axes.transData.transform([(step, 0.0) for step in steps])[:, 0] * points
  edges = [left, *((places[1:] + places[:-1]) / 2), right]
  strips = []
  for i, (step, place) in enumerate(zip(steps.tolist(), places, strict=True)):
    side = "start" if place < (left + right) / 2 else "end"
    shown = [f"step {step}", *(f"{label} {style.compact(at[step])}" for label, at in known.items() if step in at)]
    x = f"{place + (4 if side == 'start' else -4):.1f}"
    words = [tag("tspan", text, x=x, dy="1.15em") for text in shown]
    strips.append(
      tag(
        "g",
        tag(
          "rect",
          x=f"{edges[i]:.1f}",
          y=f"{top:.1f}",
          width=f"{edges[i + 1] - edges[i]:.1f}",
          height=f"{bottom - top:.1f}",
        ),
        tag("path", d=f"M{place:.1f} {top:.1f}V{bottom:.1f}"),
        tag("text", *words, y=f"{top:.1f}", text_anchor=side),
      )
    )
  return tag("g", *strips, class_="pointer")


def to_svg(figure: Figure, over: Markup | None = None) -> Markup:
  """The figure as an `<svg>` element that takes the width it is given, in shades that a dark page turns.

  Args:
    over: elements over the drawing, in points.

  >>> to_svg(Figure()).startswith("<svg")
  True
  """
  buffer = io.StringIO()
  figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
  text = buffer.getvalue()
  text = re.sub(r' (width|height)="[\d.]+pt"', "", text[text.index("<svg") :], count=2)
  text = re.sub(r"#[0-9a-f]{6}\b", lambda found: _SHADES.get(found[0], found[0]), text)
  head, _, end = text.rpartition("</svg>")
  return Markup(f"{head}{over or join()}</svg>{end}")


def legend(run: Run, panel: Panel) -> Markup:
  """Name, colour and latest value of each line that has one.

  >>> run = Run("first", rows={0: {"loss": 0.5}}, config={}, rollouts=[], unreadable=0)
  >>> legend(run, Panel("Loss", "loss", {"loss": "mean"}))
  '<span class="legend"><span><i style="background:var(--series-0)"></i>mean <b>0.5</b></span></span>'
  """
  items = []
  for index, (key, label) in enumerate(panel.lines.items()):
    series = run.series(key)
    if not len(series):
      continue
    dot = tag("i", style=f"background:{style.series_color(index)}")
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
    axes = figure.subplots()
    draw_panel(axes, run, panel)
    figure.draw_without_rendering()  # only then is it known where the axes are, and there they shall stay
    figure.set_layout_engine("none")
    drawing = to_svg(figure, values_at_pointer(axes, run, panel))
  caption = tag("figcaption", tag("strong", panel.title), legend(run, panel))
  return tag("figure", caption, drawing)
