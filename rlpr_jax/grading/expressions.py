r"""Tells numerically whether two expressions are the same function.

Nothing is simplified: two expressions are the same if they have the same value at points drawn at random, with fifty
digits. Every step is bounded, so that no text makes one hang: 9^{9^{9^9}} has no value here.
"""

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, TypeAlias

from rlpr_jax.grading.latex import LIMIT, Node, is_rounded, names, parts

_DIGITS = 50  # of a value at a point
_FLOAT_DIGITS = 15  # of what floats can tell
_CONSTANT_DIGITS = 400  # of a value without variables
_SPARE = 20  # digits that cancelling may cost
_ROUNDED = 2e-6  # where a decimal is written: six significant digits, which is how math-verify compares
_LARGEST = 100_000  # binary exponent of a value
_ROOM = 2000  # of factorials and binomials

Point: TypeAlias = dict[str, Any]  # name of a variable -> its value


class UndefinedError(Exception):
  """An expression has no value at a point."""


def _mpmath() -> Any:
  """The module mpmath, which comes with math-verify, loaded when it is first needed."""
  import mpmath  # type: ignore[import-untyped]

  return mpmath


# ------------------------------------------------------------------------------------------------------- evaluating


def value(node: Node, point: Point, *, complex_numbers: bool = False, digits: int = _DIGITS) -> tuple[Any, Any]:
  """The value of an expression at a point, of mpmath, and how large what was added up for it became.

  A real expression has no value where it would be complex.

  Raises:
    UndefinedError: it has none, or none that can be computed at once.
  """
  mpmath = _mpmath()

  try:
    with mpmath.workdps(digits):
      context = mpmath.fp if digits <= _FLOAT_DIGITS else mpmath.mp
      evaluator = _Evaluator(context, point, complex_numbers)
      return evaluator.value(node), evaluator.scale
  except (ArithmeticError, ValueError, TypeError, mpmath.libmp.NoConvergence) as error:
    raise UndefinedError from error


class _Evaluator:
  def __init__(self, context: Any, point: Point, complex_numbers: bool):
    self._mp = context
    self._point = point if context.prec > 53 else {name: float(number) for name, number in point.items()}
    self._complex = complex_numbers
    self.scale = context.mpf(0)

  def value(self, node: Node) -> Any:
    found = self._bounded(self._value(node))
    if not self._complex and isinstance(found, self._mp.mpc):
      if found.imag:
        raise UndefinedError
      return found.real
    return found

  def _bounded(self, found: Any) -> Any:
    if isinstance(found, self._mp.matrix):
      return found
    if self._mp.isinf(found) or self._mp.isnan(found) or (found and self._mp.mag(found) > _LARGEST):
      raise UndefinedError
    return found

  def _value(self, node: Node) -> Any:
    mp = self._mp
    match node[0]:
      case "number":
        return mp.mpf(node[1].numerator) / node[1].denominator
      case "constant":
        if node[1] == "infinity":
          raise UndefinedError
        return {"pi": +mp.pi, "e": +mp.e, "i": mp.mpc(0, 1)}[node[1]]
      case "name":
        return self._point[node[1]]
      case "+":
        terms = [self.value(child) for child in node[1:]]
        self._added(*terms)
        return sum(terms[1:], terms[0])
      case "-":
        return -self.value(node[1])
      case "matrix":
        elements = [self.value(child) for child in node[2:]]
        columns = len(elements) // node[1]
        return mp.matrix([elements[at : at + columns] for at in range(0, len(elements), columns)])
      case "*":
        left, right = self.value(node[1]), self.value(node[2])
        return left * right
      case "/":
        above, below = self.value(node[1]), self.value(node[2])
        if isinstance(below, mp.matrix) or not below:
          raise UndefinedError
        return above / below
      case "^":
        base = self.value(node[1])
        if isinstance(base, mp.matrix):
          return self._matrix_power(base, node[2])
        return self._power(base, self.value(node[2]))
      case "root":
        degree = self.value(node[1])
        if not degree:
          raise UndefinedError
        return self._power(self.value(node[2]), 1 / degree)
      case "degrees":
        return self.value(node[1]) * mp.pi / 180
      case "factorial":
        return mp.factorial(self._small(self.value(node[1]), least=0))
      case "binomial":
        above, below = (self._small(self.value(child), least=-_ROOM) for child in node[1:])
        return mp.binomial(above, below)
      case "log":
        base, argument = self.value(node[1]), self.value(node[2])
        return self._log(argument) / self._log(base)
      case "call":
        return self._unknown(node[1], [self.value(child) for child in node[2:]])
      case _:
        return self._function(node[1], [self.value(child) for child in node[2:]])

  def _added(self, *terms: Any) -> None:
    if not isinstance(terms[0], self._mp.matrix):
      self.scale = max(self.scale, *map(abs, terms))

  def _small(self, number: Any, least: int) -> Any:
    if isinstance(number, self._mp.mpc) or not least <= number <= _ROOM:
      raise UndefinedError
    return number

  def _log(self, number: Any) -> Any:
    if not number or (not self._complex and number < 0):
      raise UndefinedError
    return self._mp.log(number)

  def _power(self, base: Any, exponent: Any) -> Any:
    mp = self._mp
    if not base:
      if isinstance(exponent, mp.mpc) or exponent <= 0:
        raise UndefinedError
      return mp.mpf(0)
    if abs(exponent) * (abs(mp.log(abs(base), 2)) + 5) > _LARGEST:
      raise UndefinedError
    if self._complex or base > 0 or exponent == int(exponent):
      return mp.power(base, exponent)
    # The real root of a negative number, where the degree is odd.
    ratio = Fraction(str(exponent)).limit_denominator(60)
    if abs(mp.mpf(ratio.numerator) / ratio.denominator - exponent) > 1e-12 or ratio.denominator % 2 == 0:
      raise UndefinedError
    root = mp.power(-base, exponent)
    return -root if ratio.numerator % 2 else root

  def _matrix_power(self, base: Any, exponent: Node) -> Any:
    if exponent in (("name", "T"), ("name", "\\top")):
      return base.T
    power = self.value(exponent)
    if power != int(power) or abs(power) > 30:
      raise UndefinedError
    return base ** int(power)

  def _unknown(self, name: str, arguments: Sequence[Any]) -> Any:
    """A function of which nothing is known but its name: any smooth one, the same each time."""
    rng = random.Random(name)
    phase = sum((rng.uniform(0.5, 2) * argument for argument in arguments), self._mp.mpf(rng.uniform(0, 3)))
    return rng.uniform(1, 2) + self._mp.sin(phase)

  def _function(self, name: str, arguments: Sequence[Any]) -> Any:
    mp = self._mp
    argument = arguments[0]
    self._added(mp.mpf(1))
    if name in ("max", "min"):
      if any(isinstance(number, mp.mpc) for number in arguments):
        raise UndefinedError
      return max(arguments) if name == "max" else min(arguments)
    if name in ("gcd", "lcm"):
      import math

      if any(number != int(number) or abs(number) > 10**30 for number in arguments):
        raise UndefinedError
      return mp.mpf(getattr(math, name)(*(int(number) for number in arguments)))
    if name == "abs":
      return abs(argument)
    if name == "gamma":
      return mp.gamma(self._small(argument, least=-_ROOM))
    if name == "ln":
      return self._log(argument)
    if name in ("floor", "ceil"):
      return getattr(mp, name)(argument)
    if name == "sgn":
      return mp.sign(argument)
    if mp.mag(argument or 1) > 60:  # the sine of what has no more digits
      raise UndefinedError
    for prefix in ("arc", "ar"):
      if name.startswith(prefix) and not hasattr(mp, name):
        name = f"a{name.removeprefix(prefix)}"
    return getattr(mp, name)(argument)


# -------------------------------------------------------------------------------------------------------- comparing


def points(variables: Sequence[str]) -> Iterator[Point]:
  """Where expressions are compared: positive, mixed and whole values of the variables, the same each time."""
  mpmath = _mpmath()

  rng = random.Random(0)
  for kind in ("positive",) * 4 + ("mixed",) * 5 + ("whole",) * 5:
    point = {}
    taken: set[int] = set()
    for name in variables:
      if kind == "whole":
        number = rng.choice([n for n in range(1, 12 + len(variables)) if n not in taken])
        taken.add(number)
        point[name] = mpmath.mpf(number)
      else:
        low = 0.2 if kind == "positive" else -3.0
        point[name] = mpmath.mpf(rng.uniform(low, 3.0))
    yield point


def same(left: Node, right: Node) -> bool:
  """Whether two expressions have the same values wherever both have any, and that at enough points.

  >>> from rlpr_jax.grading.latex import read
  >>> same(read("(x+1)^2"), read("x^2+2x+1")), same(read("|x|"), read("x"))
  (True, False)
  """
  mpmath = _mpmath()

  infinite = [_infinity(node) for node in (left, right)]
  if any(infinite):
    return infinite[0] == infinite[1]
  variables = sorted(names(left) | names(right))
  digits = (_DIGITS if variables else _CONSTANT_DIGITS) + _longest_number(left, right)
  complex_numbers = has_imaginary_unit(left) or has_imaginary_unit(right)
  tolerance = _ROUNDED if is_rounded(left) or is_rounded(right) else mpmath.mpf(10) ** (_SPARE - digits)
  if _clearly_differ(left, right, variables, complex_numbers):
    return False
  agreed = compared = 0
  for point in points(variables) if variables else [{}]:
    try:
      expected = value(right, point, complex_numbers=complex_numbers, digits=digits)
      compared += 1
      found = value(left, point, complex_numbers=complex_numbers, digits=digits)
    except UndefinedError:
      continue
    with mpmath.workdps(digits):
      if not agree(found, expected, tolerance):
        return False
    agreed += 1
  return agreed >= (4 if variables else 1) and 4 * agreed >= compared


def _longest_number(*nodes: Node) -> int:
  """Digits of the longest number that stands in expressions: the last of them counts too."""
  numbers = [part[1] for node in nodes for part in parts(node) if part[0] == "number"]
  sizes = [max(abs(number.numerator), number.denominator).bit_length() for number in numbers]
  return min(int(max(sizes, default=0) * math.log10(2)), LIMIT)


def _clearly_differ(left: Node, right: Node, variables: Sequence[str], complex_numbers: bool) -> bool:
  """Whether floats already show that two expressions differ at one of the first points, far beyond their rounding."""
  for point in itertools.islice(points(variables), 3):
    try:
      (found, scale), (expected, other_scale) = (
        value(node, point, complex_numbers=complex_numbers, digits=_FLOAT_DIGITS) for node in (left, right)
      )
      if abs(found - expected) > 1e-3 * max(abs(found), abs(expected), scale, other_scale):
        return True
    except (UndefinedError, TypeError):  # no value, or matrices
      continue
  return False


def agree(left: tuple[Any, Any], right: tuple[Any, Any], tolerance: Any) -> bool:
  """Whether two results of `value` are the same relative to the larger, or both zero where terms cancel."""
  mpmath = _mpmath()

  (found, found_scale), (expected, expected_scale) = left, right
  if isinstance(found, mpmath.matrix) or isinstance(expected, mpmath.matrix):
    shapes = [(x.rows, x.cols) if isinstance(x, mpmath.matrix) else () for x in (found, expected)]
    return shapes[0] == shapes[1] and all(
      agree((one, found_scale), (other, expected_scale), tolerance) for one, other in zip(found, expected, strict=True)
    )
  largest = max(abs(found), abs(expected))
  return abs(found - expected) <= tolerance * largest or largest <= min(tolerance, 1e-30) * max(
    found_scale, expected_scale
  )


def proportional(left: Node, right: Node, *, positive: bool) -> bool:
  """Whether two expressions, which are not constant, have a constant ratio: x - 1 and 3 - 3x.

  Args:
    positive: whether the ratio must be positive, as where both are below zero.

  >>> from rlpr_jax.grading.latex import read
  >>> proportional(read("x - 1"), read("3 - 3x"), positive=False)
  True
  """
  mpmath = _mpmath()

  variables = sorted(names(left) | names(right))
  complex_numbers = has_imaginary_unit(left) or has_imaginary_unit(right)
  # Beside a large number the ratio of y - 1000x and y - 1001x is nearly constant: it varies by one part in its square.
  digits = _DIGITS + 2 * _longest_number(left, right)
  tolerance = _ROUNDED if is_rounded(left) or is_rounded(right) else mpmath.mpf(10) ** (_SPARE - digits)
  ratio = None
  first_values = set()
  agreed = 0
  for point in points(variables):
    try:
      found, expected = (value(node, point, complex_numbers=complex_numbers, digits=digits) for node in (left, right))
      if isinstance(found[0], mpmath.matrix) or isinstance(expected[0], mpmath.matrix):
        return False
      if any(abs(number) <= 1e-30 * scale for number, scale in (found, expected)):
        continue  # a zero has no ratio
    except UndefinedError:
      continue
    with mpmath.workdps(digits):
      quotient = expected[0] / found[0]
      ratio = quotient if ratio is None else ratio
      if not agree((quotient, 0), (ratio, 0), tolerance):
        return False
    first_values.add(found[0])
    agreed += 1
  if ratio is None or agreed < 4 or len(first_values) < 2:
    return False
  return not positive or (not isinstance(ratio, mpmath.mpc) and ratio > 0)


_GRID = tuple(-4.03 + 0.29 * step for step in range(29))
_CUTS = 6  # of a curve with lines
_ROOTS = 5  # that a curve must have on them
_TOLD_DIGITS = 2  # of a number: what a change of the last of them moves a root by is seen


def same_zeros(left: Node, right: Node) -> bool:
  """Whether two expressions in the same variables, of which there are several, are zero at the same points.

  Told from where they change their sign on some lines: xy - 1 and y - 1/x.

  >>> from rlpr_jax.grading.latex import read
  >>> same_zeros(read("x y - 1"), read("y - 1/x")), same_zeros(read("x y - 1"), read("y - 2/x"))
  (True, False)
  """
  variables = sorted(names(left))
  if len(variables) < 2 or set(variables) != names(right) or any(map(has_imaginary_unit, (left, right))):
    return False
  if _longest_number(left, right) > _TOLD_DIGITS:  # 1000x and 1001x cross a line at places that are too near
    return False
  found = 0
  for cut, point in enumerate(points(variables)):
    if cut == _CUTS:
      break
    along = variables[cut % len(variables)]
    roots, expected = (_roots(node, point, along) for node in (left, right))
    if len(roots) != len(expected) or any(abs(a - b) > 1e-6 for a, b in zip(roots, expected, strict=True)):
      return False
    found += len(roots)
  return found >= _ROOTS


def _roots(node: Node, point: Point, along: str) -> list[float]:
  """Where an expression changes its sign along a line, but for poles."""

  def at(x: float) -> float | None:
    mpmath = _mpmath()

    try:
      result = value(node, {**point, along: mpmath.mpf(x)}, digits=_FLOAT_DIGITS)[0]
      return None if isinstance(result, mpmath.matrix) else float(result)
    except (UndefinedError, OverflowError):
      return None

  roots = []
  values = [(x, at(x)) for x in _GRID]
  for (low, before), (high, after) in itertools.pairwise(values):
    if before is None or after is None or (before < 0) == (after < 0):
      continue
    largest = max(abs(before), abs(after))
    for _ in range(30):
      middle = (low + high) / 2
      found = at(middle)
      if found is None:
        break
      low, high = (middle, high) if (found < 0) == (before < 0) else (low, middle)
    else:
      if abs(at((low + high) / 2) or 0.0) < 1e-3 * largest:
        roots.append((low + high) / 2)
  return roots


def has_imaginary_unit(node: Node) -> bool:
  """Whether i stands in an expression."""
  return any(part == ("constant", "i") for part in parts(node))


def _infinity(node: Node) -> int:
  """1 for infinity, -1 for its negative, 0 for what is finite or unknown."""
  if node[0] == "-":
    return -_infinity(node[1])
  return int(node == ("constant", "infinity"))
