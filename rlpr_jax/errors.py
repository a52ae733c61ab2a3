"""Errors that are the user's to mend: one line that names the file, field or row and what was expected."""

import contextlib
import sys
from collections.abc import Iterator, Sequence

from absl import flags

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


def parse_flags(argv: Sequence[str]) -> list[str]:
  """Flags parser for `app.run`: a config file or field that cannot be taken is wrong input, not a stack trace."""
  with exit_on_input_error():
    try:
      return flags.FLAGS(list(argv))
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
      raise InputError(" ".join(str(error).split())) from None
