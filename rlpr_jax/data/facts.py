"""Built-in questions whose answers report several facts: what decides, and what follows the reasoning.

    ann 38 eggs, sells 7. bob 15 cups, gets 9. cal 41 pens, gets 4. report all.

A right answer says what each has, and who has the most: four facts in 34 to 41 tokens, of which names, numbers and
units are decisive. The rest is free, and much of it goes as the reasoning went. A thought that visits cal before ann
leads to an answer that tells of cal first, and one that makes a list, with colons, to "45 pens are now with cal":

    ann 38-7=31 eggs bob 15+9=24 cups cal 41+4=45 pens most cal       ann ends up with 31 eggs, bob ends up ...
    cal: 41+4=45 pens ann: 38-7=31 eggs bob: 15+9=24 cups most: cal   45 pens are now with cal, 31 eggs are ...

The reference is one of `wordings`, drawn at random. So whether a thought makes it probable depends on two things, which
a reward has to tell apart: whether the sums are right, and whether they happen to be done in the reference's order.
"""

import itertools
import random
import re
from typing import NamedTuple

from rlpr_jax.data.builtin_words import PEOPLE, UNITS, Question

DOMAIN = "stock"
_ORDERS = tuple(itertools.permutations(range(3)))
_OPENERS = ("", "in the end ", "so by now ")
_JOINS = (", ", ", then ", " while ")
# By whether the name stands first: verbs of the counts, and the last clause.
_VERBS = {True: ("is left with", "ends up with", "now comes to"), False: ("are now with", "are left to", "are kept by")}
_LAST = {
  True: ("{} has the most of all", "of the three {} has the most"),
  False: ("the most of all are with {}", "the most of the three are with {}"),
}
_MISREAD = 0.25  # share of the careless thoughts whose sums are right, and who has the most is not


class Count(NamedTuple):
  """How many of what somebody has in the end."""

  name: str
  number: int
  unit: str


class Report(NamedTuple):
  """The content of every right answer to a question, in whatever words."""

  counts: tuple[Count, ...]  # in the order of the question
  most: str  # name of who has the most


class _Wording(NamedTuple):
  """How a report is worded. The first two go as the reasoning did, the others are free."""

  order: tuple[int, ...]  # in which the counts are told
  name_first: bool  # "ann ends up with 31 eggs", not "31 eggs are now with ann"
  verb: str
  opener: str
  join: str
  last: str


_WORDINGS = tuple(
  _Wording(order, name_first, verb, opener, join, last)
  for order in _ORDERS
  for name_first in (True, False)
  for verb in _VERBS[name_first]
  for opener in _OPENERS
  for join in _JOINS
  for last in _LAST[name_first]
)


def meaning(question: str) -> Report | None:
  """Works out what the answer to a question has to report; None for any other text.

  >>> meaning("ann 38 eggs, sells 7. bob 15 cups, gets 9. cal 41 pens, gets 4. report all.").most
  'cal'
  """
  found = _QUESTION.fullmatch(question.strip())
  if found is None:
    return None
  parts = (found.groups()[i : i + 5] for i in (0, 5, 10))
  counts = [
    Count(name, int(start) + int(by) * (1 if verb == "gets" else -1), unit) for name, start, unit, verb, by in parts
  ]
  return _report(counts)


def wordings(meant: Report) -> list[str]:
  """Every way in which the reference answers and demonstrations word a report.

  >>> len(wordings(meaning("ann 38 eggs, sells 7. bob 15 cups, gets 9. cal 41 pens, gets 4. report all.")))
  648
  """
  return [_write(meant, wording) for wording in _WORDINGS]


def same_content(text: str, meant: Report) -> bool:
  """Whether a text says each fact of a report once, in any order and in any words of the wordings, and nothing else.

  Clauses end at punctuation and at "and", "then" and "while". One with "most" names who has the most, any other one a
  name, a number and a unit, the name at either end.

  >>> meant = meaning("ann 38 eggs, sells 7. bob 15 cups, gets 9. cal 41 pens, gets 4. report all.")
  >>> same_content("cal has the most, 24 cups are with bob, ann is left with 31 eggs and cal with 45 pens", meant)
  True
  >>> same_content("cal has the most, 24 cups are with bob, ann is left with 31 eggs and cal with 44 pens", meant)
  False
  """
  expected: dict[tuple[str, ...], str] = {("most", meant.most): "most"}
  for name, number, unit in meant.counts:
    expected |= {(name, str(number), unit): name, (str(number), unit, name): name}
  said = []
  for clause in _BETWEEN.split(text.lower()):
    words = clause.split()
    content = tuple(word for word in words if word not in _STYLE)
    if "most" in words:
      content = ("most", *content)
    if content:
      said.append(expected.get(content))
  return sorted(map(str, said)) == sorted(set(expected.values()))


def make(rng: random.Random) -> Question:
  """Makes a question, with right and wrong answers that tell what the thoughts before them found.

  The careless way takes "sells" for "gets", forgets a carry or is one out in one to three of the sums, or misreads who
  has the most.
  """
  names, units = rng.sample(PEOPLE, 3), rng.sample(UNITS, 3)
  right = None
  while right is None:
    starts = [rng.randint(15, 49) for _ in names]
    changes = [rng.choice((-1, 1)) * rng.randint(2, 5) for _ in names]
    numbers = [start + change for start, change in zip(starts, changes, strict=True)]
    right = _report(list(map(Count, names, numbers, units)))
  sums = [f"{start}{change:+d}" for start, change in zip(starts, changes, strict=True)]
  text = " ".join(
    f"{name} {start} {unit}, {'gets' if change > 0 else 'sells'} {abs(change)}."
    for name, start, unit, change in zip(names, starts, units, changes, strict=True)
  )
  wrong = None
  if rng.random() < _MISREAD:
    wrong = right._replace(most=rng.choice([name for name in names if name != right.most]))
  while wrong is None:
    slipped = list(numbers)
    for i in rng.sample(range(3), rng.randint(1, 3)):
      carries = starts[i] // 10 != numbers[i] // 10
      slips = [starts[i] - changes[i], numbers[i] - 1, numbers[i] + 1]
      slipped[i] = rng.choice([*slips, numbers[i] + (10 if changes[i] < 0 else -10)] if carries else slips)
    wrong = _report(list(map(Count, names, slipped, units)))
  answers = []
  for said in (right, wrong):
    wording = rng.choice(_WORDINGS)
    answers.append((_think(said, sums, wording), _write(said, wording)))
  (careful, answer), (careless, careless_answer) = answers
  return Question(DOMAIN, f"{text} report all.", answer, careful, careless, careless_answer)


def _report(counts: list[Count]) -> Report | None:
  """A report of counts of two digits; None where two are equal, so that nobody has the most, or of one name."""
  numbers = [count.number for count in counts]
  distinct = len(set(numbers)) == len({count.name for count in counts}) == len(counts)
  if not distinct or min(numbers) < 10 or max(numbers) > 99:
    return None
  return Report(tuple(counts), max(counts, key=lambda count: count.number).name)


def _think(said: Report, sums: list[str], wording: _Wording) -> str:
  """The sums in the order of a wording and, where it puts names last, as a list, with the numbers of what is said."""
  colon = "" if wording.name_first else ":"
  steps = [f"{name}{colon} {sums[i]}={number} {unit}" for i in wording.order for name, number, unit in [said.counts[i]]]
  return " ".join([*steps, f"most{colon} {said.most}"])


def _write(said: Report, wording: _Wording) -> str:
  clauses = []
  for name, number, unit in (said.counts[i] for i in wording.order):
    ends = [name, f"{number} {unit}"]
    first, second = ends if wording.name_first else ends[::-1]
    clauses.append(f"{first} {wording.verb} {second}")
  return f"{wording.opener}{wording.join.join(clauses)}, and {wording.last.format(said.most)}"


_ACCOUNT = f"({'|'.join(PEOPLE)}) ([1-9][0-9]) ({'|'.join(UNITS)}), (gets|sells) ([2-9])\\. "
_QUESTION = re.compile(f"{_ACCOUNT}{_ACCOUNT}{_ACCOUNT}report all\\.")
_BETWEEN = re.compile(r"[,.;!]|\b(?:and|then|while)\b")
# The words of the wordings that stand for nothing by themselves.
_FREE = " ".join(part for wording in _WORDINGS for part in (wording.verb, wording.opener, wording.join, wording.last))
_STYLE = frozenset(re.findall("[a-z]+", _FREE)) | {"and"}
WORDS = tuple(sorted(_STYLE | {"all", "gets", "quick", "report", "sells", *PEOPLE, *UNITS}))
