"""The built-in question set: nine small domains with free-form answers, and demonstrations for a warm start.

Everything is made from a seed, so it needs no download. Questions are split into training and held-out ones by a hash
of their text: no held-out question is ever demonstrated or trained on.

The answers of the short domains have one wording. Those of the sentence domains have dozens, of which the reference is
one drawn at random: a few tokens of it (a name, a number, a unit) carry what it says, the others how it is said. Which
answers are right is then no longer a matter of comparing texts; `grade` reads what they say. The answers to questions
about facts are longer, say several things, and much of their wording goes as the reasoning went (`data.facts`).

The demonstrations mix three ways of thinking, as text from the world does:
  careful    every step written out, right answer
  terse      no thought worth the name, right answer
  careless   a step goes wrong (a forgotten carry, a miscount), and the answer follows from it
A policy warm-started on the mixture answers right when it happens to think carefully. Which way of thinking makes the
reference answer probable is what RLPR has to find out.
"""

import functools
import hashlib
import itertools
import random
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from rlpr_jax.data import facts
from rlpr_jax.data.builtin_words import PEOPLE, UNITS, Question
from rlpr_jax.data.sources import Example
from rlpr_jax.errors import InputError
from rlpr_jax.rewards import TEMPLATE_TAGS

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerFast

CAREFUL, TERSE = 0.45, 0.25  # shares of the mixture; the rest is careless
HELD_OUT_IN = 5  # one question in five is held out
DOMAINS = ("short", "sentences", "all", "facts")  # "all" is the first two
_MOST = 10**6  # questions or demonstrations, which takes minutes
_PATIENCE = 20_000  # questions made in a row none of which is new: there are no others

_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
_VEHICLES = ("bus", "cab", "tram", "train", "ferry", "plane")
_EVENTS = ("art", "bus", "cab", "dig", "gym", "jog", "lab", "mop", "nap", "run", "tea", "zoo")
_TAGS = TEMPLATE_TAGS["think"]
_SPECIAL = ("<pad>", "<end>", "<q>", "<a>")
_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 +-*=?,.:'()/$%#><!;"
_CHAT_TEMPLATE = (
  "{% for m in messages %}{% if m['role'] == 'user' %}<q>{{ m['content'] }}"
  "{% elif m['role'] == 'assistant' %}<a>{{ m['content'] }}<end>{% endif %}{% endfor %}"
  "{% if add_generation_prompt %}<a>{% endif %}"
)


class Meaning(NamedTuple):
  """The content of every right answer to a sentence question, in whatever words."""

  domain: str
  names: tuple[str, ...]  # in the order that is asked for: who has more, what comes first
  number: str  # the difference, the time; "" where there is none
  unit: str  # what is counted, what comes at that time; an answer may leave it out


def tokenizer(domains: str = "short") -> "PreTrainedTokenizerFast":
  """A chat tokenizer, `<q>question<a>response<end>`: one token a tag and one a character, 64 in all.

  With sentences and facts there is also one a word, with the space before it and without, as in a pretrained model's
  vocabulary: what a sentence says would else be a small part of its tokens.
  """
  from transformers import PreTrainedTokenizerFast  # with it comes torch, where that is installed

  _check(domains)
  words: tuple[str, ...] = ()
  if domains != "short":
    words = facts.WORDS if domains == "facts" else _sentence_words()
  pieces = (*_SPECIAL, *_TAGS, *_CHARACTERS, *words, *(f" {word}" for word in words))
  inner = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="?"))
  whole_word = f"(?: |(?<![a-z0-9]))(?:{'|'.join(words)})(?![a-z0-9])|" if words else ""
  inner.pre_tokenizer = pre_tokenizers.Split(Regex(f"{whole_word}."), "isolated")
  inner.decoder = decoders.Fuse()
  inner.add_tokens([AddedToken(tag, normalized=False) for tag in _TAGS])
  inner.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in _SPECIAL])
  return PreTrainedTokenizerFast(
    tokenizer_object=inner, pad_token="<pad>", eos_token="<end>", chat_template=_CHAT_TEMPLATE
  )


def examples(split: str, count: int, seed: int = 0, domains: str = "short") -> list[Example]:
  """`count` different questions of the split "train" or "held_out", the domains taking turns.

  Args:
    domains: one of `DOMAINS`.

  >>> [example.source for example in examples("train", count=2)]
  ['addition', 'weekday']
  """
  return [
    Example(({"role": "user", "content": question.text},), question.answer, question.domain, row)
    for row, question in enumerate(_questions(split, count, seed, domains))
  ]


def demonstrations(count: int, seed: int = 0, domains: str = "short") -> list[tuple[Example, str]]:
  """`count` training questions, each with one response in the mixture of the three ways of thinking.

  >>> [(example, response)] = demonstrations(count=1)
  >>> "<answer>" in response
  True
  """
  rng, makers = random.Random(f"demonstrations {seed}"), _makers(domains)
  _check_count("demonstrations", count)
  pairs: list[tuple[Example, str]] = []
  while len(pairs) < count:
    question = makers[len(pairs) % len(makers)](rng)
    if not _is_held_out(question.text):
      example = Example(({"role": "user", "content": question.text},), question.answer, question.domain, len(pairs))
      pairs.append((example, _demonstrate(question, rng)))
  return pairs


def meaning(question: str) -> Meaning | facts.Report | None:
  """Works out what the answer to a question about facts or with a sentence for an answer has to say; else None.

  >>> meaning("lee 36 eggs, cal 27. who has more?")
  Meaning(domain='gap', names=('lee', 'cal'), number='9', unit='eggs')
  """
  for grammar in _GRAMMARS.values():
    if found := grammar.question.fullmatch(question.strip()):
      return grammar.solve(*found.groups())
  return facts.meaning(question)


def wordings(meant: Meaning | facts.Report) -> list[str]:
  """Every way in which the reference answers and demonstrations word a meaning.

  >>> "cal has 9 fewer eggs than lee" in wordings(meaning("lee 36 eggs, cal 27. who has more?"))
  True
  """
  if isinstance(meant, facts.Report):
    return facts.wordings(meant)
  content = {"n": meant.number, "u": meant.unit, "spoken": _spoken(meant.number)}
  return [form.format(*meant.names, **content) for form in _forms(meant.domain)]


def same_content(text: str, meant: Meaning | facts.Report) -> bool:
  """Whether a text says what is meant, no more and no less, in any words of the domain's wordings.

  A sentence must say each name and the number once. The names stand in the order of the meaning or in the opposite
  one, as words such as "more" and "fewer" tell. Any other word than those of the wordings makes the text wrong, since
  it may say anything: a wrong name, a wrong number, "not". Of a report of facts `facts.same_content` says more.

  >>> meant = meaning("lee 36 eggs, cal 27. who has more?")
  >>> same_content("cal has 9 fewer eggs than lee", meant), same_content("cal has 9 more eggs than lee", meant)
  (True, False)
  """
  if isinstance(meant, facts.Report):
    return facts.same_content(text, meant)
  grammar = _GRAMMARS[meant.domain]
  text = _SPOKEN.sub(lambda time: f"{time[2]}:{time[1]:0>2}", " ".join(text.lower().split()))
  words = re.sub("[,.;!]", " ", text).split()
  if not set(words) <= _style(meant.domain) | {*meant.names, meant.number, meant.unit}:
    return False
  names = tuple(word for word in words if word in meant.names)
  onward, backward = (not cues.isdisjoint(words) for cues in (grammar.onward, grammar.backward))
  in_order = onward != backward and names == (meant.names if onward else meant.names[::-1])
  number_once = not meant.number or words.count(meant.number) == 1
  return (in_order or not meant.names) and number_once and words.count(meant.unit) <= 1


def grade(question: str, answer: str) -> bool | None:
  """Whether an answer to a question with many wordings is right, by what it says; None for any other question.

  >>> grade("lee 36 eggs, cal 27. who has more?", "lee has 9 more eggs than cal")
  True
  >>> grade("Who wrote Emma?", "Austen") is None
  True
  """
  meant = meaning(question)
  return None if meant is None else same_content(answer, meant)


def _questions(split: str, count: int, seed: int, domains: str) -> list[Question]:
  rng, makers = random.Random(f"{split} {seed}"), _makers(domains)
  _check_count(f"{split} questions", count)
  chosen: dict[str, Question] = {}
  in_vain = 0  # questions since the last new one
  while len(chosen) < count and in_vain < _PATIENCE:
    question, before = makers[len(chosen) % len(makers)](rng), len(chosen)
    if _is_held_out(question.text) == (split == "held_out"):
      chosen.setdefault(question.text, question)
    in_vain = in_vain + 1 if len(chosen) == before else 0
  if len(chosen) < count:
    raise InputError(f"built-in questions: {count} {split} questions were asked for, only {len(chosen)} could be made")
  return list(chosen.values())


def _check_count(what: str, count: int) -> None:
  if count > _MOST:
    raise InputError(f"built-in questions: {count} {what} were asked for, expected at most {_MOST}")


def _makers(domains: str) -> tuple[Callable[[random.Random], Question], ...]:
  _check(domains)
  return _MAKERS[domains]


def _check(domains: str) -> None:
  if domains not in DOMAINS:
    raise InputError(f"built-in questions: domains {domains!r}, expected one of {', '.join(DOMAINS)}")


def _is_held_out(text: str) -> bool:
  return hashlib.sha256(text.encode()).digest()[0] % HELD_OUT_IN == 0


def _demonstrate(question: Question, rng: random.Random) -> str:
  kind = rng.random()
  if kind < CAREFUL:
    thought, answer = question.careful, question.answer
  elif kind < CAREFUL + TERSE:
    thought, answer = rng.choice(("", "quick")), question.answer
  else:
    thought, answer = question.careless, question.careless_answer
  return f"<think>{thought}</think><answer> {answer} </answer>"


def _addition(rng: random.Random) -> Question:
  """`47+85`, digit by digit; the careless way forgets the carry, or miscounts where there is none."""
  a, b = rng.randint(11, 99), rng.randint(11, 99)
  ones, carry = a % 10 + b % 10, (a % 10 + b % 10) // 10
  tens = a // 10 + b // 10
  first = f"{a % 10}+{b % 10}={ones} "
  if carry:
    careful, wrong_tens = f"{first}{a // 10}+{b // 10}+1={tens + 1}", tens
  else:
    careful, wrong_tens = f"{first}{a // 10}+{b // 10}={tens}", tens + rng.choice((-1, 1))
  careless = f"{first}{a // 10}+{b // 10}={wrong_tens}"
  return Question("addition", f"{a}+{b}", str(a + b), careful, careless, f"{wrong_tens}{ones % 10}")


def _weekday(rng: random.Random) -> Question:
  """`wed+23`: whole weeks come off first; the careless way is a day out."""
  start, days = rng.randrange(7), rng.randint(1, 99)
  weeks = days - days % 7

  def think(rest: int) -> tuple[str, str]:
    answer = _DAYS[(start + rest) % 7]
    return f"{days}-{weeks}={rest} {_DAYS[start]}{rest}={answer}", answer

  careful, answer = think(days % 7)
  careless, wrong = think((days % 7 + rng.choice((1, 6))) % 7)
  return Question("weekday", f"{_DAYS[start]}+{days}", answer, careful, careless, wrong)


def _letters(rng: random.Random) -> Question:
  """`e in sleeve`: spelled out with a running count; the careless way skips one or counts one twice."""
  count, length = rng.randint(1, 4), rng.randint(5, 6)
  letter, *others = rng.sample("aeilnorst", 4)
  word = [letter] * count + [rng.choice(others) for _ in range(length - count)]
  rng.shuffle(word)

  def spell(slip: int | None) -> tuple[str, str]:
    seen, parts = 0, []
    for place, character in enumerate(word):
      if character == letter:
        seen += {None: 1, 0: 0, 1: 2}[slip if place == slip_place else None]
        parts.append(f"{character}{seen}")
      else:
        parts.append(character)
    return " ".join(parts), _NUMBERS[seen]

  slip_place = rng.choice([place for place, character in enumerate(word) if character == letter])
  careful, answer = spell(None)
  careless, wrong = spell(rng.randint(0, 1))
  return Question("letters", f"{letter} in {''.join(word)}", answer, careful, careless, wrong)


def _price(rng: random.Random) -> Question:
  """`3*4+5 coins`: ten silver make a gold; the careless way gets the product wrong."""
  a, b = rng.randint(2, 9), rng.randint(2, 9)
  c = rng.randint(1, 9)

  def think(product: int) -> tuple[str, str]:
    total = product + c
    return f"{a}*{b}={product} {product}+{c}={total}", f"{total // 10}g {total % 10}s"

  careful, answer = think(a * b)
  careless, wrong = think(a * b + rng.choice((-a, a, -1, 1)))
  return Question("price", f"{a}*{b}+{c} coins", answer, careful, careless, wrong)


def _chain(rng: random.Random) -> Question:
  """`7+5-3+8`: one running total a step; the careless way slips once."""
  value = rng.randint(5, 9)
  steps = [rng.choice((1, -1)) * rng.randint(1, 9) for _ in range(3)]
  slip_place, slip = rng.randrange(3), rng.choice((-2, -1, 1, 2))

  def think(slips: tuple[int, ...]) -> tuple[str, str]:
    total, totals = value, []
    for step, error in zip(steps, slips, strict=True):
      total += step + error
      totals.append(str(total))
    return " ".join(totals), totals[-1]

  careful, answer = think((0, 0, 0))
  careless, wrong = think(tuple(slip * (place == slip_place) for place in range(3)))
  return Question("chain", f"{value}{''.join(f'{s:+d}' for s in steps)}", answer, careful, careless, wrong)


def _own_meaning(text: str) -> Meaning:
  """Works out the meaning of the answer to a question that was made here."""
  known = meaning(text)
  assert isinstance(known, Meaning)
  return known


def _sentence(rng: random.Random, text: str, careful: str, careless: str, wrong: Meaning) -> Question:
  """A question with right and wrong answers in wordings drawn at random."""
  right = _own_meaning(text)
  answer, careless_answer = (rng.choice(wordings(said)) for said in (right, wrong))
  return Question(right.domain, text, answer, careful, careless, careless_answer)


def _gap(rng: random.Random) -> Question:
  """`ann 17 cats, bob 31. who has more?`: the gap is counted by way of the next ten.

  The careless way miscounts, or takes the one who has fewer for the other.
  """
  people, unit = rng.sample(PEOPLE, 2), rng.choice(UNITS)
  tens = rng.sample(range(10, 50, 10), 2)
  counts = [ten + rng.randint(1, 9) for ten in tens]
  low, high = sorted(counts)
  ten = low + -low % 10

  def think(said: Meaning) -> str:
    up = f"{low}+{ten - low}={ten} {ten}+{high - ten}={high} {ten - low}+{high - ten}={said.number}"
    return f"{up} {'>'.join(said.names)}"

  text = f"{people[0]} {counts[0]} {unit}, {people[1]} {counts[1]}. who has more?"
  right = _own_meaning(text)
  if rng.random() < 0.5:
    wrong = right._replace(names=right.names[::-1])
  else:
    gap = high - low
    wrong = right._replace(number=str(rng.choice([n for n in (gap - 10, gap - 1, gap + 1, gap + 10) if n > 0])))
  return _sentence(rng, text, think(right), think(wrong), wrong)


def _late(rng: random.Random) -> Question:
  """`bus due 7:40, 35 min late. when?`: minutes over sixty make an hour.

  The careless way forgets the hour, or gets the sum of the minutes wrong.
  """
  unit = rng.choice(_VEHICLES)
  hour, due = rng.randint(1, 11), 5 * rng.randint(1, 11)
  late = rng.choice([late for late in range(6, 60) if (due + late) % 60])
  total = due + late

  def think(total: int, carry: int) -> tuple[str, str]:
    time = f"{hour + carry}:{total % 60:02}"
    return f"{due}+{late}={total} " + (f"{total}-60={total - 60} " if total > 60 else "") + time, time

  careful, _ = think(total, total // 60)
  if total > 60 and rng.random() < 0.5:
    careless, wrong = think(total, 0)
  else:
    slips = [slip for slip in (total - 10, total - 1, total + 1, total + 10) if 0 < slip < 120 and slip % 60]
    slip = rng.choice(slips)
    careless, wrong = think(slip, slip // 60)
  text = f"{unit} due {hour}:{due:02}, {late} min late. when?"
  return _sentence(rng, text, careful, careless, _own_meaning(text)._replace(number=wrong))


def _order(rng: random.Random) -> Question:
  """`run after tea. nap before tea. order?`: each pair is put in order, then the three.

  The careless way reads one pair the wrong way round.
  """
  events = tuple(rng.sample(_EVENTS, 3))
  said = rng.sample([(0, 1), (1, 2)], 2)
  text = " ".join(
    f"{events[i]} before {events[j]}." if rng.random() < 0.5 else f"{events[j]} after {events[i]}." for i, j in said
  )
  a, b, c = events
  wrong = rng.choice(((b, a, c), (a, c, b)))

  def think(names: tuple[str, ...]) -> str:
    pairs = ["-".join(sorted((events[i], events[j]), key=names.index)) for i, j in said]
    return " ".join((*pairs, "-".join(names)))

  text = f"{text} order?"
  return _sentence(rng, text, think(events), think(wrong), _own_meaning(text)._replace(names=wrong))


class _Grammar(NamedTuple):
  """How the questions of a sentence domain read, what their answers mean and how those are worded."""

  question: re.Pattern[str]
  solve: Callable[..., Meaning | None]  # of the question's groups
  templates: tuple[str, ...]  # (a|b) is a choice; {0}, {1}, {2} are names, {n} the number, {u} the unit
  onward: frozenset[str] = frozenset()  # words that say that the names stand in the order of the meaning
  backward: frozenset[str] = frozenset()  # words that say the opposite


def _solve_gap(one: str, count: str, unit: str, other: str, other_count: str) -> Meaning | None:
  gap = int(count) - int(other_count)
  names = (one, other) if gap > 0 else (other, one)
  return Meaning("gap", names, str(abs(gap)), unit) if gap and one != other else None


def _solve_late(unit: str, hour: str, due: str, late: str) -> Meaning:
  minutes = 60 * int(hour) + int(due) + int(late)
  return Meaning("late", (), f"{minutes // 60}:{minutes % 60:02}", unit)


def _solve_order(*said: str) -> Meaning | None:
  (a, b), (c, d) = (((x, y) if word == "before" else (y, x)) for x, word, y in (said[:3], said[3:]))
  names = (a, b, d) if b == c else (c, d, b)
  return Meaning("order", names, "", "") if (b == c or d == a) and len(set(names)) == 3 else None


def _any_of(words: tuple[str, ...]) -> str:
  return f"({'|'.join(words)})"


_GRAMMARS = {
  "gap": _Grammar(
    re.compile(f"{_any_of(PEOPLE)} ([0-9][0-9]) {_any_of(UNITS)}, {_any_of(PEOPLE)} ([0-9][0-9])\\. who has more\\?"),
    _solve_gap,
    (
      "{0} (has|owns|holds) {n} (more {u}|{u} more) than {1}",
      "{0} (leads|beats|tops) {1} by {n}(| {u})",
      "{0} is {n}(| {u}) (ahead of|above|up on) {1}",
      "{1} (has|owns|holds) {n} (fewer {u}|{u} fewer) than {0}",
      "{1} (trails|lags|follows) {0} by {n}(| {u})",
      "{1} is {n}(| {u}) (behind|below|down on) {0}",
    ),
    onward=frozenset(["more", "leads", "beats", "tops", "ahead", "above", "up"]),
    backward=frozenset(["fewer", "trails", "lags", "follows", "behind", "below", "down"]),
  ),
  "late": _Grammar(
    re.compile(f"{_any_of(_VEHICLES)} due ([0-9][0-9]?):([0-5][0-9]), ([0-9][0-9]?) min late\\. when\\?"),
    _solve_late,
    (
      "(it|the {u}) (comes|arrives|gets in|pulls in|turns up) at ({n}|{spoken})",
      "at ({n}|{spoken}) (it|the {u}) (comes|arrives|gets in|pulls in|turns up)",
      "(expect|await|look for|meet) (it|the {u}) at ({n}|{spoken})",
      "(it|the {u}) will be (here|there|in) at ({n}|{spoken})",
    ),
  ),
  "order": _Grammar(
    re.compile("{0} (before|after) {0}\\. {0} (before|after) {0}\\. order\\?".format(_any_of(_EVENTS))),
    _solve_order,
    (
      "(|first |begin with |it is |we have ){0}, then {1}(, then| and then|, next) {2}",
      "{0} (is|comes|was) before {1}(, then| and then|, next) {2}",
      "{2} (is|comes|was) after {1}, (which is|itself) after {0}",
      "{2} follows {1}, which (follows|is after|comes after) {0}",
    ),
    onward=frozenset(["first", "begin", "then", "next", "before"]),
    backward=frozenset(["after", "follows"]),
  ),
}

# `5 past 8`
_SPOKEN = re.compile(r"(?<![0-9])([0-9]{1,2}) past ([0-9]{1,2})(?![0-9:])")


@functools.cache
def _forms(domain: str) -> tuple[str, ...]:
  """The domain's templates with every choice made."""
  choices = ([part.split("|") for part in re.split("[()]", template)] for template in _GRAMMARS[domain].templates)
  return tuple("".join(parts) for choice in choices for parts in itertools.product(*choice))


@functools.cache
def _style(domain: str) -> frozenset[str]:
  """The words of the domain's wordings that stand for nothing by themselves."""
  return frozenset(word for form in _forms(domain) for word in re.sub("{.*?}|,", " ", form).split())


def _sentence_words() -> tuple[str, ...]:
  """Every word of the sentence domains' questions and answers."""
  asked = {"after", "before", "due", "has", "late", "min", "more", "order", "quick", "when", "who"}
  said = set().union(*map(_style, _GRAMMARS))
  return tuple(sorted(asked | said | {*PEOPLE, *UNITS, *_VEHICLES, *_EVENTS}))


def _spoken(time: str) -> str:
  """`8:05` as `5 past 8`."""
  hour, _, minutes = time.partition(":")
  return f"{int(minutes)} past {hour}" if minutes else time


_SHORT = (_addition, _weekday, _letters, _price, _chain)
_SENTENCES = (_gap, _late, _order)
_MAKERS = {"short": _SHORT, "sentences": _SENTENCES, "all": _SHORT + _SENTENCES, "facts": (facts.make,)}
