"""Errors that are the user's to mend: one line that names the file, field or row and what was expected."""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator

USAGE = 2  # exit status for wrong input


class InputError(ValueError):
  """Wrong input. The message is one line and says what was found, where, and what was expected."""


@contextlib.contextmanager
def exit_on_input_error() -> Iterator[None]:
  """Turns an `InputError` into one line on stderr and exit status 2, for entry points."""
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
def user_code(where: str, path: str | os.PathLike) -> Iterator[None]:
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
