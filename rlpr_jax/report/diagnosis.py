"""What a diagnosis found, as a page of its own and as a section of a run's report: no script and nothing fetched."""

from collections.abc import Iterator, Sequence

from rlpr_jax.report import style
from rlpr_jax.report.gallery import highlight, share
from rlpr_jax.report.markup import Markup, join, tag
from rlpr_jax.report.records import Json

EXPLAINED = {  # reasoning before a reference, by the names of `diagnosis.reasoning.variants`
  "own": "its own",
  "other": "another prompt's",
  "sentences": "its sentences in another order",
  "words": "its words in another order",
  "none": "none, between the same tags",
  "straight": "none, straight behind the prompt (as r')",
}
_FIELDS = {
  "policy", "when", "prompts", "samples", "verdicts", "accuracy", "likelihood", "sampled", "trained", "reasoning",
  "information", "likes", "examples",
}  # fmt: skip
_PAIRS = (("all", "all pairs"), ("within", "within a prompt"), ("between", "between prompts"))


def number(interval: Json | None, digits: int = 3) -> str:
  """A figure with its interval.

  >>> number({"value": 0.5, "low": 0.25, "high": 0.75, "groups": 3}, digits=2), number(None)
  ('0.50 (0.25 to 0.75)', '—')
  """
  if not interval or interval["value"] is None:
    return "—"
  return f"{interval['value']:.{digits}f} {ends(interval, digits)}".strip()


def ends(interval: Json, digits: int) -> str:
  """The interval alone; "" where there is none.

  >>> ends({"value": 0.5, "low": 0.25, "high": 0.75, "groups": 3}, digits=2)
  '(0.25 to 0.75)'
  """
  known = interval["low"] is not None and interval["high"] is not None
  return f"({interval['low']:.{digits}f} to {interval['high']:.{digits}f})" if known else ""


def bar(name: str, interval: Json | None, low: float = 0.0, high: float = 1.0, neutral: float | None = None) -> Markup:
  """A figure on a scale: its interval as a bar, a tick at its value, and a pale one at what says nothing.

  >>> 'style="left:25.0%;width:50.0%' in bar("x", {"value": 0.5, "low": 0.25, "high": 0.75, "groups": 3})
  True
  """

  def place(value: float) -> str:
    return share((value - low) / (high - low))

  parts = []
  if neutral is not None:
    parts.append(tag("u", class_="from", style=f"left:{place(neutral)}"))
  if interval and interval["value"] is not None:
    if interval["low"] is not None and interval["high"] is not None:
      width = share((min(interval["high"], high) - max(interval["low"], low)) / (high - low))
      better = neutral is None or interval["value"] >= neutral
      color = "var(--teal)" if better else "var(--coral)"
      parts.append(tag("i", style=f"left:{place(interval['low'])};width:{width};background:{color};opacity:.55"))
    parts.append(tag("u", style=f"left:{place(interval['value'])}"))
  return tag(
    "div",
    tag("span", name, class_="name"),
    tag("div", *parts, class_="track"),
    tag("span", number(interval, 2), class_="numbers"),
    class_="domain",
  )


def card(title: str, *bars: Markup) -> Markup:
  return tag("div", tag("strong", title), *bars, class_="card domains")


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> Markup:
  """Cells by rows.

  >>> table(["a"], [["1 < 2"]])
  '<table><tr><td>a</td></tr><tr><td>1 &lt; 2</td></tr></table>'
  """
  return tag("table", *(tag("tr", *(tag("td", cell) for cell in row)) for row in (header, *rows)))


def tiles(found: Json) -> Iterator[Markup]:
  """The headline."""
  verdict = found["verdicts"]
  likelihood = found["likelihood"]
  information = found["information"]
  total = (found["sampled"]["scores"].get("total") or {}).get("within")
  for label, interval in (
    ("Accuracy at temperature 1", found["accuracy"]["sampled"]["all"]),
    ("Accuracy, greedy", found["accuracy"]["greedy"]["all"]),
    (f"AUC of the reward within a prompt, by {verdict}", total),
    ("Reference after the reasoning, nats a token", likelihood["token"]),
    ("Reference without, nats a token", likelihood["token_without"]),
    ("Reference, all of it, over the reasoning, nats", likelihood["marginal"]),
    ("Mutual information of prompt and reasoning, nats", information.get("information")),
  ):
    known = interval and interval["value"] is not None
    value = join(f"{interval['value']:.3f} ", tag("small", ends(interval, 3))) if known else "—"
    yield tag("div", tag("span", label), tag("b", value), class_="tile")


def verdict_cards(title: str, found: Json) -> Iterator[Markup]:
  """AUC of each score, and of the total by source and by length."""
  yield tag(
    "p",
    f"{title}: {found['responses']:,} responses in {found['groups']:,} groups, right: {number(found['right'])}.",
    class_="muted",
  )
  groups = [("AUC of each score", found["scores"])]
  for name, label in (("by_source", "AUC of the total by source"), ("by_length", "AUC of the total by length")):
    if len(found[name]) > 1:
      groups.append((label, found[name]))
  cards = []
  for heading, scores in groups:
    for label, pairs in _PAIRS:
      known = {name: of_score[label] for name, of_score in scores.items() if of_score[label]}
      if known:
        bars = (bar(name, interval, neutral=0.5) for name, interval in known.items())
        cards.append(card(f"{heading}, {pairs}", *bars))
  yield tag("div", *cards, class_="cards")


def reasoning_card(found: Json) -> Markup:
  """r with other reasoning, and what its own gives beyond that."""
  known = [(label, found[name]) for name, label in EXPLAINED.items() if found.get(name, {}).get("r")]
  if not known:
    return tag("p", "No response was scorable.", class_="muted")
  bars = (bar(label, of["r"]) for label, of in known)
  rows = [
    [label, number(of["loss"]), number(of["helped"]), of["loss"]["groups"]] for label, of in known if of.get("loss")
  ]
  return join(
    card("r of the reference, by the reasoning before it", *bars),
    table(["reasoning", "its own gives more by", "in a share of responses", "prompts"], rows),
  )


def information_text(found: Json) -> Markup:
  if not found:
    return tag("p", "Too few responses with reasoning for a mutual information.", class_="muted")
  rows = [
    ["mutual information, nats", number(found["information"])],
    ["most that it can be", f"{found['most']:.3f}, the logarithm of {found['prompts']} prompts"],
    ["the same of mean log-probabilities, nats a token", number(found["per_token"])],
    ["reasoning that is most probable behind its own prompt", style.percent(found["retrieval"])],
    ["entropy of the reasoning, nats a token", number(found["entropy"])],
  ]
  return join(
    tag(
      "p",
      "How much the reasoning says about its prompt (RAGEN-2). Near 0 it is a template that would do for any prompt, "
      "however varied it looks.",
      class_="muted",
    ),
    table(["", ""], rows),
  )


def likes(found: Json) -> Iterator[Markup]:
  """What goes with the reward within a prompt, and with being right."""
  yield tag(
    "p",
    "Correlations over responses after each prompt's means are taken off. Where the reward likes what has nothing to "
    "do with being right, the policy will learn it. Words were chosen for their correlation, so theirs are too large.",
    class_="muted",
  )
  measures = found["lengths"]
  columns = list(dict.fromkeys(name for of_measure in measures.values() for name in of_measure))
  rows = [[measure, *(number(values.get(name), 2) for name in columns)] for measure, values in measures.items()]
  yield table(["", *columns], rows)
  if found["words"]:
    lines = [
      [line["word"], number(line["reward"], 2), number(line["right"], 2), f"{line['responses']:,}"]
      for line in found["words"]
    ]
    yield table(["word", "with the reward", "with being right", "responses"], lines)


def token_chip(token: Json) -> Markup:
  """One token, coloured by what the reasoning adds to its probability.

  >>> "background:#f9efd0" in token_chip({"token": "4", "with": 0.5, "without": 0.5})
  True
  """
  difference = token["with"] - token["without"]
  return tag(
    "span",
    tag("b", style.visible(token["token"])),
    tag("small", f"{difference:+.2f}"),
    class_="token",
    style=f"background:{style.probability_color((difference + 1) / 2)}",
    title=f"{token['without']:.4f} without the reasoning, {token['with']:.4f} with it",
  )


def example(found: Json) -> Markup:
  """A response, and what its reasoning adds to each token of the reference and of its own answer."""
  said = ("right" if found["right"] else "wrong", found["source"])
  badges = [tag("span", text, class_="badge") for text in said if text]
  parts = [
    tag("div", *badges, tag("span", "reward ", f"{found['reward']:.2f}", class_="total"), class_="head"),
    tag("div", "Question", class_="label"),
    tag("div", found["question"], class_="text question"),
  ]
  for name, label in (("reference", "Reference answer"), ("own", "Own answer")):
    parts.append(tag("div", f"{label}: what the reasoning adds to each token's probability", class_="label"))
    chips = [token_chip(token) for token in found["tokens"][name]]
    parts.append(tag("div", *chips, class_="tokens") if chips else tag("div", "not scored", class_="muted"))
  parts += [tag("div", "Response", class_="label"), tag("div", highlight(found["response"]), class_="text box")]
  return tag("article", *parts, class_="card")


def section(found: Json) -> Markup:
  """All of it, under the headings of one section; of a file that has not all of its parts only that."""
  if missing := sorted(_FIELDS - found.keys()):
    what = f"diagnosis.json has no {missing[0]}: it is another version's, and rlpr diagnose writes it anew."
    return tag("p", what, class_="muted")
  by_source = found["accuracy"]["sampled"], found["accuracy"]["greedy"]
  sources = [name for name in by_source[0] if name != "all"]
  rows = [[name, *(number(of.get(name)) for of in by_source)] for name in ("all", *sources)]
  parts: list[object] = [
    tag(
      "p",
      f"{found['policy']}, {found['prompts']} prompts, {found['samples']} responses each, {found['when']}.",
      class_="muted",
    ),
    tag("div", *tiles(found), class_="tiles"),
    tag("h3", "Accuracy"),
    table(["", "temperature 1", "greedy"], rows),
    tag("h3", f"Does the reward tell right from wrong, as {found['verdicts']} sees it?"),
    *verdict_cards("Sampled for this page", found["sampled"]),
  ]
  if found["trained"]:
    parts += verdict_cards("As it was trained on", found["trained"])
  parts += [
    tag("h3", "Does the reasoning matter?"),
    reasoning_card(found["reasoning"]),
    tag("h3", "Does the reasoning say anything about its prompt?"),
    information_text(found["information"]),
    tag("h3", "What does the reward like?"),
    *likes(found["likes"]),
    tag("h3", "Token by token"),
    tag("div", *map(example, found["examples"]), class_="cards"),
  ]
  return join(*parts)
