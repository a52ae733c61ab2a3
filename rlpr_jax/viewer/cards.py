"""Rollouts as HTML: one, or the responses to one prompt side by side; and the few words of each that a list shows."""

from collections.abc import Sequence

from rlpr_jax.answers import extract_answer
from rlpr_jax.report import gallery
from rlpr_jax.report.markup import Markup, join, tag
from rlpr_jax.report.records import Json, number
from rlpr_jax.viewer.index import numbers

QUESTION, ANSWER = 160, 80  # characters that a list shows
# What colours the tokens of a reference: its name in an address -> what is said of it.
COLORS = {
  "r": "r, after the reasoning",
  "baseline": "r', without reasoning",
  "gain": "r - r', what the reasoning adds",
}


def chips(row: Json, color: str) -> Markup:
  """The reference's tokens, coloured by one of COLORS.

  >>> "<small>+0.50</small>" in chips(
  ...   {"reference_tokens": ["4"], "reference_probs": [0.75], "baseline_probs": [0.25]}, "gain"
  ... )
  True
  """
  if not row.get("reference_tokens"):
    return tag("div", gallery.text(row, "reference"), class_="text")
  if color == "gain":
    shown = [gallery.gain_chip(*pair) for pair in gallery.gain_tokens(row)]
  else:
    of = gallery.baseline_tokens if color == "baseline" else gallery.reference_tokens
    shown = [gallery.token_chip(*pair) for pair in of(row)]
  return tag("div", *shown, class_="tokens")


def note(row: Json, color: str) -> Markup:
  """Why tokens have no colour, where that is so."""
  if not row.get("reference_tokens"):
    return tag("p", "Not scored: the response has no place for the reference.", class_="muted note")
  if color != "r" and all(value is None for _, value in gallery.baseline_tokens(row)):
    return tag("p", "Not known: the run wrote no r' of each token, or it has others there.", class_="muted note")
  return join()


def own_answer(row: Json) -> Markup:
  """The policy's own answer, and what it is beside the references."""
  answer, found = extract_answer(gallery.text(row, "response")), numbers(row)
  if answer is None:
    return tag("span", "none: no <answer> … </answer>", class_="badge warn")
  if not answer:
    return tag("span", "empty", class_="badge warn")
  verdict = tag("span", "the reference's text", class_="badge good") if found["exact"] else join()
  return join(tag("div", answer, class_="text own"), verdict)


def body(row: Json, color: str) -> Markup:
  """A response: reference and own answer beside each other, the parts of the reward, the text."""
  parts = [
    tag(
      "div",
      tag(
        "div",
        tag("div", "Reference by ", COLORS[color], class_="label"),
        chips(row, color),
        note(row, color),
      ),
      tag("div", tag("div", "Own answer", class_="label"), own_answer(row)),
      class_="beside",
    ),
  ]
  if others := list(gallery.each_reference(row)):
    parts += [tag("div", "Each reference answer, and its r", class_="label"), tag("div", *others, class_="sum")]
  return join(
    *parts,
    gallery.way(row),
    tag("div", *gallery.reward_parts(row), class_="sum"),
    tag("div", "Response", class_="label"),
    tag("div", gallery.highlight(gallery.text(row, "response")), class_="text box"),
  )


def question(row: Json) -> Markup:
  return join(tag("div", "Question", class_="label"), tag("div", gallery.text(row, "question"), class_="text question"))


def rollout(row: Json, color: str) -> Markup:
  """One rollout.

  Args:
    color: one of COLORS.
  """
  return tag("article", gallery.heading(row), question(row), body(row, color), class_="card")


def group(rows: Sequence[tuple[str, Json]], chosen: str, color: str) -> Markup:
  """The responses to one prompt side by side, the highest reward first.

  Args:
    rows: ids and rollouts.
    chosen: the id of the one that was asked for.
    color: one of COLORS.
  """
  if not rows:
    return join()
  ordered = sorted(rows, key=lambda pair: -(number(pair[1], "reward_total") or 0.0))
  columns = [
    tag(
      "article",
      gallery.heading(row),
      body(row, color),
      class_="card chosen" if id == chosen else "card",
      data_id=id,
    )
    for id, row in ordered
  ]
  return join(tag("div", question(rows[0][1]), class_="card"), tag("div", *columns, class_="group"))


def summary(row: Json) -> Json:
  """The words of a rollout that a list shows.

  >>> summary({"question": "6 * 7?", "response": "<answer>42</answer>"})["answer"]
  '42'
  """
  answer = extract_answer(gallery.text(row, "response"))
  return {
    "question": cut(gallery.text(row, "question"), QUESTION),
    "reference": cut(gallery.text(row, "reference"), ANSWER),
    "answer": None if answer is None else cut(answer, ANSWER),
    "source": gallery.text(row, "source"),
  }


def cut(words: str, most: int) -> str:
  """One line of a text, and of one that is longer its beginning.

  >>> cut("What is 6 * 7?", 8)
  'What is…'
  """
  line = " ".join(words[: 4 * most].split())
  return line if len(line) <= most and len(words) <= 4 * most else f"{line[: most - 1].rstrip()}…"
