"""Errors that are the user's to mend: one line that names the file, field or row and what was expected."""

import contextlib
import sys
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
def needs_extra(extra: str) -> Iterator[None]:
  """Around imports of packages that only an extra of this one brings: a lack of them is said in one line.

  Raises:
    InputError: one of them is not installed.
  """
  try:
    yield
  except ModuleNotFoundError as error:
    raise InputError(f"{error.name}: not installed, expected the extra: pip install 'rlpr_jax[{extra}]'") from None
