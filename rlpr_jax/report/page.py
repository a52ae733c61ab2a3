"""The report of a run: one HTML file, no script and nothing fetched."""

import json
import pathlib
from collections.abc import Iterator

from rlpr_jax.report import charts, diagnosis, gallery, panels, style
from rlpr_jax.report.markup import Markup, join, tag
from rlpr_jax.report.records import EXACT, Json, Run, Series, read_run
from rlpr_jax.runs import ACCURACY
from rlpr_jax.runs.storage import write_result

# The policy forbids scripts and requests even if something hostile were to get past the escaping.
HEAD = """<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
"""


def hero(run: Run) -> Markup:
  """Held-out accuracy before and after.

  >>> hero(Run("first", rows={}, config={}, rollouts=[], unreadable=0))
  '<div class="tile hero"><span>Held-out accuracy, not evaluated yet</span><b>—</b></div>'
  """
  label, numbers = run.headline()
  values = run.series(ACCURACY).values
  gain = 100 * (values[-1] - values[0]) if len(values) > 1 else None
  note = "" if gain is None else tag("em", f"{gain:+.1f} points", class_="gain" if gain >= 0 else "loss")
  return tag("div", tag("span", label), tag("b", numbers or "—"), note, class_="tile hero")


def tile(label: str, value: str, note: str = "") -> Markup:
  return tag("div", tag("span", label), tag("b", value, " ", tag("small", note)), class_="tile")


def change(label: str, series: Series) -> Markup:
  """First and last value of a curve.

  >>> change("Reward", Run("first", {1: {"reward": 0.1}, 2: {"reward": 0.6}}, {}, [], 0).series("reward"))
  '<div class="tile"><span>Reward</span><b>0.6 <small>from 0.1</small></b></div>'
  """
  return tile(label, style.compact(series.values[-1]), f"from {style.compact(series.values[0])}")


def tiles(run: Run) -> Iterator[Markup]:
  """The headline."""
  yield hero(run)
  if exact := run.exact():
    yield tile("Held-out answers with a reference's text", exact)
  yield tile("Steps", f"{max(run.rows):,}")
  if (seconds := run.seconds()) is not None:
    yield tile("Wall time of the steps", style.duration(seconds))
  for label, key in (("Reward", "reward/total"), ("Response length", "rollout/response_length")):
    series = run.series(key)
    if len(series):
      yield change(label, series)


def domain_table(run: Run) -> Markup:
  """Held-out accuracy of each domain, first and latest evaluation, and the latest share with a reference's text."""
  rows = []
  for domain in run.domains():
    series = run.series(f"{ACCURACY}/{domain}")
    if len(series):
      first, last = series.values[0], series.values[-1]
      name = tag("span", domain, class_="name")
      exact = run.series(f"{EXACT}/{domain}").values
      note = tag("small", f" exact {style.percent(exact[-1])}") if len(exact) else ""
      numbers = tag("span", f"{style.percent(first)} → ", tag("b", style.percent(last)), note, class_="numbers")
      rows.append(tag("div", name, gallery.track(first, last), numbers, class_="domain"))
  return tag("div", *rows, class_="card domains") if rows else join()


def curves(run: Run) -> Iterator[tuple[str, Markup]]:
  """The panels of each theme that has something to show."""
  for theme, shown in panels.all_themes(run).items():
    drawings = [drawing for panel in shown if (drawing := charts.render(run, panel)) is not None]
    if drawings:
      table = domain_table(run) if theme == panels.HELD_OUT else ""
      yield theme, join(tag("div", *drawings, class_="panels"), table)


def sections(run: Run) -> Iterator[tuple[str, Markup]]:
  """(title, content) of everything under the headline."""
  pair = gallery.featured(run)
  if pair:
    cards = tag("div", *(gallery.card(row) for row in pair), class_="cards featured")
    yield "The reward at work", join(gallery.explanation(len(pair)), cards)
  yield from curves(run)
  if run.diagnosis:
    yield "Diagnosis", diagnosis.section(run.diagnosis)
  yield "Rollouts", gallery.gallery(run)
  yield "Config", config_table(run.config)


def flatten(config: Json, prefix: str = "") -> Iterator[tuple[str, str]]:
  """(`a.b.c`, value) for each leaf of a nested config.

  >>> list(flatten({"model": {"depth": 2}, "seed": 0}))
  [('model.depth', '2'), ('seed', '0')]
  """
  for key, value in config.items():
    if isinstance(value, dict) and value:
      yield from flatten(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}", json.dumps(value, ensure_ascii=False)


def config_table(config: Json) -> Markup:
  """The config, folded away.

  >>> config_table({"seed": 0})
  '<details><summary>Config (1 fields)</summary><table><tr><td>seed</td><td>0</td></tr></table></details>'
  """
  rows = [tag("tr", tag("td", name), tag("td", value)) for name, value in flatten(config)]
  summary = tag("summary", f"Config ({len(rows)} fields)" if rows else "Config: none was written")
  return tag("details", summary, tag("table", *rows))


def footer(run: Run) -> Markup:
  note = f"{run.unreadable} line(s) were not whole and are left out." if run.unreadable else ""
  return tag("footer", f"{len(run.rows)} rows of metrics, {len(run.rollouts):,} rollouts read. {note}")


def render_page(run: Run) -> str:
  """The whole document.

  >>> render_page(Run("first", rows={0: {}}, config={}, rollouts=[], unreadable=0)).startswith("<!doctype html>")
  True
  """
  title = f"{run.name} · RLPR run"
  # A style sheet is raw text in HTML: escaped, its quotes would no longer be quotes.
  head = tag("head", Markup(HEAD), tag("title", title), tag("style", Markup(style.CSS)))
  parts = list(sections(run))
  links = [tag("a", name, href=f"#s{i}") for i, (name, _) in enumerate(parts)]
  body = tag(
    "main",
    tag("h1", run.name),
    tag("div", *tiles(run), class_="tiles"),
    tag("nav", *links),
    *(join(tag("h2", name, id=f"s{i}"), content) for i, (name, content) in enumerate(parts)),
    footer(run),
  )
  return "<!doctype html>\n" + tag("html", head, tag("body", body), lang="en") + "\n"


def render_diagnosis(name: str, found: Json) -> str:
  """A diagnosis as a document of its own.

  Args:
    found: what diagnosis.json holds.
  """
  head = tag("head", Markup(HEAD), tag("title", f"{name} · diagnosis"), tag("style", Markup(style.CSS)))
  body = tag("main", tag("h1", name), diagnosis.section(found))
  return "<!doctype html>\n" + tag("html", head, tag("body", body), lang="en") + "\n"


def write_report(workdir: pathlib.Path) -> pathlib.Path:
  """Writes WORKDIR/report.html from what the run wrote so far, and returns its path."""
  path = workdir / "report.html"
  write_result(path, render_page(read_run(workdir)))
  return path
