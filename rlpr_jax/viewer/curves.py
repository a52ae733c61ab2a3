"""Curves of a run that goes on: its metrics as they come, by theme, thinned and smoothed as in the report."""

import pathlib

from rlpr_jax.report import panels, style
from rlpr_jax.report.panels import Panel
from rlpr_jax.report.records import Json, Run, Series
from rlpr_jax.viewer.tail import Tail

AT_ONCE = 2**24  # bytes that one look reads


class Curves:
  """The metrics of a run, followed as they are written."""

  def __init__(self, path: pathlib.Path, name: str):
    self._tail = Tail(path)
    self._name = name
    self._rows: dict[int, Json] = {}
    self.damaged = 0
    self.version = 0  # counts changes

  def look(self, most: int = AT_ONCE) -> bool:
    """Takes in what is new; whether there is more at once. A step written twice keeps the later values."""
    news = self._tail.look(most)
    if news.anew:
      self._rows, self.damaged = {}, 0
    for line in news.lines:
      step = line.content.get("step")
      if isinstance(step, int):
        self._rows.setdefault(step, {}).update(line.content)
      else:
        self.damaged += 1
    self.damaged += news.damaged
    self.version += news.anew or bool(news.lines) or news.damaged > 0
    return news.more

  def run(self) -> Run:
    """The run as the report has it, without its rollouts."""
    return Run(self._name, dict(sorted(self._rows.items())), config={}, rollouts=[], unreadable=self.damaged)

  def last_step(self) -> int | None:
    """The last step that has metrics."""
    return max(self._rows, default=None)

  def draw(self) -> Json:
    """What the page draws: themes of panels, and the points of each metric that has any."""
    run = self.run()
    themes = [
      {"title": title, "panels": [describe(panel) for panel in of_theme]}
      for title, of_theme in panels.all_themes(run).items()
    ]
    return {"themes": themes, "series": {key: points(key, run.series(key)) for key in run.metrics()}}


def describe(panel: Panel) -> Json:
  """A panel for the page.

  >>> describe(Panel("Loss", "nats", {"update/loss": "mean"}))["lines"]
  [{'key': 'update/loss', 'label': 'mean', 'color': 'var(--series-0)'}]
  """
  lines = [
    {"key": key, "label": label, "color": style.series_color(index)}
    for index, (key, label) in enumerate(panel.lines.items())
  ]
  return {"title": panel.title, "unit": panel.unit, "stacked": panel.stacked, "whole": panel.whole, "lines": lines}


def points(key: str, series: Series) -> Json:
  """Steps and values of a metric, and the smoothed values where there are enough and they are measured at every step.

  >>> import numpy as np
  >>> points("update/loss", Series(np.array([1, 2]), np.array([0.5, 0.25])))
  {'steps': [1, 2], 'values': [0.5, 0.25], 'smooth': None}
  """
  thinned = panels.thin(series)
  smoothed = None
  if len(thinned) >= panels.SMOOTH_FROM and not key.startswith("held_out/"):
    smoothed = rounded(panels.smooth(thinned.values).tolist())
  return {"steps": thinned.steps.tolist(), "values": rounded(thinned.values.tolist()), "smooth": smoothed}


def rounded(values: list[float]) -> list[float]:
  """Six digits of each, which is more than a page can show.

  >>> rounded([1 / 3])
  [0.333333]
  """
  return [float(f"{value:.6g}") for value in values]
