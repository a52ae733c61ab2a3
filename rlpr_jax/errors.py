"""Errors that are the user's to mend: one line that names the file, field or row and what was expected.

And how programs end by these and by all others: with one line each, and an exit status that says whether the same
command, given again, may do better.
"""

import contextlib
import errno
import os
import pathlib
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping

from rlpr_jax import interruption, output

# Exit statuses. launch/common.sh has them too: launchers start a program again after any but the first two.
USAGE = 2  # wrong input: the same command fails again
INTERRUPTED = interruption.STATUS  # Ctrl-C
MACHINE = 75  # the disk, the network, memory: the same command may do better (EX_TEMPFAIL of sysexits.h)
FAULT = 1  # of the program, which nobody foresaw

# What is in the way of a file stays there until somebody takes it away.
_LASTING = (
  errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP,
  errno.ENAMETOOLONG,
)  # fmt: skip


class InputError(ValueError):
  """Wrong input. The message is one line and says what was found, where, and what was expected."""


class MachineError(RuntimeError):
  """Trouble of the machine or the network that may pass. The message is one line and says what could not be done."""


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


class Ending:
  """What a program says when an error ends it, and its exit status."""

  def __init__(self) -> None:
    self.keep: Callable[[str], pathlib.Path | None] = _keep_nowhere  # takes a traceback; the file that it is in then

  def say(self, error: BaseException, who: str = "", why: str = "") -> int:
    """Says it in one line on stderr; where nobody foresaw the error, its traceback is in a file that the line names.

    Args:
      who: begins what is said.
      why: what may stand behind an error that nobody foresaw.

    Returns:
      the exit status.
    """
    if isinstance(error, KeyboardInterrupt):
      print(f"{who}interrupted", file=sys.stderr, flush=True)
    elif isinstance(error, InputError | MachineError):
      print(f"error: {who}{error}", file=sys.stderr, flush=True)
    else:
      trace = "".join(traceback.format_exception(error))
      file = self.keep(trace) or _keep_among_temporary_files(trace)
      if file is None:
        print(trace, end="", file=sys.stderr)
      where = f"; the traceback is in {file}" if file else ""
      print(f"error: {who}{_name(error)}{why and f', {why}'}{where}", file=sys.stderr, flush=True)
    return exit_status(error)


def exit_status(error: BaseException) -> int:
  """The exit status of a program that an error ends.

  >>> exit_status(InputError("x")), exit_status(MachineError("x")), exit_status(KeyboardInterrupt())
  (2, 75, 130)
  >>> exit_status(IsADirectoryError(21, "x")), exit_status(OSError(28, "No space left on device"))
  (2, 75)
  >>> exit_status(TypeError())
  1
  """
  if isinstance(error, KeyboardInterrupt):
    return INTERRUPTED
  if isinstance(error, InputError) or (isinstance(error, OSError) and is_lasting(error)):
    return USAGE
  return MACHINE if isinstance(error, MachineError | OSError | MemoryError) else FAULT


def is_lasting(error: OSError) -> bool:
  """Whether what is wrong with a file stays so until somebody mends it: no permission, a directory in its place.

  >>> is_lasting(PermissionError(13, "Permission denied")), is_lasting(OSError(5, "Input/output error"))
  (True, False)
  """
  return error.errno in _LASTING


def trouble(error: OSError, message: str) -> InputError | MachineError:
  """Trouble with a file in a program's words, the user's where it stays until it is mended, else the machine's.

  >>> trouble(OSError(28, "No space left on device"), "a.json: cannot be written")
  MachineError('a.json: cannot be written')
  """
  return InputError(message) if is_lasting(error) else MachineError(message)


def is_of_network(error: BaseException) -> bool:
  """Whether behind an error of a library there is a connection that failed, or a server that did.

  >>> is_of_network(ConnectionRefusedError(111, "Connection refused")), is_of_network(ValueError("no such name"))
  (True, False)
  """
  link: BaseException | None = error
  while link is not None:
    if type(link).__name__ == "OfflineModeIsEnabled":  # of huggingface_hub: the user's own wish
      return False
    status = getattr(getattr(link, "response", None), "status_code", None)
    if isinstance(status, int):
      return status >= 500 or status in (408, 429)
    if isinstance(link, ConnectionError | TimeoutError | socket.gaierror):
      return True
    link = link.__cause__ or link.__context__
  return False


@contextlib.contextmanager
def exit_with_one_line() -> Iterator[Ending]:
  """Around a program: whatever ends it is said in one line on stderr, and in its exit status.

  Yields:
    how it ends. A program that has a directory says there where tracebacks are kept.
  """
  interruption.end_as_usual()
  ending = Ending()
  with output.shielded():
    try:
      yield ending
    except (Exception, KeyboardInterrupt) as error:
      sys.exit(ending.say(error))


def _name(error: BaseException) -> str:
  """An error in one line, with what it is: `TypeError: ...`.

  >>> _name(OSError(28, "No space left on device", "a.json")), _name(KeyError("a"))
  ('a.json: No space left on device', "KeyError: 'a'")
  """
  if isinstance(error, OSError) and error.strerror:
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
  words = " ".join(str(error).split())
  return f"{type(error).__name__}: {words[:300]}" if words else type(error).__name__


def _keep_nowhere(trace: str) -> None:
  del trace


def _keep_among_temporary_files(trace: str) -> pathlib.Path | None:
  try:
    number, name = tempfile.mkstemp(".log", "rlpr_jax-")
    with os.fdopen(number, "w", errors="backslashreplace") as file:
      file.write(trace)
  except OSError:
    return None
  return pathlib.Path(name)


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
