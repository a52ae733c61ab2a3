"""The funnel of curation, what was dropped and why: one HTML file, no script and nothing fetched."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence

from rlpr_jax.report import style
from rlpr_jax.report.markup import Markup, join, tag
from rlpr_jax.report.page import HEAD, config_table, tile
from rlpr_jax.report.records import Json

_EXAMPLES = 4  # of each reason
_LIMIT = 700  # characters of a question


def render(name: str, rows: int, kept: Sequence[Json], dropped: Sequence[Json], settings: Json, note: str) -> str:
  """The page.

  Args:
    rows: how many there were.
    kept: {row, question, reference, rating}; rating None where no judge was asked.
    dropped: {row, reason, detail, question, reference}, in the order of the checks.
    note: what the judge cost, or "".

  >>> render("sums.jsonl", rows=2, kept=[], dropped=[], settings={}, note="").startswith("<!doctype html>")
  True
  """
  reasons = Counter(row["reason"] for row in dropped)
  head = tag("head", Markup(HEAD), tag("title", f"{name} · curation"), tag("style", Markup(style.CSS)))
  body = tag(
    "main",
    tag("h1", name),
    tag(
      "div",
      tile("Kept", f"{len(kept):,}", style.percent(len(kept) / rows)),
      tile("Dropped", f"{len(dropped):,}"),
      tile("Read", f"{rows:,}"),
      class_="tiles",
    ),
    tag("h2", "What each check left"),
    tag("div", *_funnel(rows, reasons), class_="card domains"),
    tag("p", note, class_="muted"),
    *_ratings(kept),
    *(part for reason in reasons for part in _examples(reason, [row for row in dropped if row["reason"] == reason])),
    *_examples("kept", kept),
    tag("h2", "Settings"),
    config_table(settings),
  )
  return "<!doctype html>\n" + tag("html", head, tag("body", body), lang="en") + "\n"


def _funnel(rows: int, reasons: Counter[str]) -> Iterator[Markup]:
  yield _bar("read", gone=0, remaining=rows, rows=rows, numbers=f"{rows:,}")
  remaining = rows
  for reason, count in reasons.items():
    remaining -= count
    yield _bar(reason, count, remaining, rows, numbers=join(f"{-count:,} → ", tag("b", f"{remaining:,}")))


def _bar(name: str, gone: int, remaining: int, rows: int, numbers: object) -> Markup:
  """Bar of the rows that remain, and behind it those that this check took."""
  parts = ((remaining, 0, style.TEAL), (gone, remaining, style.CORAL))
  drawn = (
    tag("i", style=f"left:{100 * start / rows:.2f}%;width:{100 * width / rows:.2f}%;background:{color}")
    for width, start, color in parts
  )
  track = tag("div", *drawn, class_="track")
  return tag("div", tag("span", name, class_="name"), track, tag("span", numbers, class_="numbers"), class_="domain")


def _ratings(kept: Sequence[Json]) -> Iterator[Markup]:
  ratings = Counter(row["rating"] for row in kept if row["rating"] is not None)
  if ratings:
    yield tag("h2", "Reasoning that the kept questions need, to the judge")
    bars = (_bar(f"{rating} of 4", 0, ratings[rating], len(kept), f"{ratings[rating]:,}") for rating in sorted(ratings))
    yield tag("div", *bars, class_="card domains")


def _examples(title: str, rows: Sequence[Json]) -> Iterator[Markup]:
  """Rows from all over the file, not the first ones: neighbours are alike."""
  yield tag("h2", title.capitalize())
  step = max(len(rows) // _EXAMPLES, 1)
  yield tag("div", *map(_card, itertools.islice(rows, 0, step * _EXAMPLES, step)), class_="cards")


def _card(row: Json) -> Markup:
  detail = row.get("detail") or (f"reasoning {row['rating']} of 4" if row.get("rating") is not None else "")
  badges = [tag("span", text, class_="badge") for text in (f"row {row['row']}", detail) if text]
  return tag(
    "div",
    tag("div", *badges, class_="head"),
    tag("div", "Question", class_="label"),
    tag("div", _cut(row["question"]), class_="text question"),
    tag("div", "Reference answer", class_="label"),
    tag("div", _cut(row["reference"]), class_="text box"),
    class_="card",
  )


def _cut(text: str) -> str:
  return text.strip() if len(text) <= _LIMIT else f"{text.strip()[:_LIMIT]} …"
