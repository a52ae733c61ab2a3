r"""Reads numbers as answers give them: 1,000; 4.5e33 erg/s; \frac{\pi}{2}; 1.5 \times 10^3 m; [1, 2.5]; 41.8^\circ.

Arithmetic with a small parser of its own: integers are exact up to a size, all else are floats. It is linear in the
length of a text, nothing is simplified, and what overflows is infinite, so that no text makes it hang or raise.
"""

import math
import re
import unicodedata
from typing import NamedTuple

from rlpr_jax.grading.texts import compatible

LIMIT = 1000  # characters; a longer text is no number
_DEPTH = 30  # of brackets
_LARGEST = 1e300  # integers have no end, floats have
_BITS = 3000  # of an integer's power; a larger one is a float, which ends before
_UNIT_WORDS = 4  # "kilojoules per square metre"


class Unit(NamedTuple):
  """A unit: the text after a number, in one spelling."""

  measures: tuple[tuple[str, int], ...]  # symbols and their powers: (("m", 1), ("s", -1))
  words: frozenset[str]  # what is counted: "cars"
  certain: bool  # that it is no product of variables, which "m" and "m g" may be

  def same(self, other: "Unit") -> bool:
    """Whether both mean the same: equal measures, or a word in common where nothing is measured."""
    return self.measures == other.measures and bool(self.measures or self.words & other.words)

  def converts(self, other: "Unit") -> bool:
    """Whether both measure the same: cm and m."""
    return bool(self.measures and other.measures) and self.scale()[1] == other.scale()[1] != {}

  def scale(self) -> tuple[float, dict[str, int]]:
    """Its size in base units, and the powers of those: 36 km/h is 10 m/s."""
    size, powers = 1.0, dict[str, int]()
    for symbol, power in self.measures:
      factor, base = _in_base(symbol)
      size *= factor**power
      powers[base] = powers.get(base, 0) + power
    return size, {base: power for base, power in powers.items() if power}


class Number(NamedTuple):
  """A number as it was written."""

  value: float  # an int where it was written as one; infinite or NaN where floats end
  percent: bool
  unit: Unit | None
  equation: bool  # whether more than a name stood left of it: x + 2y = 5


def _mixed(whole: str, above: str, below: str) -> str:
  """A mixed number as a sum, "" where the fraction is none below 1."""
  return f"({whole}+{above}/{below})" if int(above) < int(below) else ""


_SUPERSCRIPTS = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+")
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
    (r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d])", lambda found: found[0].replace(",", "")),
    (r"(?<![\d.,])\d{1,3}(?: \d{3})+(?!\d)", lambda found: found[0].replace(" ", "")),
    (r"(?<![\d.,^/)}\]])(\d+) (\d+)/(\d+)(?![\d.,])", lambda found: _mixed(*found.groups()) or found[0]),  # 1 1/2
  )
)
_EQUALS_OR_BRACKET = re.compile(r"=|≈|\\(?:approx|simeq|sim)(?![A-Za-z])|[(){}\[\]]")
_TOKEN = re.compile(
  r"\s*(?:((?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+(?!\w))?)|(\\[A-Za-z]+|[A-Za-zµμΩÅ]+)|([-+*/^!(){}\[\]]))"
)
_FUNCTIONS = {
  "sin": math.sin, "cos": math.cos, "tan": math.tan, "arcsin": math.asin, "arccos": math.acos, "arctan": math.atan,
  "asin": math.asin, "acos": math.acos, "atan": math.atan, "ln": math.log, "log": math.log, "exp": math.exp,
  "sinh": math.sinh, "cosh": math.cosh, "tanh": math.tanh, "sqrt": math.sqrt,
}  # fmt: skip
_ANGLE = re.compile(r"(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_CONSTANTS = {"pi": math.pi, "e": math.e}
_CLOSING = {"(": ")", "{": "}", "[": "]"}
# In units that stand for themselves; degrees and temperatures are left out, since they have no common zero.
_CONVERSIONS = {
  "min": (60.0, "s"), "h": (3600.0, "s"), "d": (86400.0, "s"), "week": (604800.0, "s"), "in": (0.0254, "m"),
  "ft": (0.3048, "m"), "yd": (0.9144, "m"), "mi": (1609.344, "m"), "Å": (1e-10, "m"), "lb": (453.59237, "g"),
  "oz": (28.349523125, "g"), "cent": (0.01, "dollar"), "eV": (1.602176634e-19, "J"), "Wh": (3600.0, "J"),
}  # fmt: skip
_POWERS_OF_TEN = {
  "f": 1e-15, "p": 1e-12, "n": 1e-9, "μ": 1e-6, "m": 1e-3, "c": 1e-2, "d": 1e-1, "h": 1e2, "k": 1e3, "M": 1e6,
  "G": 1e9, "T": 1e12,
}  # fmt: skip
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}

_SPELLINGS = {
  "m": "metre meter", "g": "gram gramme", "s": "second sec", "N": "newton", "J": "joule", "W": "watt", "V": "volt",
  "A": "ampere amp", "C": "coulomb celsius centigrade", "F": "farad fahrenheit", "K": "kelvin", "T": "tesla",
  "H": "henry", "Hz": "hertz hz", "Pa": "pascal", "mol": "mole", "L": "l liter litre", "Ω": "ohm", "eV": "electronvolt",
  "cal": "calorie", "B": "byte", "bit": "bit", "bar": "bar", "pc": "parsec", "rad": "radian", "Wh": "watthour",
  "M": "molar", "Å": "angstrom ångström", "S": "siemens", "erg": "erg", "dyn": "dyne", "AU": "au", "ly": "lightyear",
  "h": "hour hr", "min": "minute", "d": "day", "week": "week wk", "month": "month", "yr": "year", "in": "inch inches",
  "ft": "foot feet", "yd": "yard", "mi": "mile", "lb": "pound", "oz": "ounce", "dollar": "dollar usd", "cent": "cent",
  "euro": "euro eur", "°": "degree deg", "rpm": "rpm", "mph": "mph", "atm": "atm atmosphere", "ha": "hectare",
}  # fmt: skip
_BASES = {name: symbol for symbol, names in _SPELLINGS.items() for name in (symbol, *names.split())}
_PREFIXES = {
  "f": "femto", "p": "pico", "n": "nano", "μ": "micro", "u": "micro", "m": "milli", "c": "centi", "d": "deci",
  "h": "hecto", "k": "kilo", "M": "mega", "G": "giga", "T": "tera",
}  # fmt: skip
_PREFIXED = frozenset((
  "m", "g", "s", "N", "J", "W", "V", "A", "F", "T", "H", "Hz", "Pa", "mol", "L", "Ω", "eV", "cal", "B", "bit", "bar",
  "pc", "rad", "Wh", "M", "S",
))  # fmt: skip
# A single letter may be a variable, so only units are let through; two small ones may be a product of variables.
_LETTERS = frozenset("msgNJWVKACFTLMHΩÅ")
_CERTAIN = frozenset(
  ("cm", "mm", "km", "kg", "Hz", "Pa", "eV", "kJ", "kW", "kN", "kV", "mL", "ft", "in", "lb", "oz", "hr")
)
_FILLERS = frozenset(("of", "the", "a", "an", "one", "each", "total", "about", "exactly", "unit", "units", "in"))
_SQUARES = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cubed": 3}
_UNIT_SYMBOLS = tuple(
  (re.compile(pattern), replacement)
  for pattern, replacement in (
    (r"\^ ?\{? ?([-+]?) ?(\d)\}?", r"^\1\2 "),
    (r"\\mu(?![A-Za-z])[ {}]*", "μ"),
    (r"\\Omega(?![A-Za-z])", "Ω"),
    (r"\\AA(?![A-Za-z])", "Å"),
  )
)
_BRACKETS = re.compile(r"[{}()\[\]]")
_UNIT = re.compile(r"(?:[*/ ']|[A-Za-zμΩÅåö]++(?:\.(?= |$))?|\^[-+]?\d)*+")
_UNIT_TOKEN = re.compile(r"/|\^[-+]?\d|[A-Za-zμΩÅåö]+")
_WORD = re.compile(r"[A-Za-z]{2,}")
_NO_UNIT = re.compile(r"(?i)\b(?:or|and|plus|minus|times|not|if|sin|cos|tan|ln|log|exp|sqrt|pi|frac|infty|mod)\b")
_QUOTED = re.compile(r"\\(?:text(?:rm|bf|it)?|mbox|mathrm)(?![A-Za-z])\*? ?\{([^{}]*)\}")
# Where one of these stands left of "=" it is no value that is given, or not the only one.
_UNDECIDED = re.compile(
  r"(?i)[<>\u2264\u2265\u2260,;]|\\(?:[lg](?:eq?(?:slant)?|t)|neq?|lor|vee)(?![A-Za-z])|\b(?:or|and|not|nor)\b|"
  r"(?<![\d)\]}])!$|"  # x != 5, but not 5! = 120
  r"[\d)}\]]\s*(?:\n|\\\\|\\\s|\\q?quad(?![A-Za-z]))\s*&?\s*\\?[A-Za-z]"  # x = 2 \quad x = 3
)
_COMPOSITE = re.compile(r"^\s*\d|(?<![A-Za-z]{2})[-+]")  # 2x, x + y, but not "non-negative x"
_TEXT = re.compile(r"\\(?:text(?:rm|bf|it)?|mbox|mathrm|mathbf|operatorname|boxed|fbox|rm)(?![A-Za-z])\*? ?")
# 10-20, $5-$10, 5% - 10%, 10-20 km: from the smaller to the larger; 2023-01-05, 12/25/2023, 7:40 pm.
_RANGE = re.compile(r"[$€£¥]?(\d[\d,]*(?:\.\d+)?)%?\s*-\s*[$€£¥]?(\d[\d,]*(?:\.\d+)?)%?(?: ?[A-Za-z]{1,20}\.?)?")
_DATE_OR_TIME = re.compile(
  r"\d{4}([-/.])\d{1,2}\1\d{1,2}|\d{1,2}([-/.])\d{1,2}\2\d{4}|\d{1,2}:\d\d(?::\d\d)?(?: ?[AaPp]\.?[Mm]\.?)?"
)
# Numbers of three digits each, which may be groups of one number: 100,200,300.
_GROUPS = re.compile(r"[1-9]\d\d(?:,[1-9]\d\d)+")
_CURRENCIES = (
  ("$", re.compile(r"\\\$\s?\d|(?<![A-Za-z])(?i:dollars?|usd)\b")),
  ("€", re.compile(r"€|(?<![A-Za-z])(?i:euros?|eur)\b")),
  ("£", re.compile(r"£|(?<![A-Za-z])(?i:gbp|sterling)\b")),
  ("¥", re.compile(r"¥|(?<![A-Za-z])(?i:yen|yuan|cny|jpy)\b")),
)
_DOLLAR_SIGN = re.compile(r"\$\s?-?\d")
_SMALL = (
  "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
  "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_WORDS = {word: i for i, word in enumerate(_SMALL)} | {word: 10 * i for i, word in enumerate(_TENS, 2)}
_NUMERAL = rf"(?:{'|'.join(sorted((*_WORDS, *_SCALES), key=len, reverse=True))})"
_SPELLED = re.compile(
  rf"(?:a (?=hundred|thousand|million|billion))?{_NUMERAL}(?:(?:-| and | |, ){_NUMERAL})*+\b", re.IGNORECASE
)
_PART = re.compile(r"[ -](?:hal(?:f|ves)|thirds?|quarters?|\w+ths?)\b")
# What makes a number in a sentence another one than that which is meant.
_DENIED = re.compile(r"(?i)\b(?:not|cannot|never|neither|nor|wrong|incorrect|impossible)\b|n['\u2019]t\b")
_BOUNDED = re.compile(
  r"(?i)\b(?:than|but|except(?: for)?|excluding|besides|without|instead of|at (?:least|most)|up to|under|over|above"
  r"|below|exceed(?:s|ing)?|unlike|minus|almost|within|beyond|equal to or|between|to)[ ~$€£]{1,2}$"
)
_OR_MORE = re.compile(
  r"(?i)[^\w.;]{0,3}(?:\w+ )?(?:(?:or|and) (?:more|less|fewer|above|below|over|under|up|greater|higher|lower)"
  r"|at (?:most|least))\b|\+(?!\d)"
)
_LONE = re.compile(
  r"(?:^|(?<=[\s($=≈~:]))[-+]?(?:(?:\d{1,3}(?: \d{3})+(?!\d)|\d[\d,]*)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?(?:/\d+)?%?"
  r"(?=$|[\s)$°;]|[.,](?:\s|$))"
)


def parse(text: str) -> Number | None:
  """The number that a whole text is, with or without a unit after it and "x =" before it, or None.

  >>> parse("1.5e3 m").value, parse("25%").percent, parse("many") is None
  (1500.0, True, True)
  """
  if len(text) > LIMIT or _DATE_OR_TIME.fullmatch(text.strip()):
    return None
  text = _SUPERSCRIPTS.sub(lambda found: f"^{{{unicodedata.normalize('NFKC', found[0])}}}", text.strip())
  if any(unicodedata.category(c) == "No" for c in text):  # ½, ①: not what they look like once normalised
    return None
  text = compatible(text).translate(_SYMBOLS)
  for pattern, replacement in _CLEAN:
    text = pattern.sub(replacement, text)
  if " degrees " in text and _ANGLE.search(text):  # sin 30 degrees is no sin 30 in degrees
    return None
  sides = _sides(text)
  if sides is None:
    return None
  name, text = sides
  text = text.strip().rstrip(".").strip()
  quoted = frozenset(_UNIT_TOKEN.findall(" ".join(_QUOTED.findall(text))))
  parser = _Parser(_TEXT.sub(" ", text))
  try:
    value = parser.sum(0)
  except OverflowError:  # the rest does not matter any more
    return Number(math.inf, False, None, False)
  except (ValueError, ZeroDivisionError):
    return None
  if value is None:
    return None
  value = math.inf if abs(value) > _LARGEST else value
  equation = bool(_COMPOSITE.search(name)) and not _is_arithmetic(name)
  if equation and not value:  # x^2 - 4 = 0 says of nothing that it is 0
    return None
  rest = parser.rest()
  percent = rest.lstrip().startswith("%")
  rest = re.sub(r"^\s*%", "", rest)
  if found := re.match(r"(?i)\s*\{?\s*percent\b", rest):
    percent, rest = True, rest[found.end() :]
  scale, _, after = rest.strip().partition(" ")
  if scale.lower() in _SCALES:
    value, rest = value * _SCALES[scale.lower()], f" {after}"
  if not rest.strip(" {}"):
    return Number(value, percent, None, equation)
  unit = _unit(rest, quoted)
  if unit is None or (parser.is_sum and not unit.certain):  # 10 - 2m
    return None
  return Number(value, percent, unit if unit.measures or unit.words else None, equation)


def lone(text: str) -> Number | None:
  """The number in a sentence that holds only one, or None.

  >>> lone("There are 42 apples.").value
  42
  >>> lone("anything but 5"), lone("5 or more")
  (None, None)
  """
  if len(text) > LIMIT or re.search(r"[*^\[\]\\<>\u2264\u2265\u2260]|!=|\+ *\w", text) or _DENIED.search(text):
    return None
  found = list(_LONE.finditer(text))
  if any(_BOUNDED.search(text[: one.start()]) or _OR_MORE.match(text, one.end()) for one in found):
    return None
  if len(found) != 1 or (re.search("[A-Za-z]", text) and not re.search("[A-Za-z]{3}|[A-Za-z]{2} .*\\d", text)):
    return None  # 5 x y is no sentence
  return parse(text[found[0].start() :]) or parse(found[0][0])


def spelled(text: str) -> Number | None:
  """The number that a text is in words, with or without what is counted after it, or None.

  >>> spelled("twenty-five apples").value, spelled("Seven Samurai") is None, spelled("two thirds") is None
  (25, True, True)
  """
  text = text.strip().rstrip(".!")
  found = _SPELLED.match(text) if len(text) <= LIMIT else None
  if found is None or _PART.match(text, found.end()) or text[found.end() :].lstrip()[:1].isupper():
    return None
  total, group = 0, 0
  previous = ""
  for word in re.findall(r"[a-z]+", found[0].lower().replace(" and ", " ")):
    if word == "hundred":
      group = (group or 1) * 100
    elif word in _SCALES:
      total, group = total + (group or 1) * _SCALES[word], 0
    elif word in _WORDS:
      if previous in _WORDS and not (_WORDS[previous] >= 20 and 0 < _WORDS[word] < 10):  # "five six" is no number
        return None
      group += _WORDS[word]
    previous = word
  return parse(f"{total + group}{text[found.end() :]}")


def is_span(text: str) -> bool:
  """Whether a text is a range, a date or a time of day, which looks like arithmetic and is none.

  >>> is_span("10-20"), is_span("2023-01-05"), is_span("20 - 10"), is_span("3/4")
  (True, True, False, False)
  """
  text = compatible(text[: LIMIT + 1]).strip().rstrip(".")
  if found := _RANGE.fullmatch(text):
    return float(found[1].replace(",", "")) < float(found[2].replace(",", ""))
  return _DATE_OR_TIME.fullmatch(text) is not None


def grouped_list(text: str) -> list[float] | None:
  """The numbers of three digits each that a text may be as well as one number with separators, or None.

  >>> grouped_list("100,200,300"), grouped_list("1,234"), grouped_list("150,000")
  ([100, 200, 300], None, None)
  """
  text = text.strip()
  return [int(item) for item in text.split(",")] if len(text) <= LIMIT and _GROUPS.fullmatch(text) else None


def currencies(text: str) -> set[str]:
  """The signs of the currencies that a text names.

  >>> currencies("$50"), currencies("50 euros"), currencies("$x$")
  ({'$'}, {'€'}, set())
  """
  signs = {sign for sign, pattern in _CURRENCIES if pattern.search(text)}
  is_mathematics = text.count("$") % 2 == 0  # $50$
  return signs if is_mathematics or not _DOLLAR_SIGN.search(text) else signs | {"$"}


def _sides(text: str) -> tuple[str, str] | None:
  """Splits at the first and the last "=" that is in no brackets; None for more than one value."""
  depth, ends = 0, []
  for token in _EQUALS_OR_BRACKET.finditer(text):
    if token[0] in _CLOSING:
      depth += 1
    elif token[0] in _CLOSING.values():
      depth = max(depth - 1, 0)
    elif not depth:
      ends.append(token)
  if not ends:
    return "", text
  depth, kept = 0, []
  for c in _QUOTED.sub(r" \1 ", text[: ends[-1].start()]):
    depth = max(depth - (c in ")}]"), 0)
    if not depth:
      kept.append(c)
    depth += c in _CLOSING
  return None if _UNDECIDED.search("".join(kept)) else (text[: ends[0].start()], text[ends[-1].end() :])


def _is_arithmetic(text: str) -> bool:
  parser = _Parser(text)
  try:
    return parser.sum(0) is not None and not parser.rest().strip()
  except (OverflowError, ValueError, ZeroDivisionError):
    return False


def _in_base(symbol: str) -> tuple[float, str]:
  """Factor and base unit of a unit: cm is 0.01 m."""
  if symbol not in _BASES.values() and symbol[0] in _POWERS_OF_TEN and symbol[1:] in _PREFIXED:
    factor, base = _in_base(symbol[1:])
    return _POWERS_OF_TEN[symbol[0]] * factor, base
  return _CONVERSIONS.get(symbol, (1.0, symbol))


def _unit(rest: str, quoted: frozenset[str]) -> Unit | None:
  r"""The unit that what follows a number is, or None where it may as well be variables: 5ab, 5/x, 2^{2m}.

  Args:
    quoted: words that stood in \text or the like, which are no variables.
  """
  for pattern, replacement in _UNIT_SYMBOLS:
    rest = pattern.sub(replacement, rest)
  spaced, rest = rest[:1].isspace(), _BRACKETS.sub(" ", rest).strip()
  if rest.startswith("^") or not _UNIT.fullmatch(rest) or _NO_UNIT.search(rest):
    return None
  if len(_WORD.findall(rest)) > _UNIT_WORDS:
    return None
  if rest.startswith("/"):  # 1/s may be a variable's reciprocal
    spaced = False
  measures: dict[str, int] = {}
  words: set[str] = set()
  certain = True
  power = sign = 1
  last = ""
  tokens = _UNIT_TOKEN.findall(rest)
  for token in tokens:
    symbol = "" if token.lower() == "in" and len(tokens) > 1 else _symbol(token)
    if token == "/" or token.lower() == "per":
      sign = -1
    elif token.startswith("^"):
      if last:
        measures[last] *= int(token[1:])
    elif token.lower() in _SQUARES:
      if last and token.lower().endswith("ed"):
        measures[last] *= _SQUARES[token.lower()]
      else:
        power = _SQUARES[token.lower()]
    elif symbol and (len(token) > 1 or token in _LETTERS or token in quoted or sign < 0):
      measures[symbol] = measures.get(symbol, 0) + sign * power
      power, last = 1, symbol
      spaced = True
      certain &= token in quoted or len(token) > 2 or token in _CERTAIN
    elif token.lower() not in _FILLERS:
      if token not in quoted and not (spaced and len(token) > 2):
        return None
      certain &= token in quoted or len(token) > 3
      words.add(_singular(token.lower()))
      last, spaced = "", True
  if rest.startswith("/") and not certain:
    return None
  if len(measures) > 1 and measures.keys() <= {"°", "C", "F", "K"}:  # degrees Celsius
    del measures["°"]
  return Unit(tuple(sorted(measures.items())), frozenset(words), certain)


def _symbol(word: str) -> str:
  """The symbol of a unit of measure: km for "kilometers", "" for what is none."""
  for name in (word, word.lower(), _singular(word.lower())):
    if name in _BASES and (len(word) > 1 or name == word):
      return _BASES[name]
    for symbol, prefix in _PREFIXES.items():
      if name.startswith(prefix) and _BASES.get(name[len(prefix) :]) in _PREFIXED:
        return symbol + _BASES[name[len(prefix) :]]
  for name in (word, word.lower()):
    if name[0] in _PREFIXES and (name[1:] in _PREFIXED or name[1:] == "l"):
      return ("μ" if name[0] == "u" else name[0]) + _BASES[name[1:]]
  return ""


def _singular(word: str) -> str:
  for pattern, singular in ((r"(?<=..)ies$", "y"), (r"(?<=..)(?:(?<=x)|(?<=ss)|(?<=ch)|(?<=sh))es$", "")):
    if re.search(pattern, word):
      return re.sub(pattern, singular, word)
  return word.removesuffix("s") if len(word) > 3 or word in ("lbs", "hrs", "yrs") else word


def parse_list(text: str) -> list[float] | None:
  """The numbers of a list, tuple, set, column vector or enumeration, or None.

  >>> parse_list("[1, 2.5]"), parse_list("3 and 4")
  ([1, 2.5], [3, 4])
  """
  if len(text) > LIMIT:
    return None
  text = re.sub(r"\\(?:begin|end)\{[a-z]*matrix\}|\\\\|&|;|\band\b", ",", text)
  text = re.sub(r"\\(?:left|right)(?![A-Za-z])|\\[!,;: ]|\$", " ", text).replace("\\{", "(")
  text = text.replace("\\}", ")").strip().rstrip(".").strip(" ,")
  if text[:1] in _CLOSING and text.endswith(_CLOSING[text[0]]):
    text = text[1:-1]
  items = []
  depth, start = 0, 0
  for i, c in enumerate(text):
    depth += (c in "([{") - (c in ")]}")
    if c == "," and depth == 0:
      items.append(text[start:i])
      start = i + 1
  texts = [item for item in (*items, text[start:]) if item.strip()]
  values = [number.value for item in texts if (number := parse(item))]
  return values if values and len(values) == len(texts) else None


def same(ours: Number, theirs: Number, rtol: float = 0.0, atol: float = 0.0) -> bool:
  """Whether two numbers are equal within the tolerances, in units that convert where both have some.

  5% is also 0.05 where only one of them has a percent sign.

  >>> same(parse("5 cm"), parse("0.05 m")), same(parse("5 cm"), parse("0.05 kg"))
  (True, False)
  """
  values = [ours.value]
  if ours.unit and theirs.unit and not ours.unit.same(theirs.unit):
    if not ours.unit.converts(theirs.unit):
      return False
    values = [ours.value * ours.unit.scale()[0] / theirs.unit.scale()[0]]
    rtol = max(rtol, 2e-6)
  if ours.percent != theirs.percent:
    values.append(ours.value / 100 if ours.percent else ours.value * 100)
  return any(equal(value, theirs.value, rtol, atol) for value in values)


def equal(answer: float, reference: float, rtol: float = 0.0, atol: float = 0.0) -> bool:
  """Whether two numbers are the same up to `rtol` of the reference or `atol`.

  Whole numbers are compared exactly where no tolerance is given; others to six significant digits, which is how
  math-verify compares.

  >>> equal(0.3333333, 1 / 3), equal(41, 42), equal(41, 42, rtol=0.05)
  (True, False, True)
  """
  if isinstance(answer, int) and isinstance(reference, int) and not (rtol or atol):  # floats skip integers above 2^53
    return answer == reference
  try:
    if not (math.isfinite(answer) and math.isfinite(reference)):
      return False
    if answer == reference:
      return True
    whole = answer == int(answer) and reference == int(reference)
    # Large floats are whole without having been meant to be: 6.02e23 is 6.02 * 10^23 but for the last bits.
    exact = 1e-12 if max(abs(answer), abs(reference)) > 2**53 else 0.0
    rtol = max(rtol, exact if whole else 2e-6)
    return abs(answer - reference) <= max(rtol * abs(reference), atol) * (1 + 1e-9)
  except OverflowError:  # an integer that is no float
    return False


def _quotient(above: float, below: float) -> float:
  exact = isinstance(above, int) and isinstance(below, int) and below and above % below == 0
  return above // below if exact else above / below


def _to_power(base: float, exponent: float) -> float:
  if isinstance(base, int) and isinstance(exponent, int) and exponent >= 0 and base.bit_length() * exponent <= _BITS:
    return int(base**exponent)
  return math.pow(base, exponent)


class _Parser:
  """Reads the longest arithmetic expression that a text begins with."""

  def __init__(self, text: str):
    self._text = text
    self._at = 0
    self.is_sum = False  # whether the last of `sum` outside of brackets had several terms

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
      self.is_sum |= depth == 0
    return None

  def _product(self, depth: int) -> float | None:
    sign = 1
    while taken := self._take("+-"):
      sign = -sign if taken == "-" else sign
    start = self._at
    total = self._power(depth)
    whole = self._text[start : self._at].strip().isdigit()
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
      total, whole = _quotient(total, factor) if operator == "/" else total * factor, False
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
      base = _to_power(base, sign * exponent)
    return base

  def _atom(self, depth: int) -> float | None:
    before = self._at
    kind, token = self._next()
    if depth < _DEPTH:
      if kind == "number":
        whole, _, decimals = token.partition(".")
        return int(whole) if whole.isdigit() and not decimals.strip("0") else float(token)
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
      return None if above is None or below is None else _quotient(above, below)
    if name in _FUNCTIONS:
      root = 2.0
      if name == "sqrt" and self._take("["):
        degree = self.sum(depth + 1)
        if degree is None or not self._take("]"):
          return None
        root = degree
      argument = self._argument(depth) if name == "sqrt" else self._power(depth + 1)
      if argument is None:
        return None
      return _FUNCTIONS[name](argument) if root == 2.0 else math.pow(argument, 1 / root)
    return None

  def _argument(self, depth: int) -> float | None:
    r"""Reads an argument of \frac or \sqrt: a group, a command, or one digit (\frac43)."""
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
    token = self._next()
    self._at = before
    return token

  def _next(self) -> tuple[str, str]:
    token = _TOKEN.match(self._text, self._at)
    if not token or not token.lastindex:
      return "", ""
    self._at = token.end()
    kind = ("number", "word", "symbol")[token.lastindex - 1]
    return kind, token[token.lastindex]
