"""What a setting may be: its type, choices and bounds, of which each program has a table of its own."""

from typing import Any, NamedTuple

from rlpr_jax.errors import InputError


class Field(NamedTuple):
  """A setting."""

  default: Any  # its type is that of every value
  meaning: str  # with the unit
  choices: tuple[str, ...] = ()  # none for any value
  at_least: float | None = None  # None for what `LARGEST` says, here and of at_most
  above: float | None = None  # more than that
  at_most: float | None = None
  may_change: bool = False  # whether a run that is resumed may have another value and still be the same run


# Numbers of a field that says nothing else are at most so far from 0: those that a device counts with, and those whose
# squares are finite in float32. Neither NaN nor an infinity is a value.
LARGEST = {int: 2**31 - 1, float: 1e18}
# By the type of a field's default: the types that its values may have, and how they are called.
_KINDS: dict[type, tuple[Any, str]] = {
  bool: ((bool,), "true or false"),
  int: ((int,), "a whole number"),
  float: ((float, int), "a number"),
  str: ((str,), "text"),
  tuple: ((tuple, list), "a list"),
}


def check_value(where: str, field: Field, value: Any) -> None:
  """Checks a value by itself: its type, the field's choices and bounds, and that texts can be written.

  Args:
    where: begins the message.

  Raises:
    InputError: it cannot be a value of the field.

  >>> check_value("config.seed", Field(0, "decides sampling"), float("nan"))
  Traceback (most recent call last):
  rlpr_jax.errors.InputError: config.seed: nan, expected a whole number
  """
  kind = type(field.default)
  types, called = _KINDS[kind]
  if not isinstance(value, types) or (isinstance(value, bool) and kind is not bool):
    raise InputError(f"{where}: {show(value)}, expected {called}")
  if field.choices and value not in field.choices:
    raise InputError(f"{where}: {show(value)}, expected one of {', '.join(field.choices)}")
  if kind in LARGEST and not is_within(field, value):
    raise InputError(f"{where}: {show(value)}, expected {bounds(field)}")
  if not _is_plain(value):
    raise InputError(f"{where}: {show(value)}, expected finite numbers, and text without null characters or surrogates")


def show(value: Any) -> str:
  """A value in one short line of ASCII.

  >>> show("é")
  "'\\\\xe9'"
  """
  text = ascii(value)
  return text if len(text) <= 200 else f"{text[:200]}..."


def _is_plain(value: Any) -> bool:
  """Whether what is in a value can be written as JSON and be part of a path."""
  if isinstance(value, tuple | list):
    return all(map(_is_plain, value))
  if isinstance(value, str):
    return "\0" not in value and not any("\ud800" <= character <= "\udfff" for character in value)
  return not isinstance(value, int | float) or abs(value) <= LARGEST[float]


def is_within(field: Field, value: float) -> bool:
  """Whether a number is within the bounds of a field; NaN is within none.

  >>> alpha = Field(0.01, "weight", above=0, at_most=1)
  >>> is_within(alpha, 1), is_within(alpha, 0)
  (True, False)
  """
  largest = LARGEST[type(field.default)]
  return (
    value >= (-largest if field.at_least is None else field.at_least)
    and (field.above is None or value > field.above)
    and value <= (largest if field.at_most is None else field.at_most)
  )


def bounds(field: Field) -> str:
  """The bounds of a field in words.

  >>> bounds(Field(0.01, "weight", above=0, at_most=1))
  'more than 0 and at most 1'
  >>> bounds(Field(3, "steps"))
  'at least -2147483647 and at most 2147483647'
  """
  largest = LARGEST[type(field.default)]
  least = -largest if field.at_least is None else field.at_least
  lower = f"at least {least}" if field.above is None else f"more than {field.above}"
  return f"{lower} and at most {largest if field.at_most is None else field.at_most}"
