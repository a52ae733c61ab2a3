r"""Whether two mathematical answers are the same: numbers with units, expressions, equations, intervals, lists.

Both texts are first brought into one spelling (`spelling`), then taken apart: lists into items, of which there must
be as many; equations and inequalities into sides; sets, intervals, tuples and matrices into their parts. What is left
are numbers (`numbers`) and expressions, which are compared by their values (`expressions`). What cannot be read, or
confirmed in this way, is not equal; of sums, integrals, limits and derivatives math-verify is asked (`mathverify`).
"""

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple, TypeVar

from rlpr_jax.grading import expressions, latex, mathverify, numbers, spelling
from rlpr_jax.grading.expressions import UndefinedError
from rlpr_jax.grading.latex import CONVENTIONS, Node, UnreadableError

LIMIT = 1000  # characters; a longer text is equal to itself alone
_ITEMS = 60  # of a list
_UNLIKE = 12  # items of two lists that are not written alike
_DEPTH = 6  # lists in sets in relations ...

T = TypeVar("T")

# --------------------------------------------------------------------------------------------------------- comparing


def equal(answer: str, reference: str) -> str:
  r"""Why two texts are equal as mathematics: "same expression", "equal number" or "equal expression", or "".

  Raises:
    InputError: math-verify is not installed, and the texts are not the same at sight.

  >>> equal("x = \\frac12", "0.5"), equal("1, 2, 3", "1, 2")
  ('equal number', '')
  """
  if answer.split() == reference.split() != []:
    return "same expression"  # of any length
  if max(len(answer), len(reference)) > LIMIT or not answer.strip():
    return ""
  expected = spelling.normalized(reference)
  for reading in _readings(answer):
    if why := _equal(spelling.normalized(reading), expected):
      return why
  if not re.search("[A-Za-z]{2}", answer) or _DENIED.search(answer):
    return ""
  ours, theirs = numbers.lone(answer), numbers.parse(reference)  # of a sentence
  if not ours or not theirs or theirs.equation or (theirs.unit and not theirs.unit.certain):
    return ""
  return "equal number" if numbers.same(ours, theirs) else ""


_MATHEMATICS = r"\$\$.+?\$\$|\\\[.+?\\\]|\\\(.+?\\\)|(?<!\\)\$[^$]+(?<!\\)\$"
_LAST_MATHEMATICS = re.compile(rf"(?:{_MATHEMATICS})(?:(?:\s|,|and|or)*(?:{_MATHEMATICS}))*", re.DOTALL)
_DENIED = re.compile(r"(?i)\b(?:not|no|never|neither|nor|cannot|wrong|incorrect|except|unless|false)\b|n't\b")


def _readings(answer: str) -> Iterator[str]:
  """The answer itself; without a label before it; of a sentence also the last mathematics in it."""
  yield answer
  if label := re.match(r"\s*(?:[A-Z][a-z]+ ?){1,3}:\s*(?=\S)", answer):
    yield answer[label.end() :]
  spans = list(_LAST_MATHEMATICS.finditer(answer))
  prose = _LAST_MATHEMATICS.sub(" ", answer)
  if spans and re.search(r"(?<!\\)\b[A-Za-z]{2,}", prose) and not _DENIED.search(prose):
    parts = re.findall(_MATHEMATICS, spans[-1][0], re.DOTALL)
    yield ", ".join(part.strip("$ \n").removesuffix("\\]").removesuffix("\\)").strip() for part in parts)


def _equal(answer: str, reference: str) -> str:
  if not answer or not reference:
    return ""
  if spelling.canonical(answer) == spelling.canonical(reference) != "":
    return "same expression"
  mathverify.check_installed()
  if _is_decimal_comma(answer, reference) or _is_decimal_comma(reference, answer):
    answer, reference = answer.replace(",", "."), reference.replace(",", ".")
  if not _same(answer, reference, 0):
    return ""
  return "equal number" if _is_plain_number(answer) and _is_plain_number(reference) else "equal expression"


def _is_decimal_comma(text: str, other: str) -> bool:
  """Whether 1,22 is meant as 1.22, which the other one is; 1,222 has thousands."""
  found = re.fullmatch(r"([-+]?)(?:0,\d+|\d+,(?:\d{1,2}|\d{4,}))", text)
  return found is not None and re.fullmatch(r"[-+]?\d+\.\d+|[-+]?0,\d+", other) is not None


def _is_plain_number(text: str) -> bool:
  return numbers.parse(text) is not None


_THOUSANDS = re.compile(r"[-+]?[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?")
_SEPARATOR = re.compile(
  r"[,;]\s*(?:(?:and|or)\b)?|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])|\\(?:lor|vee|land|wedge)(?![A-Za-z])|\\\\"
)
_RELATION = re.compile(
  r"\\(?:leq|geq|neq|approx|in|notin|equiv|pmod|cong|subseteq|subset|supset|to|rightarrow|mapsto|propto|perp|parallel)"
  r"(?![A-Za-z])|[<>=]"
)
_COMPLETE = re.compile(r"(?:\\(?:Rightarrow|implies|therefore|iff|Leftrightarrow|Longrightarrow)(?![A-Za-z])|∴|⇒)")


def _same(answer: str, reference: str, depth: int) -> bool:
  """Whether two normalized texts are equal, of any structure."""
  if spelling.canonical(answer) == spelling.canonical(reference):
    return bool(answer)
  if depth > _DEPTH or not answer or not reference:
    return False
  # 100,200,300 is a number or a list: either way both must be the same.
  plain = [_THOUSANDS.fullmatch(text) is not None for text in (answer, reference)]
  if any(plain):
    ours, theirs = (
      text.replace(",", "") if is_plain else text for text, is_plain in zip((answer, reference), plain, strict=True)
    )
    if _same(ours, theirs, depth + 1):
      return True
    if not all(re.search(",", text) for text in (answer, reference)):
      return False
  answer = _COMPLETE.split(answer)[-1].strip()
  items, expected = _items(answer), _items(reference)
  if len(items) == 1 and len(expected) == 1:
    return _same_item(items[0], expected[0], depth)
  return _same_list(items, expected, depth) or _same_regions(answer, reference, depth)


def _items(text: str) -> list[str]:
  r"""The items of a list: "1, 2 and 3", "x = 1 or x = 2", "\pm 3", "n = 1, 2"; or the text alone."""
  if text.startswith("\\begin{cases}") and text.endswith("\\end{cases}"):
    text = text.removeprefix("\\begin{cases}").removesuffix("\\end{cases}").replace("&", " ")
  joined = re.sub(r"(?<![\d,.])([1-9]\d{0,2}(?:,\d{3})+)(?![\d,])", lambda found: found[0].replace(",", ""), text)
  parts = [part for _, part in spelling.split(joined if joined != text else text, _SEPARATOR) if part]
  items = [sign for part in parts for sign in _signs(part)]
  named = re.fullmatch(r"(.*?)=(.*)", items[0]) if len(items) > 1 else None
  if named and is_name(named[1]) and not any(_RELATION.search(item) for item in items[1:]):
    items = [f"{named[1]}={value}" for value in (named[2], *items[1:])]
  return items[: _ITEMS + 1] or [text]


def _signs(text: str) -> list[str]:
  r"""2 \pm 3 as two items; \mp has the other sign. Those in sets are left to the set."""
  if not re.search(r"\\(?:pm|mp)(?![A-Za-z])", text) or text.startswith("\\{"):
    return [text]
  return [
    re.sub(r"\\mp(?![A-Za-z])", other, re.sub(r"\\pm(?![A-Za-z])", sign, text))
    for sign, other in (("+", "-"), ("-", "+"))
  ]


def _same_list(items: list[str], expected: list[str], depth: int) -> bool:
  """Whether lists have as many items, and the same ones: in any order, but in order beside a tuple."""
  items, expected = (_members(texts) for texts in (items, expected))
  for one, others, swapped in ((items, expected, False), (expected, items, True)):
    if len(one) == 1 and (group := _group(one[0])) and len(group.items) == len(others):
      parts = (list(group.items), others) if not swapped else (others, list(group.items))
      if group.opening == "\\{":
        return _matched(*parts, lambda left, right: _same(left, right, depth + 1))
      if len(group.items) > 1 and not any(_group(other) for other in others):
        return _in_order(*parts, depth)
  if len(items) != len(expected) or len(items) > _ITEMS:
    return False
  if len(named := _values(expected)) == len(_values(items)) or not (named or _values(items)):
    return _matched(items, expected, lambda left, right: _same(left, right, depth + 1))
  return _in_order(items, expected, depth) or _matched(
    items, expected, lambda left, right: _same(left, right, depth + 1)
  )


def _members(items: list[str]) -> list[str]:
  r"""The set of x \in \{1, 2\} alone."""
  relation = _relation(items[0]) if len(items) == 1 else None
  return [relation.sides[1]] if relation and relation.signs == ("\\in",) and is_name(relation.sides[0]) else items


def _values(items: Sequence[str]) -> list[str]:
  """Values of items that are all assignments to different names."""
  found = [item.partition("=") for item in items]
  is_assigned = all(sign and is_name(name) for name, sign, _ in found)
  return [value for _, _, value in found] if is_assigned and len({name for name, _, _ in found}) == len(found) else []


def _in_order(items: Sequence[str], expected: Sequence[str], depth: int) -> bool:
  return len(items) == len(expected) and all(_same(*pair, depth + 1) for pair in zip(items, expected, strict=True))


def _matched(items: Sequence[T], expected: Sequence[T], same: Callable[[T, T], bool]) -> bool:
  """Whether each item has a partner of its own."""
  left = list(items)
  if len(left) != len(expected):
    return False
  wanting = []
  for wanted in expected:
    if wanted in left:
      left.remove(wanted)
    else:
      wanting.append(wanted)
  if len(wanting) > _UNLIKE:
    return False
  for wanted in wanting:
    partner = next((at for at, item in enumerate(left) if same(item, wanted)), None)
    if partner is None:
      return False
    del left[partner]
  return True


# --------------------------------------------------------------------------------------------------------- relations


class Relation(NamedTuple):
  """Sides and the signs between them: x < 3."""

  sides: tuple[str, ...]
  signs: tuple[str, ...]

  @property
  def is_equation(self) -> bool:
    return all(sign == "=" for sign in self.signs)

  @property
  def is_inequality(self) -> bool:
    return all(sign in _ORDERS for sign in self.signs)


_ORDERS = {"<": (1, True), "\\leq": (1, False), ">": (-1, True), "\\geq": (-1, False)}  # direction, strictness


def _relation(text: str) -> Relation | None:
  parts = spelling.split(text, _RELATION)
  sides = tuple(side for _, side in parts)
  if len(parts) == 1 or not all(sides[1:]) or (not sides[0] and len(parts) > 2):
    return None
  return Relation(sides, tuple(sign for sign, _ in parts[1:]))


# f(2), P(A|B), f^{-1}(x), but not f(x + 1)
_CALL_OF_NAMES = re.compile(
  r"\\?[A-Za-z]+(?:_(?:\w|\{[^{}]*\}|\\[A-Za-z]+))?'*(?:\^\{?[-\w\\]+\}?)?'*\((?:[^()+*/^=-]|-(?=\d))*+\)"
)
# Area of the base, ABC, \angle ABC, \Delta p
_WORDS = re.compile(
  r"(?:\\?[A-Za-z]{2,}+[ .]?)++(?:\([^()]*\))?|[A-Z]{1,4}'*|"
  r"\\(?:angle|triangle|Delta|delta|overline|overrightarrow|vec|nabla|mathbf|hat) ?\{?[A-Za-z]{1,4}\}?'?(?:_\{?\w+\}?)?"
)
_DERIVATIVE = re.compile(
  r"\\frac ?\{ ?(?:d|\\partial)[^{}]*\} ?\{ ?(?:d|\\partial) ?[^{}]*\}|[a-z]'+(?:\([a-z]\))?|\\dot ?\{?[a-z]\}?"
)
_INVERSE = re.compile(r"(?:\\mathbf\{)?[A-Z]\}?\^\{?(?:-1|T|\\top)\}?")


def is_name(text: str) -> bool:
  r"""Whether a text names a quantity: x, a_{n}, f(x), P(A|B), \angle ABC, Area, (x, y).

  >>> [is_name(text) for text in ("I_{\\max}", "f(2)", "m + n", "2x", "")]
  [True, True, False, False, False]
  """
  text = text.strip()
  plain = spelling.FONTS.sub("", text).strip("{} ")
  if _DERIVATIVE.fullmatch(text) or _WORDS.fullmatch(plain) or _CALL_OF_NAMES.fullmatch(text.replace(" ", "")):
    return not plain.startswith("\\frac{1}")
  if _INVERSE.fullmatch(text.replace(" ", "")):
    return True
  if group := _group(text):
    return all(map(is_name, group.items))
  try:
    return latex.read(text)[0] == "name" and not text[:1].isdigit()
  except UnreadableError:
    return bool(re.fullmatch(r"\\?[A-Za-z]+ ?_ ?(?:\{[^{}]*(?:\{[^{}]*\}[^{}]*)?\}|\\?\w+)'?|\|[A-Z]{2}\|", text))


def _same_item(answer: str, reference: str, depth: int) -> bool:
  ours, theirs = _relation(answer), _relation(reference)
  if ours is None and theirs is None:
    return _same_object(answer, reference, depth)
  if ours and theirs:
    if _contradicts(ours, theirs):
      return False
    return _same_relation(ours, theirs, depth) or (
      _subject(ours) == _subject(theirs) and _same_regions(answer, reference, depth)
    )
  if ours:
    return _has_value(ours, reference, depth) or _same_regions(answer, reference, depth)
  assert theirs is not None
  if theirs.signs[0] == "\\in" and len(theirs.signs) == 1:
    return _same(answer, theirs.sides[1], depth + 1)
  name, value = _assignment(theirs)
  named = any(is_name(side) for side in theirs.sides[:-1])
  if value and (named or theirs.signs[0] == "\\approx" or _same_scalar(name, value, depth)):
    return any(_same(answer, value, depth + 1) for value in _given(theirs))
  return _same_regions(answer, reference, depth)


def _subject(relation: Relation) -> str:
  """What x > 3 and 3 < x are about."""
  return next((spelling.canonical(side) for side in relation.sides if is_name(side) and _number_of(side) is None), "")


def _assignment(relation: Relation) -> tuple[str, str]:
  """Left side and value of x = 2 = 1 + 1, or ("", "")."""
  if all(sign in ("=", "\\approx") for sign in relation.signs):
    return relation.sides[0], relation.sides[-1]
  return "", ""


def _given(relation: Relation) -> list[str]:
  r"""What x = \sqrt{2} \approx 1.41 gives as the value: the last exact one, and what it is about."""
  if relation.is_equation:
    return [relation.sides[-1]]
  first = relation.signs.index("\\approx")
  exact, about = relation.sides[first], relation.sides[first + 1 :]
  if not exact or (first == 0 and is_name(exact) and _number_of(exact) is None):
    return [about[-1]]
  rough = _number_of(exact)
  return [exact, *(side for side in about if rough is None or _is_rounding(side, rough))]


# Arithmetic alone, with neither names nor units nor a mixed number, of which every convention makes the same.
_ARITHMETIC = re.compile(r"(?:[-+*/^(){}\s\d.]|\\(?:[dt]?frac|sqrt|cdot|times|pi)(?![A-Za-z]))++")
_MIXED = re.compile(r"\d\s*\\[dt]?frac|\d\s+\d")


def _contradicts(ours: Relation, theirs: Relation) -> bool:
  r"""Whether two chains have different numbers in the same place: x = 2 + 4 = 5 and x = 2 + 3 = 5.

  A decimal may be the other number rounded, or cut off: the last sides of \sqrt{2} \approx 1.41 and 1.414.
  """
  if ours.signs != theirs.signs:
    return False
  said = [side for relation in (ours, theirs) for side in relation.sides[: 1 if len(ours.sides) > 2 else None]]
  if not all(is_name(side) or _is_number(side) for side in said):
    return False  # 2x = 4 is x = 2
  for pair in zip(ours.sides, theirs.sides, strict=True):
    if not all(map(_is_number, pair)):
      continue
    left, right = map(_number_of, pair)
    if left is None or right is None or _is_cut(pair[0], right) or _is_cut(pair[1], left):
      continue
    if abs(left - right) > 1e-9 * abs(right):
      return True
  return False


def _is_number(text: str) -> bool:
  return bool(_ARITHMETIC.fullmatch(text)) and not _MIXED.search(text)


def _is_cut(text: str, value: float) -> bool:
  """Whether a text is a decimal, or one times a power of ten, that is a value rounded or cut off."""
  found = re.fullmatch(r"(-?)\s*(\d+)(?:\.(\d+))?(?:\s*\\(?:times|cdot)\s*10\^\{?(-?\d{1,3})\}?)?", text.strip())
  if not found or not (found[3] or found[4]):
    return False
  unit = Fraction(10) ** (int(found[4] or 0) - len(found[3] or ""))
  digits = int(found[1] + found[2] + (found[3] or ""))
  scaled = Fraction(value) / unit
  return digits in (round(scaled), int(scaled))


def _number_of(text: str) -> float | None:
  try:
    return float(expressions.value(latex.read(text), {})[0])
  except (UnreadableError, UndefinedError, KeyError, TypeError, OverflowError):
    number = numbers.parse(text)
    return None if number is None else number.value


def _is_rounding(text: str, value: float) -> bool:
  number = _number_of(text)
  return number is not None and abs(number - value) <= 0.01 * abs(value)


def _has_value(relation: Relation, reference: str, depth: int) -> bool:
  """Whether an answer "x = 5" gives a reference that is no relation; what "m + n = 0" is about is not known."""
  if relation.signs == ("\\in",):
    return is_name(relation.sides[0]) and _same(relation.sides[1], reference, depth + 1)
  name, value = _assignment(relation)
  if not value or not any(_same(given, reference, depth + 1) for given in _given(relation)):
    return False
  if not name or is_name(name) or _same_scalar(name, value, depth):
    return True
  number = _number_of(value)
  return number is not None and number != 0  # m + n = 5


def _same_relation(ours: Relation, theirs: Relation, depth: int) -> bool:
  if "\\approx" in ours.signs or "\\approx" in theirs.signs:
    pairs = [_assignment(relation) for relation in (ours, theirs)]
    if not all(value for _, value in pairs) or not _same_names(pairs[0][0], pairs[1][0], depth):
      return False
    return any(_same(left, right, depth + 1) for left in _given(ours) for right in _given(theirs))
  if ours.is_equation and theirs.is_equation:
    return _same_equations(ours, theirs, depth)
  if ours.is_inequality and theirs.is_inequality:
    ours, theirs = _ascending(ours), _ascending(theirs)
  if ours.signs == theirs.signs and _in_order(ours.sides, theirs.sides, depth):
    return True
  if len(ours.signs) == len(theirs.signs) == 1 and ours.signs == theirs.signs:
    if ours.is_inequality:
      return _proportional(ours, theirs, positive=True)
    return ours.signs == ("\\neq",) and _proportional(ours, theirs, positive=False)
  return False


def _same_equations(ours: Relation, theirs: Relation, depth: int) -> bool:
  first, last = ours.sides[0], ours.sides[-1]
  name, value = theirs.sides[0], theirs.sides[-1]
  if not is_name(first) and is_name(last):
    first, last = last, first
  if not is_name(name) and is_name(value):
    name, value = value, name
  if is_name(first) and is_name(name):
    if _same_names(first, name, depth) and _same(last, value, depth + 1):
      return True
  elif not is_name(first) and not is_name(name) and _in_order((first, last), (name, value), depth):
    return True
  if len(ours.sides) > 2 or len(theirs.sides) > 2:
    return False
  return _proportional(ours, theirs, positive=False) or _same_curve(ours, theirs)


def _same_names(name: str, other: str, depth: int) -> bool:
  """Whether two left sides are of the same quantity; y is also f(x)."""
  if spelling.canonical(name) == spelling.canonical(other):
    return True
  called = [re.match(r"\\?[A-Za-z]+\(", text.replace(" ", "")) is not None for text in (name, other)]
  if called[0] != called[1]:
    return (other if called[0] else name).strip() in ("y", "z")
  try:
    return latex.read(name) == latex.read(other)
  except UnreadableError:
    return all(map(_group, (name, other))) and _same_object(name, other, depth)


def _ascending(relation: Relation) -> Relation:
  """a < b for b > a."""
  if all(_ORDERS[sign][0] > 0 for sign in relation.signs):
    return relation
  turned = {">": "<", "\\geq": "\\leq", "<": ">", "\\leq": "\\geq"}
  return Relation(relation.sides[::-1], tuple(turned[sign] for sign in relation.signs[::-1]))


def _differences(ours: Relation, theirs: Relation) -> list[tuple[Node, Node]]:
  """Left side minus right side of both, by each convention by which they are read differently.

  Raises:
    UnreadableError: a side is not read.
  """
  found = []
  for convention in CONVENTIONS:
    left, right, other_left, other_right = (latex.read(side, convention) for side in (*ours.sides, *theirs.sides))
    pair: tuple[Node, Node] = ("+", left, ("-", right)), ("+", other_left, ("-", other_right))
    if pair not in found:
      found.append(pair)
  return found


def _proportional(ours: Relation, theirs: Relation, *, positive: bool) -> bool:
  """Whether the differences of both sides have a constant ratio."""
  try:
    return any(expressions.proportional(*pair, positive=positive) for pair in _differences(ours, theirs))
  except UnreadableError:
    return False


def _same_curve(ours: Relation, theirs: Relation) -> bool:
  """Whether two equations in several variables hold at the same points."""
  try:
    return any(expressions.same_zeros(*pair) for pair in _differences(ours, theirs))
  except UnreadableError:
    return False


# -------------------------------------------------------------------------------------------- sets, tuples, matrices


class Group(NamedTuple):
  """What stands in one pair of brackets: an interval, a tuple, a set."""

  opening: str
  items: tuple[str, ...]
  closing: str


_COMMA = re.compile("[,;]")


def _group(text: str) -> Group | None:
  r"""A whole text in brackets with commas, or in \{ \}; column vectors are tuples."""
  text = text.strip()
  if text.startswith("\\begin{pmatrix}") and text.endswith("\\end{pmatrix}") and text.count("\\begin") == 1:
    inner = text.removeprefix("\\begin{pmatrix}").removesuffix("\\end{pmatrix}")
    rows = [part for _, part in spelling.split(inner, re.compile(r"\\\\"))]
    cells = [[cell for _, cell in spelling.split(row, re.compile("&"))] for row in rows]
    if len(cells) > 1 and all(len(row) == 1 for row in cells):
      return Group("vector", tuple(row[0] for row in cells), "vector")
    return Group("vector", tuple(cells[0]), "vector") if len(cells) == 1 and len(cells[0]) > 1 else None
  for opening, closing in (
    ("\\{", "\\}"),
    ("\\langle", "\\rangle"),
    ("(", ")"),
    ("[", "]"),
    ("(", "]"),
    ("[", ")"),
    ("]", "["),
  ):
    if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening + closing):
      if opening != "]" and not spelling.closes_at_end(text):
        return None
      inner = text[len(opening) : -len(closing)]
      if opening == "\\{" and re.search(r"\||:|\\in(?![A-Za-z])", inner):
        return None
      items = tuple(part for _, part in spelling.split(inner, _COMMA))
      if opening == "\\{":
        items = tuple(sign for part in items for sign in _signs(part))
      if not all(items) or (len(items) == 1 and opening != "\\{"):
        return None
      if opening == "\\langle":
        return Group("vector", items, "vector")
      return Group(opening, items, closing)
  return None


_OR = re.compile(r"(?<![A-Za-z\\])or(?![A-Za-z])|\\(?:lor|vee)(?![A-Za-z])")
_UNION = re.compile(r"\\cup(?![A-Za-z])")


def _same_object(answer: str, reference: str, depth: int) -> bool:
  """Whether two texts without relations and lists are equal."""
  ours, theirs = _group(answer), _group(reference)
  if ours and theirs:
    return _same_groups(ours, theirs, depth)
  if any(re.search(r"\\(?:cup|setminus|mathbb|emptyset)(?![A-Za-z])", text) for text in (answer, reference)):
    return _same_regions(answer, reference, depth)
  if (ours or theirs) and any(spelling.DIRECTION.search(text) for text in (answer, reference)):
    answer, reference = (_in_directions(ours) if ours else answer), (_in_directions(theirs) if theirs else reference)
    return bool(answer and reference) and _same_scalar(answer, reference, depth)
  if ours and ours.opening == "\\{" and len(ours.items) == 1:
    return _same(ours.items[0], reference, depth + 1)
  if theirs and theirs.opening == "\\{" and len(theirs.items) == 1:
    return _same(answer, theirs.items[0], depth + 1)
  if (ours or theirs) and not all("\\begin" in text for text in (answer, reference)):
    return False
  times = [_minutes(text) for text in (answer, reference)]
  if all(times):
    return bool(times[0] & times[1])
  return _same_scalar(answer, reference, depth)


def _same_groups(ours: Group, theirs: Group, depth: int) -> bool:
  if len(ours.items) != len(theirs.items) or len(ours.items) > _ITEMS:
    return False
  if "\\{" in (ours.opening, theirs.opening):
    return ours.opening == theirs.opening and _matched(
      ours.items, theirs.items, lambda left, right: _same(left, right, depth + 1)
    )
  vector = "vector" in (ours.opening, theirs.opening)
  alike = (ours.opening, ours.closing) == (theirs.opening, theirs.closing)
  whole = {ours.opening + ours.closing, theirs.opening + theirs.closing} <= {"()", "[]"}
  if not alike and not vector and not (whole and len(ours.items) > 2):
    return False
  return _in_order(ours.items, theirs.items, depth)


def _in_directions(group: Group) -> str:
  """A vector as a sum of its components along i, j and k."""
  if not 2 <= len(group.items) <= 3:
    return ""
  return " + ".join(f"({item}) \\mathbf{{{letter}}}" for item, letter in zip(group.items, "ijk", strict=False))


def _same_regions(answer: str, reference: str, depth: int) -> bool:
  r"""Whether two sets of numbers are the same: unions, \mathbb{R} without points, inequalities of one variable."""
  ours, theirs = _region(answer), _region(reference)
  if not ours or not theirs:
    return False
  return _matched(ours, theirs, lambda left, right: _same_groups(left, right, depth + 1))


_ALL = Group("(", ("-\\infty", "\\infty"), ")")


def _region(text: str) -> list[Group]:
  """The intervals and finite sets of which a set of numbers consists, or [] where it is none."""
  text = re.sub(r"\\(?:text|mathrm)\{ ?(?:all )?real numbers ?\}|\ball real numbers\b", r"\\mathbb{R}", text)
  cases = [part for _, part in spelling.split(text, _OR)]
  if len(cases) > 1:  # x < 1 or x > 2
    relations = [relation for case in cases if (relation := _relation(case)) and relation.is_inequality]
    regions = [_region_of(relation) for relation in relations]
    alike = len(relations) == len(cases) and len({_subject(relation) for relation in relations}) == 1
    return [piece for region in regions for piece in region] if alike and all(regions) else []
  parts = [part for _, part in spelling.split(text, _UNION)]
  if len(parts) == 1 and (relation := _relation(text)):
    return _region_of(relation)
  pieces: list[Group] = []
  for part in parts:
    base, *without = [piece for _, piece in spelling.split(part, re.compile(r"\\setminus(?![A-Za-z])"))]
    if base == "\\mathbb{R}":
      group: Group | None = _ALL
    elif base == "\\emptyset" and len(parts) == 1:
      return [Group("\\emptyset", (), "")] if not without else []
    else:
      group = _group(base)
    if group is None or (group.opening != "\\{" and len(group.items) != 2) or len(without) > 1:
      return []
    if without:
      points = _group(without[0])
      if points is None or points.opening != "\\{" or group != _ALL:
        return []
      pieces += _without(points.items)
    else:
      pieces.append(group)
  return pieces


def _without(points: Sequence[str]) -> list[Group]:
  """The real numbers without some."""
  values = [(_number_of(point), point) for point in points]
  if any(value is None for value, _ in values):
    return []
  ends = ["-\\infty", *(point for _, point in sorted(values, key=lambda pair: pair[0] or 0.0)), "\\infty"]
  return [Group("(", (low, high), ")") for low, high in itertools.pairwise(ends)]


def _region_of(relation: Relation) -> list[Group]:
  """The interval of x < 3 or 1 < x <= 2, the two of x != 3, the set of "x in S"; [] for other relations."""
  if relation.signs == ("\\in",) and is_name(relation.sides[0]):
    return _region(relation.sides[1])
  if relation.signs == ("\\neq",) and is_name(relation.sides[0]):
    return _without([relation.sides[1]])
  if not relation.is_inequality:
    return []
  relation = _ascending(relation)
  if any(_ORDERS[sign][0] < 0 for sign in relation.signs):
    return []
  named = [is_name(side) and _number_of(side) is None for side in relation.sides]
  brackets = [_ORDERS[sign][1] for sign in relation.signs]
  if named == [False, True, False]:
    low, high = relation.sides[0], relation.sides[2]
    return [Group("(" if brackets[0] else "[", (low, high), ")" if brackets[1] else "]")]
  if named == [True, False]:
    return [Group("(", ("-\\infty", relation.sides[1]), ")" if brackets[0] else "]")]
  if named == [False, True]:
    return [Group("(" if brackets[0] else "[", (relation.sides[0], "\\infty"), ")")]
  return []


_TIME = re.compile(
  r"(\d{1,2}):([0-5]\d)(?::([0-5]\d))?\s*(?:\\(?:text|mathrm)\s*\{\s*)?(?:([AaPp])\.?\s*[Mm]\.?)?\s*\}?"
)


def _minutes(text: str) -> set[int]:
  """The seconds of the day that a time may be: 8:05 may be that of the evening."""
  found = _TIME.fullmatch(text.strip())
  if not found or int(found[1]) > 24:
    return set()
  second = 60 * int(found[2]) + int(found[3] or 0)
  hour = int(found[1])
  if found[4]:
    hour = hour % 12 + 12 * (found[4] in "Pp")
  return {3600 * hour + second}


# ------------------------------------------------------------------------------------------------------------ values

_COMMAND = re.compile(r"\\[A-Za-z]+")
_UNREAD = re.compile(r"\\(?:i*int|oint|sum|prod|lim|frac\s*\{\s*(?:d|\\partial))(?![A-Za-z])|\\partial(?![A-Za-z])")


_AT_ZERO = re.compile(r"(?<![A-Za-z\\])([A-Za-z])\s*\(\s*0\s*\)")  # I(0), a value of I and not I times 0


def _same_scalar(answer: str, reference: str, depth: int) -> bool:
  """Whether two numbers, with or without units, or two expressions are equal."""
  answer, reference = (_AT_ZERO.sub(r"\1_{0}", text) for text in (answer, reference))
  ours, theirs = numbers.parse(answer), numbers.parse(reference)
  if ours and theirs and (ours.unit or theirs.unit or ours.percent or theirs.percent):
    units = [number.unit for number in (ours, theirs) if number.unit]
    # Letters that may be variables are left to the reader, unless both sides have the same ones.
    alike = len(units) == 2 and (units[0].same(units[1]) or units[0].converts(units[1]))
    if alike or all(unit.certain for unit in units):
      return numbers.same(ours, theirs)
  if (plain := _same_decimals(answer, reference)) is not None:
    return plain
  if ours and theirs and any(re.search(r"[A-Za-z]{3}", _COMMAND.sub("", text)) for text in (answer, reference)):
    return numbers.same(ours, theirs)  # 10 units
  try:
    if _same_values(answer, reference):
      return True
  except UnreadableError:
    pass
  if ours and theirs and not (ours.unit or theirs.unit) and not _are_read(answer, reference):
    return numbers.same(ours, theirs)
  if shorter := _without_unit(answer, reference):
    return _same_scalar(*shorter, depth + 1)
  if any(_UNREAD.search(text) for text in (answer, reference)):
    return not _run_over_others(answer, reference) and mathverify.process.ask(answer, reference)
  return False


_RANGE = re.compile(r"\\(lim|sum|prod)\s*_\s*(\{[^{}]*\}|\w)\s*((?:\^\s*(?:\{[^{}]*\}|\\?\w+))?)")
_DIFFERENTIAL = re.compile(r"\\d?frac\s*\{\s*d([^{}]*)\}\s*\{\s*d([^{}]*)\}")
_BOUND = re.compile(r"\{?\s*([A-Za-z])\s*(?:=|\\to|\\rightarrow)")


def _run_over_others(answer: str, reference: str) -> bool:
  r"""Whether limits, sums or products of terms that only have a name run over other places, or derivatives are others.

  To math-verify \lim_{n \to 0} a_n is a_n, and \frac{d v}{d t} is 0.
  """
  texts = (answer, reference)
  ranges = [sorted("".join("".join(parts).split()) for parts in _RANGE.findall(text)) for text in texts]
  if ranges[0] != ranges[1] and any(map(_has_named_terms, texts)):
    return True
  derivatives = [sorted("/".join(parts).replace(" ", "") for parts in _DIFFERENTIAL.findall(text)) for text in texts]
  return all(derivatives) and derivatives[0] != derivatives[1]


def _has_named_terms(text: str) -> bool:
  rest = _RANGE.sub(" ", text)
  for kind, place, _ in _RANGE.findall(text):
    name = _BOUND.match(place)
    used = name and re.findall(rf"(_\s*\{{?[^{{}}_]*?)?(?<![A-Za-z\\]){name[1]}(?![A-Za-z])", rest)
    if used is not None and (any(used) or (kind == "lim" and not used)):
      return True
  return False


_LAST_UNIT = re.compile(r"(.*[\w)}\]])\s*\\(?:text|mathrm)\s*\{\s*([^{}]+?)\s*\}\s*(\^\s*\{?\s*-?\d\s*\}?)?")


def _without_unit(answer: str, reference: str) -> tuple[str, str] | None:
  r"""Both without the unit at the end of one, or the same unit at the end of both: 2x \text{ cm}; else None."""
  texts, units = [], []
  for text in (answer, reference):
    found = _LAST_UNIT.fullmatch(text)
    number = numbers.parse(f"1 {found[2]}{found[3] or ''}") if found else None
    known = found is not None and number is not None and number.unit is not None
    texts.append(found[1] if found and known else text)
    units.append(number.unit if number and known else None)
  if not any(units) or (all(units) and not units[0].same(units[1])):  # type: ignore[union-attr, arg-type]
    return None
  return texts[0], texts[1]


_DECIMAL = re.compile(r"[-+]?(?:\d+\.?|\d*\.\d+)")


def _same_decimals(answer: str, reference: str) -> bool | None:
  """Whether two decimals are the same number, the longer one rounded; None where they are no decimals."""
  texts = [
    text.replace(" ", "") if re.fullmatch(r"[-+]?\s?\d{1,3}(?: \d{3})+(?:\.\d+)?", text) else text
    for text in (answer, reference)
  ]
  if not all(map(_DECIMAL.fullmatch, texts)):
    return None
  ours, theirs = map(Fraction, texts)
  places = [len(text.partition(".")[2]) for text in texts]
  if ours == theirs:
    return True
  rounding = Fraction(1, 2 * 10 ** min(places))
  return min(places) > 0 and abs(ours - theirs) <= min(rounding, Fraction(2, 10**6) * abs(theirs))


def _are_read(*texts: str) -> bool:
  try:
    return bool([latex.read(text) for text in texts])
  except UnreadableError:
    return False


def _same_values(answer: str, reference: str) -> bool:
  """Whether two expressions are the same function by one convention.

  Raises:
    UnreadableError: one of them is not read.
  """
  pairs = []
  for convention in CONVENTIONS:
    pair = tuple(_without_degrees(latex.read(text, convention)) for text in (answer, reference))
    if pair not in pairs:
      pairs.append(pair)
  return any(expressions.same(*pair) for pair in pairs)


def _without_degrees(node: Node) -> Node:
  """90 for 90 degrees: an angle may be given without its unit."""
  return node[1] if node[0] == "degrees" else node
