r"""Reads numbers as answers give them: 1,000; 4.5e33 erg/s; \frac{\pi}{2}; 1.5 \times 10^3 m; [1, 2.5]; 41.8^\circ.

Arithmetic in floats with a small parser of its own: linear in the length of a text, nothing is simplified, and a power
that overflows is infinite, so that no text makes it hang or raise.
"""

import math
import re
import unicodedata
from typing import NamedTuple

LIMIT = 1000  # characters; a longer text is no number
_DEPTH = 30  # of brackets
_LARGEST = 1e300  # integers have no end, floats have
_UNIT_WORDS = 4  # "kilojoules per square metre"


class Number(NamedTuple):
  """A number as it was written."""

  value: float  # an int where it was written as one; infinite or NaN where floats end
  percent: bool
  unit: str  # what stood after it, "" for nothing


_SUPERSCRIPTS = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+")
DASHES = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-"))  # hyphens, dashes, minus
# Multiplication sign, dots, division sign, fraction slash.
_SYMBOLS = str.maketrans({"\u00d7": "*", "·": "*", "⋅": "*", "÷": "/", "\u2044": "/", "π": "\\pi "})
_CLEAN = tuple(
  (re.compile(pattern), replacement)
  for pattern, replacement in (
    (r",\\! ?", ","),  # 10,\!080
    (r"\\(?:left|right|displaystyle|bigl?|bigr?|Bigl?|Bigr?)(?![A-Za-z])|\\[!,;:()\[\] ]|[$£€~]|\\\$", " "),
    (r"\{,\}", ","),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\^ ?(?:\{ ?\\circ ?\}|\\circ(?![A-Za-z]))|\\degrees?(?![A-Za-z])|°", " degrees "),
    (r"\\%", "%"),
    (r"\\(?:times|cdot|ast)(?![A-Za-z])", "*"),
    (r"\\div(?![A-Za-z])", "/"),
    (r"\*\*(?=[-\d({])", "^"),
    (r"\bnp\.", ""),
    (r"(?<=\d) *[xX] *(?=10 *\^)", "*"),
    (r"(?<=\d),(?=\d{3}(?!\d))", ""),
  )
)
_EQUALS = re.compile(r"=|≈|\\(?:approx|simeq|sim)(?![A-Za-z])")
_TOKEN = re.compile(
  r"\s*(?:((?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+(?!\w))?)|(\\[A-Za-z]+|[A-Za-zµμΩÅ]+)|([-+*/^!(){}\[\]]))"
)
_FUNCTIONS = {
  "sin": math.sin, "cos": math.cos, "tan": math.tan, "arcsin": math.asin, "arccos": math.acos, "arctan": math.atan,
  "asin": math.asin, "acos": math.acos, "atan": math.atan, "ln": math.log, "log": math.log, "exp": math.exp,
  "sinh": math.sinh, "cosh": math.cosh, "tanh": math.tanh, "sqrt": math.sqrt,
}  # fmt: skip
_CONSTANTS = {"pi": math.pi, "e": math.e}
_CLOSING = {"(": ")", "{": "}", "[": "]"}
_SCALES = {"hundred": 1e2, "thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
# Words, powers and quotients of words. A single letter may be a variable, so only units are let through.
_UNIT = re.compile(
  r"(?:[*/ {}()\[\]']|\\?(?:[A-Za-zµμΩÅ]{2,}+|[msgNJWVKACFTLMHΩÅ](?![A-Za-z]))(?:\.(?=[ }]|$))?|"
  r"\^ ?\{? ?[-+]? ?\d\}?)*+"
)
_WORD = re.compile(r"[A-Za-z]{2,}")
_NO_UNIT = re.compile(r"(?i)\b(?:or|and|plus|minus|times|not|if|sin|cos|tan|ln|log|exp|sqrt|pi|frac|infty|mod)\b")
_TEXT = re.compile(r"\\(?:text(?:rm|bf|it)?|mbox|mathrm|mathbf|operatorname|boxed|fbox|rm)(?![A-Za-z])\*? ?")
_LONE = re.compile(
  r"(?:^|(?<=[\s($=≈~:]))[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?(?:/\d+)?%?(?=$|[\s)$°;]|[.,](?:\s|$))"
)


def parse(text: str) -> Number | None:
  """The number that a whole text is, with or without a unit after it and "x =" before it, or None."""
  if len(text) > LIMIT:
    return None
  text = _SUPERSCRIPTS.sub(lambda found: f"^{{{unicodedata.normalize('NFKC', found[0])}}}", text.strip())
  text = text.translate(DASHES).translate(_SYMBOLS)
  if any(unicodedata.category(c) == "No" for c in text):  # ½, ①: not what they look like once normalised
    return None
  text = "".join(c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c) != "Cf")
  for pattern, replacement in _CLEAN:
    text = pattern.sub(replacement, text)
  *left, text = _EQUALS.split(text)
  if any("," in part or ";" in part for part in left):  # of several equations none is meant
    return None
  text = text.strip().rstrip(".").strip()
  parser = _Parser(_TEXT.sub(" ", text))
  try:
    value = parser.sum(0)
  except OverflowError:  # the rest does not matter any more
    return Number(math.inf, False, "")
  except (ValueError, ZeroDivisionError):
    return None
  if value is None:
    return None
  value = math.inf if abs(value) > _LARGEST else value
  rest = parser.rest().strip()
  percent = rest.startswith("%")
  rest = re.sub(r"^%|^\\?degrees?\b", "", rest).strip()
  if re.match(r"(?i)percent\b", rest):
    percent, rest = True, rest[len("percent") :].strip()
  scale, _, after = rest.partition(" ")
  if scale.lower() in _SCALES:
    value, rest = value * _SCALES[scale.lower()], after.strip()
  if rest and (not _UNIT.fullmatch(rest) or _NO_UNIT.search(rest) or len(_WORD.findall(rest)) > _UNIT_WORDS):
    return None
  return Number(value, percent, rest)


def lone(text: str) -> Number | None:
  """The number in a sentence that holds only one, or None."""
  found = _LONE.findall(text) if len(text) <= LIMIT and not re.search(r"[*^\[\]\\]|\+ *\w", text) else []
  return parse(found[0]) if len(found) == 1 else None


def parse_list(text: str) -> list[float] | None:
  """The numbers of a list, tuple, set, column vector or enumeration, or None."""
  if len(text) > LIMIT:
    return None
  text = re.sub(r"\\(?:begin|end)\{[a-z]*matrix\}|\\\\|&|;|\band\b", ",", text)
  text = re.sub(r"\\(?:left|right)(?![A-Za-z])|\\[!,;: ]|\$", " ", text).replace("\\{", "(")
  text = text.replace("\\}", ")").strip().rstrip(".").strip(" ,")
  if text[:1] in _CLOSING and text.endswith(_CLOSING[text[0]]):
    text = text[1:-1]
  items, depth, start = [], 0, 0
  for i, c in enumerate(text):
    depth += (c in "([{") - (c in ")]}")
    if c == "," and depth == 0:
      items.append(text[start:i])
      start = i + 1
  values = [parse(item) for item in (*items, text[start:]) if item.strip()]
  return None if not values or None in values else [number.value for number in values]


def equal(answer: float, reference: float, rtol: float = 0.0, atol: float = 0.0) -> bool:
  """Whether two numbers are the same up to `rtol` of the reference or `atol`.

  Whole numbers are compared exactly where no tolerance is given; others to six significant digits, which is how
  math-verify compares.
  """
  try:
    if not (math.isfinite(answer) and math.isfinite(reference)):
      return False
    if answer == reference:
      return True
    whole = answer == int(answer) and reference == int(reference)
    rtol = max(rtol, 0.0 if whole else 2e-6)
    return abs(answer - reference) <= max(rtol * abs(reference), atol) * (1 + 1e-9)
  except OverflowError:  # an integer that is no float
    return False


class _Parser:
  """Reads the longest arithmetic expression that a text begins with."""

  def __init__(self, text: str):
    self._text = text
    self._at = 0

  def rest(self) -> str:
    return self._text[self._at :]

  def sum(self, depth: int) -> float | None:
    total = self._product(depth)
    while total is not None:
      before = self._at
      sign = self._take("+-")
      term = self._product(depth) if sign else None
      if term is None:
        self._at = before
        return total
      total = total + term if sign == "+" else total - term
    return None

  def _product(self, depth: int) -> float | None:
    sign = 1
    while taken := self._take("+-"):
      sign = -sign if taken == "-" else sign
    total = self._power(depth)
    whole = isinstance(total, int)
    while total is not None:
      before = self._at
      operator = self._take("*/")
      if not operator:
        kind, token = self._peek()
        if kind not in ("word", "symbol") or (kind == "symbol" and token not in "({"):
          break
        if whole and token == "\\frac":  # 1\frac{4}{5}
          fraction = self._power(depth)
          if fraction is None:
            self._at = before
            break
          total, whole = total + fraction, False
          continue
      factor = self._power(depth)
      if factor is None:
        self._at = before
        break
      total, whole = total / factor if operator == "/" else total * factor, False
    return None if total is None else sign * total

  def _power(self, depth: int) -> float | None:
    base = self._atom(depth)
    if base is None:
      return None
    if self._take("!"):
      if not (isinstance(base, int) and 0 <= base <= 170):
        raise OverflowError
      base = math.factorial(base)
    before = self._at
    if self._take("^"):
      sign = -1 if self._take("-") else 1
      exponent = self._power(depth + 1) if depth < _DEPTH else None
      if exponent is None:
        self._at = before
        return base
      base = math.pow(base, sign * exponent)
    return base

  def _atom(self, depth: int) -> float | None:
    before = self._at
    kind, token = self._next()
    if depth < _DEPTH:
      if kind == "number":
        return int(token) if token.isdigit() else float(token)
      if kind == "symbol" and token in _CLOSING:
        value = self.sum(depth + 1)
        if value is not None and self._take(_CLOSING[token]):
          return value
      if kind == "word":
        value = self._word(token.removeprefix("\\"), depth)
        if value is not None:
          return value
    self._at = before
    return None

  def _word(self, name: str, depth: int) -> float | None:
    if name in _CONSTANTS:
      return _CONSTANTS[name]
    if name == "frac":
      above = self._argument(depth)
      below = self._argument(depth) if above is not None else None
      return None if below is None else above / below
    if name in _FUNCTIONS:
      root = 2.0
      if name == "sqrt" and self._take("["):
        root = self.sum(depth + 1)
        if root is None or not self._take("]"):
          return None
      argument = self._argument(depth) if name == "sqrt" else self._power(depth + 1)
      if argument is None:
        return None
      return _FUNCTIONS[name](argument) if root == 2.0 else math.pow(argument, 1 / root)
    return None

  def _argument(self, depth: int) -> float | None:
    r"""What \frac and \sqrt take: a group, a command, or one digit (\frac43)."""
    if digit := re.compile(r"\s*(\d)").match(self._text, self._at):
      self._at = digit.end()
      return int(digit[1])
    return self._atom(depth + 1)

  def _take(self, symbols: str) -> str:
    kind, token = self._peek()
    if kind == "symbol" and token in symbols:
      self._next()
      return token
    return ""

  def _peek(self) -> tuple[str, str]:
    before = self._at
    found = self._next()
    self._at = before
    return found

  def _next(self) -> tuple[str, str]:
    found = _TOKEN.match(self._text, self._at)
    if not found:
      return "", ""
    self._at = found.end()
    kind = ("number", "word", "symbol")[found.lastindex - 1]
    return kind, found[found.lastindex]
