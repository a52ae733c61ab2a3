"""Errors that are the user's to mend: one line that names the file, field or row and what was expected."""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator, Mapping

from rlpr_jax import output

USAGE = 2  # exit status for wrong input


class InputError(ValueError):
  """Wrong input. The message is one line and says what was found, where, and what was expected."""


class _OwnNames(dict[str, str]):
  """Names of settings that are those of the room that speaks."""

  def __missing__(self, name: str) -> str:
    return name


class SettingError(InputError):
  """A setting that cannot be, in the words of the room that finds it.

  A program says the same with its own names of the settings (`setting_names`). Where it has none for one of them, it
  says the next of the messages.

  >>> error = SettingError("{rows}: 64 is too much", "{slots}: 300 is too much")
  >>> str(error), error.renamed({"slots": "--slots"})
  ('rows: 64 is too much', '--slots: 300 is too much')
  """

  def __init__(self, *messages: str):
    """
    Args:
      messages: with names of settings in braces, and all other braces doubled.
    """
    self.messages = messages
    super().__init__(messages[0].format_map(_OwnNames()))

  def renamed(self, names: Mapping[str, str]) -> str:
    """The first message whose settings all have names here."""
    for message in self.messages:
      with contextlib.suppress(KeyError):
        return message.format_map(names)
    return str(self)


@contextlib.contextmanager
def setting_names(names: Mapping[str, str]) -> Iterator[None]:
  """Around a program: of a setting that cannot be, says which of the program's own it is.

  Args:
    names: the program's settings by the names of the rooms below; only of those that a user can change.
  """
  try:
    yield
  except SettingError as error:
    raise InputError(error.renamed(names)) from None


@contextlib.contextmanager
def exit_on_input_error() -> Iterator[None]:
  """Turns an `InputError` into one line on stderr and exit status 2, for entry points."""
  with output.shielded():
    try:
      yield
    except InputError as error:
      print(f"error: {error}", file=sys.stderr)
      sys.exit(USAGE)


@contextlib.contextmanager
def in_field(field: str, separator: str = ": ") -> Iterator[None]:
  """Begins the message of an `InputError` with the field of the config that it is about.

  >>> with in_field("config.mesh"):
  ...   raise InputError("sizes (3, 1, 1) do not multiply to the 8 devices that are there")
  Traceback (most recent call last):
  rlpr_jax.errors.InputError: config.mesh: sizes (3, 1, 1) do not multiply to the 8 devices that are there
  """
  try:
    yield
  except InputError as error:
    raise InputError(f"{field}{separator}{error}") from None


@contextlib.contextmanager
def user_code(where: str, path: str | os.PathLike[str]) -> Iterator[None]:
  """Around what a file of the user's own does: what goes wrong in it is said in one line, with that of the file.

  Args:
    where: begins the message.
    path: of the file, as Python was told it.

  Raises:
    InputError: something did.
  """
  try:
    yield
  except InputError:
    raise
  except (Exception, SystemExit) as error:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    at = f", line {line}" if line else ""
    raise InputError(f"{where}{at}: {type(error).__name__}: {' '.join(str(error).split())}") from None


@contextlib.contextmanager
def needs_extra(extra: str) -> Iterator[None]:
  """Around imports of packages that only an extra of this one brings: a lack of them is said in one line.

  Raises:
    InputError: one of them is not installed.
  """
  try:
    yield
  except ModuleNotFoundError as error:
    raise InputError(f"{error.name}: not installed, expected the extra: pip install 'rlpr_jax[{extra}]'") from None
