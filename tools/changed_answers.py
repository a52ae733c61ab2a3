"""Wrong answers that look like right ones: a mathematical reference with one thing changed."""

import random
import re
from collections.abc import Iterator

# What stands once is taken for the other: relations, functions, sets, brackets, units, things.
_EXCHANGED = (
  ("=", " \\neq "), (" < ", " > "), (" > ", " < "), ("\\leq", "\\geq"), ("\\le ", "\\ge "), ("\\neq", "="),
  (" < ", "\\leq "), ("\\sin", "\\cos"), ("\\ln", "\\exp"), ("\\cup", "\\cap"), ("\\pi", ""), ("\\sqrt", ""),
  ("cm", "mm"), ("mph", "km"), ("hours", "days"), ("m/s", "km/s"), ("[", "("), ("]", ")"),
  ("\\mathbf{i}", "\\mathbf{k}"), ("apples", "pears"), ("\\infty", "0"),
)  # fmt: skip
# A letter by itself, neither of a word nor of a command.
_LETTER = re.compile(r"(?<![A-Za-z\\{])(?<!\\[a-z])[a-zA-Z](?![A-Za-z])")
# A zero has no sign: "-0" is no other number than "0".
_SIGN = re.compile(r"(?<![A-Za-z^{_])[+-](?!\s*0(?![\d.]))")


def changes(reference: str, rng: random.Random) -> Iterator[tuple[str, str]]:
  """Kind and text of each: one digit, sign, relation, unit, function, letter or item is another one."""
  for found in re.finditer(r"\d", reference):
    digit = rng.choice([d for d in "123456789" if d != found[0]])
    yield "digit", reference[: found.start()] + digit + reference[found.end() :]
  for found in _SIGN.finditer(reference):
    yield "sign", reference[: found.start()] + "+-"[found[0] == "+"] + reference[found.end() :]
  if re.match(r"[\d\\(]", reference) and not re.fullmatch(
    r"[0.,\s]*|\(.*,.*\)|\\(?:text|pm|{|emptyset|mathbb).*", reference
  ):
    yield "sign", f"-{reference}"
  for old, new in _EXCHANGED:
    if reference.count(old) == 1 and not (old == "=" and "\\neq" in reference):
      yield "exchanged", reference.replace(old, new)
  for found in _LETTER.finditer(re.sub(r"\\[A-Za-z]+", lambda name: "\\" * len(name[0]), reference)):
    other = rng.choice([c for c in "bcghkpqrsuvwz" if c not in reference.lower()] or ["Q"])
    yield "letter", reference[: found.start()] + other + reference[found.end() :]
  if "," in reference:
    if not reference.endswith((")", "]", "}")):
      yield "item", reference.rpartition(",")[0]
    yield "item", f"{reference}, 77"
