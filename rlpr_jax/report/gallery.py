"""Rollouts to look at: what was asked, what the policy wrote, and how likely it then found the reference answer."""

import itertools
import re
from collections.abc import Iterable, Iterator

from rlpr_jax.report import style
from rlpr_jax.report.markup import Markup, join, tag
from rlpr_jax.report.records import Json, Run, finite, number

GROUP_SIZE = 4
TAGS = re.compile(r"(</?(?:think|answer)>)")


def text(row: Json, key: str) -> str:
  return str(row.get(key) or "")


def one_a_question(rows: Iterable[Json], count: int = GROUP_SIZE) -> list[Json]:
  """The first `count` rows whose questions differ: eight samples of one prompt look alike.

  >>> one_a_question([{"question": "6 * 7?", "step": 1}, {"question": "6 * 7?", "step": 2}])
  [{'question': '6 * 7?', 'step': 1}]
  """
  by_question: dict[str, Json] = {}
  for row in rows:
    by_question.setdefault(text(row, "question"), row)
  return list(itertools.islice(by_question.values(), count))


def by_reward(rows: Iterable[Json], sign: int) -> list[Json]:
  """Highest total reward first for sign -1, lowest first for 1. Rows without a reward are left out.

  >>> by_reward([{"reward_total": 0.1}, {"reward_total": 0.6}, {}], sign=-1)
  [{'reward_total': 0.6}, {'reward_total': 0.1}]
  """
  rated = [(reward, row) for row in rows if (reward := number(row, "reward_total")) is not None]
  return [row for _, row in sorted(rated, key=lambda pair: sign * pair[0])]


def choose(run: Run) -> dict[str, list[Json]]:
  """The groups of the gallery: title -> rollouts.

  >>> run = Run("first", rows={}, config={}, rollouts=[{"step": 3, "question": "6 * 7?"}], unreadable=0)
  >>> choose(run)["Newest"]
  [{'step': 3, 'question': '6 * 7?'}]
  """
  rows = run.rollouts
  newest = max((number(row, "step") or 0 for row in rows), default=0)
  scorable = [row for row in rows if row.get("scorable")]
  return {
    "Newest": one_a_question(row for row in rows if (number(row, "step") or 0) == newest),
    "Highest reward": one_a_question(by_reward(rows, -1)),
    "Lowest reward among the scorable": one_a_question(by_reward(scorable, 1)),
    "Not scorable: no reward for the answer": one_a_question(row for row in rows if row.get("scorable") is False),
  }


def is_short(row: Json) -> bool:
  """Fits on a screen, and the reference is more than a letter.

  >>> is_short({"question": "6 * 7?", "response": "42", "reference_probs": [0.5, 0.9]})
  True
  """
  characters = len(text(row, "question")) + len(text(row, "response"))
  return 2 <= len(row["reference_probs"]) <= 24 and characters < 900


def featured(run: Run) -> list[Json]:
  """The pair that shows the reward best: responses to one question that make the reference likely and unlikely.

  One where no question has two scored responses, none where nothing was scored.

  >>> featured(Run("first", rows={}, config={}, rollouts=[], unreadable=0))
  []
  """
  scored = [row for row in run.rollouts if row.get("scorable") and row.get("reference_probs")]
  groups: dict[tuple[object, str], list[Json]] = {}
  for row in [row for row in scored if is_short(row)] or scored:
    groups.setdefault((row.get("step"), text(row, "question")), []).append(row)

  def probability(row: Json) -> float:
    return number(row, "reward_reference") or 0.0

  ends = [(max(group, key=probability), min(group, key=probability)) for group in groups.values()]
  if not ends:
    return []
  high, low = max(ends, key=lambda pair: probability(pair[0]) - probability(pair[1]))
  return [high] if high is low else [high, low]


def reference_tokens(row: Json) -> list[tuple[str, float | None]]:
  """(token, its probability) of the reference answer; None where the rollout was not scored.

  >>> reference_tokens({"reference_tokens": ["4", "2"], "reference_probs": [0.5]})
  [('4', 0.5), ('2', None)]
  """
  tokens = [str(token) for token in row.get("reference_tokens") or []]
  probabilities = row.get("reference_probs") or []
  known = [finite(probability) for probability in probabilities[: len(tokens)]]
  return list(itertools.zip_longest(tokens, known))


def baseline_tokens(row: Json) -> list[tuple[str, float | None]]:
  """(token, its probability without reasoning); None where the run did not write it or tokenised the two otherwise.

  >>> baseline_tokens({"reference_tokens": ["4", "2"], "baseline_probs": [0.25, 0.5]})
  [('4', 0.25), ('2', 0.5)]
  """
  tokens = [str(token) for token in row.get("reference_tokens") or []]
  known = list(row.get("baseline_probs") or [])
  return list(zip(tokens, map(finite, known) if len(known) == len(tokens) else [None] * len(tokens), strict=True))


def gain_tokens(row: Json) -> list[tuple[str, float | None]]:
  """(token, how much more probable the reasoning made it); None where either is unknown.

  >>> gain_tokens({"reference_tokens": ["4"], "reference_probs": [0.75], "baseline_probs": [0.25]})
  [('4', 0.5)]
  """
  pairs = zip(reference_tokens(row), baseline_tokens(row), strict=True)
  return [(token, None if r is None or without is None else r - without) for (token, r), (_, without) in pairs]


def each_reference(row: Json) -> Iterator[Markup]:
  """Each of several reference answers, with its r after the reasoning.

  >>> list(each_reference({"references": ["4", "four"], "reward_each_reference": [0.5, None]}))
  ['<span>4 <b>0.50</b></span>', '<span>four <b>—</b></span>']
  """
  texts, scores = list(row.get("references") or []), list(row.get("reward_each_reference") or [])
  if len(texts) > 1:
    for reference, score in itertools.zip_longest(texts, map(finite, scores[: len(texts)])):
      yield tag("span", f"{reference} ", tag("b", "—" if score is None else f"{score:.2f}"))


def token_chip(token: str, probability: float | None) -> Markup:
  """One token of the reference, coloured by its probability.

  >>> token_chip("42", None)
  '<span class="token"><b>42</b><small>—</small></span>'
  """
  if probability is None:
    return tag("span", tag("b", style.visible(token)), tag("small", "—"), class_="token")
  return _coloured(token, style.probability_color(probability), f"{probability:.2f}", f"probability {probability:.6f}")


def gain_chip(token: str, gain: float | None) -> Markup:
  """One token of the reference, coloured by how much more probable the reasoning made it.

  >>> "<small>-0.25</small>" in gain_chip("42", -0.25)
  True
  """
  if gain is None:
    return token_chip(token, None)
  return _coloured(token, style.gain_color(gain), f"{gain:+.2f}", f"r - r' {gain:+.6f}")


def _coloured(token: str, color: str, shown: str, title: str) -> Markup:
  return tag(
    "span",
    tag("b", style.visible(token)),
    tag("small", shown),
    class_="token",
    style=f"background:{color}",
    title=title,
  )


def highlight(response: str) -> Markup:
  """The response with its tags marked, and what stands in `<answer>` marked as the answer.

  >>> highlight("<answer>4 < 5")
  '<span class="tag">&lt;answer&gt;</span><span class="answer">4 &lt; 5</span>'
  """
  pieces = []
  inside = False
  for piece in TAGS.split(response):
    if TAGS.fullmatch(piece):
      pieces.append(tag("span", piece, class_="tag"))
      inside = piece == "<answer>"
    else:
      pieces.append(tag("span", piece, class_="answer") if inside else piece)
  return join(*pieces)


def share(value: float) -> str:
  """A value in 0..1 as a CSS length.

  >>> share(0.25)
  '25.0%'
  """
  return f"{100 * style.clip(value):.1f}%"


def track(before: float, after: float) -> Markup:
  """A bar from 0 to 1: a tick at `before`, one at `after`, and the way between them.

  >>> "left:25.0%;width:50.0%" in track(before=0.25, after=0.75)
  True
  """
  low, high = sorted((before, after))
  color = "var(--teal)" if after >= before else "var(--coral)"
  way = f"left:{share(low)};width:{share(high - low)};background:{color}"
  ticks = (tag("u", class_="from", style=f"left:{share(before)}"), tag("u", style=f"left:{share(after)}"))
  return tag("div", tag("i", style=way), *ticks, class_="track")


def reward_parts(row: Json) -> Iterator[Markup]:
  """Each part of the reward that the row has, by name; behind the usual ones those of other rewards and of shadows.

  >>> list(reward_parts({"reward_total": 0.5, "shadow_rule": 1.0}))
  ['<span>total <b>0.50</b></span>', '<span>shadow rule <b>1.00</b></span>']
  """
  parts = {
    "after reasoning, r": "reward_reference",
    "without, r'": "reward_baseline",
    "debiased": "reward_debiased",
    "format": "reward_format",
    "repetition": "reward_repetition",
    "total": "reward_total",
    "advantage": "advantage",
    "std of group": "group_std",
  }
  others = [key for key in row if key.startswith(("reward_", "shadow_")) and key not in parts.values()]
  for label, key in (parts | {key.removeprefix("reward_").replace("_", " "): key for key in others}).items():
    value = number(row, key)
    if value is not None:
      yield tag("span", label, " ", tag("b", f"{value:.2f}"))


def badges(row: Json) -> Iterator[Markup]:
  """Where the rollout comes from and how it ended.

  >>> list(badges({"step": 3, "length": 12}))
  ['<span class="badge">step 3</span>', '<span class="badge">12 tokens</span>']
  """
  for label in (f"step {row.get('step', '?')}", text(row, "source"), f"{row.get('length', '?')} tokens"):
    if label:
      yield tag("span", label, class_="badge")
  if row.get("finish") == "length":
    yield tag("span", "cut at the limit", class_="badge warn")
  if row.get("kept") is False:
    yield tag("span", "group filtered out", class_="badge warn")


def heading(row: Json) -> Markup:
  """The badges of a card, and its total reward."""
  total = number(row, "reward_total")
  reward = tag("span", "reward ", "—" if total is None else f"{total:.2f}", class_="total")
  return tag("div", *badges(row), reward, class_="head")


def way(row: Json) -> Markup:
  """The bar from r' to r; nothing where one of them is unknown.

  >>> way({"reward_reference": 0.5})
  ''
  """
  reference, baseline = number(row, "reward_reference"), number(row, "reward_baseline")
  known = reference is not None and baseline is not None and row.get("scorable")
  return track(baseline, reference) if known else join()


def card(row: Json) -> Markup:
  """One rollout."""
  parts = [
    heading(row),
    tag("div", "Question", class_="label"),
    tag("div", text(row, "question"), class_="text question"),
    tag("div", "Reference answer, and the probability the policy gave each token", class_="label"),
    tag("div", *(token_chip(*pair) for pair in reference_tokens(row)), class_="tokens"),
  ]
  if not row.get("reference_tokens"):
    parts.append(tag("div", text(row, "reference"), class_="text"))
  if others := list(each_reference(row)):
    parts += [tag("div", "Each reference answer, and its r", class_="label"), tag("div", *others, class_="sum")]
  parts += [
    way(row),
    tag("div", *reward_parts(row), class_="sum"),
    tag("div", "Response", class_="label"),
    tag("div", highlight(text(row, "response")), class_="text box"),
  ]
  return tag("article", *parts, class_="card")


def explanation(responses: int) -> Markup:
  """Legend of the colours and the bar of a card."""
  return tag(
    "p",
    "Two responses to one question. " if responses == 2 else "",
    "The colour of a token of the reference answer is the probability the policy gave it after its own reasoning:",
    tag("span", class_="scale"),
    "0 to 1. Their mean (or what the config names as aggregate) is r, and r' is the same without the reasoning. "
    "The bar runs from r' to r: how much the reasoning helped, which is what the policy is rewarded for.",
    class_="muted",
  )


def gallery(run: Run) -> Markup:
  """All groups, each rollout a card.

  >>> gallery(Run("first", rows={}, config={}, rollouts=[], unreadable=0))
  '<p class="muted">No rollouts were written.</p>'
  """
  groups = [(title, rows) for title, rows in choose(run).items() if rows]
  if not groups:
    return tag("p", "No rollouts were written.", class_="muted")
  steps = [int(step) for row in run.rollouts if (step := number(row, "step")) is not None]
  span = f" of steps {min(steps)} to {max(steps)}" if steps else ""
  cards = [join(tag("h3", title), tag("div", *(card(row) for row in rows), class_="cards")) for title, rows in groups]
  return join(tag("p", f"Chosen from {len(run.rollouts):,} rollouts{span}.", class_="muted"), *cards)
