"""The built-in question set: five small domains with free-form answers, and demonstrations for a warm start.

Everything is made from a seed, so it needs no download. Questions are split into training and held-out ones by a hash
of their text: no held-out question is ever demonstrated or trained on.

The demonstrations mix three ways of thinking, as text from the world does:
  careful    every step written out, right answer
  terse      no thought worth the name, right answer
  careless   a step goes wrong (a forgotten carry, a miscount), and the answer follows from it
A policy warm-started on the mixture answers right when it happens to think carefully. Which way of thinking makes the
reference answer probable is what RLPR has to find out.
"""

import hashlib
import random
from collections.abc import Callable
from typing import NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlpr_jax.data.sources import Example
from rlpr_jax.errors import InputError
from rlpr_jax.rewards import TEMPLATE_TAGS

CAREFUL, TERSE = 0.45, 0.25  # shares of the mixture; the rest is careless
HELD_OUT_IN = 5  # one question in five is held out

_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
_TAGS = TEMPLATE_TAGS["think"]
_SPECIAL = ("<pad>", "<end>", "<q>", "<a>")
_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 +-*=?,.:'()/$%#><!;"
_CHAT_TEMPLATE = (
  "{% for m in messages %}{% if m['role'] == 'user' %}<q>{{ m['content'] }}"
  "{% elif m['role'] == 'assistant' %}<a>{{ m['content'] }}<end>{% endif %}{% endfor %}"
  "{% if add_generation_prompt %}<a>{% endif %}"
)


class Question(NamedTuple):
  """A question, its reference answer, and a careful and a careless way to think about it."""

  domain: str
  text: str
  answer: str
  careful: str
  careless: str
  careless_answer: str


def tokenizer() -> PreTrainedTokenizerFast:
  """One token a character and one a tag, 64 in all, with a chat template: `<q>question<a>response<end>`."""
  words = (*_SPECIAL, *_TAGS, *_CHARACTERS)
  inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
  inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
  inner.decoder = decoders.Fuse()
  inner.add_tokens([AddedToken(tag, normalized=False) for tag in _TAGS])
  inner.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in _SPECIAL])
  return PreTrainedTokenizerFast(
    tokenizer_object=inner, pad_token="<pad>", eos_token="<end>", chat_template=_CHAT_TEMPLATE
  )


def examples(split: str, count: int, seed: int = 0) -> list[Example]:
  """`count` different questions of the split "train" or "held_out", the domains taking turns."""
  return [
    Example(({"role": "user", "content": question.text},), question.answer, question.domain, row)
    for row, question in enumerate(_questions(split, count, seed))
  ]


def demonstrations(count: int, seed: int = 0) -> list[tuple[Example, str]]:
  """`count` training questions, each with one response in the mixture of the three ways of thinking."""
  rng = random.Random(f"demonstrations {seed}")
  pairs = []
  while len(pairs) < count:
    question = _DOMAINS[len(pairs) % len(_DOMAINS)](rng)
    if not _is_held_out(question.text):
      example = Example(({"role": "user", "content": question.text},), question.answer, question.domain, len(pairs))
      pairs.append((example, _demonstrate(question, rng)))
  return pairs


def _questions(split: str, count: int, seed: int) -> list[Question]:
  rng = random.Random(f"{split} {seed}")
  chosen: dict[str, Question] = {}
  for _ in range(100 * count):
    if len(chosen) == count:
      return list(chosen.values())
    question = _DOMAINS[len(chosen) % len(_DOMAINS)](rng)
    if _is_held_out(question.text) == (split == "held_out"):
      chosen.setdefault(question.text, question)
  raise InputError(f"built-in questions: {count} {split} questions were asked for, only {len(chosen)} could be made")


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
  a, b, c = rng.randint(2, 9), rng.randint(2, 9), rng.randint(1, 9)

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


_DOMAINS: tuple[Callable[[random.Random], Question], ...] = (_addition, _weekday, _letters, _price, _chain)
