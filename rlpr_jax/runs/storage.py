"""Writing to disks that may be full, unwritable or gone for a while."""

import os
import pathlib
import sys
from collections.abc import Callable
from typing import BinaryIO, TypeVar

import tenacity

from rlpr_jax.errors import is_lasting, trouble

T = TypeVar("T")
_BLOCK = 2**20  # bytes


def persist(write: Callable[[], T], where: pathlib.Path, seconds: float) -> T:
  """Calls `write` until it succeeds: trouble with the storage costs time, and not the run.

  Args:
    where: what is written, for messages.
    seconds: how long to try.

  Raises:
    MachineError: it failed for so long.
    InputError: something is in the way, which is not waited for, or there was no permission for so long.
  """

  def say(attempt: tenacity.RetryCallState) -> None:
    error = attempt.outcome and attempt.outcome.exception()
    why = reason(error) if error else "failed"
    print(f"{where}: {why}, trying again in {attempt.upcoming_sleep:.0f}s", file=sys.stderr, flush=True)

  def may_pass(error: BaseException) -> bool:
    return isinstance(error, PermissionError) or (isinstance(error, OSError) and not is_lasting(error))

  attempts = tenacity.Retrying(
    retry=tenacity.retry_if_exception(may_pass),
    wait=tenacity.wait_exponential(multiplier=0.5, max=30),
    stop=tenacity.stop_after_delay(seconds),
    before_sleep=say,
    reraise=True,
  )
  try:
    return attempts(write)
  except OSError as error:
    tried = f", tried for {seconds:.0f}s" if may_pass(error) else ""
    message = f"{where}: cannot be written ({reason(error)}){tried}; the same command goes on from the last checkpoint"
    raise trouble(error, message) from None


def reason(error: BaseException) -> str:
  """An error in one line.

  >>> reason(ValueError("too\\n long"))
  'too long'
  """
  return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())[:200]


def write_atomically(path: pathlib.Path, content: str | bytes) -> None:
  """Either the old file or the whole new one is there, whenever the process dies.

  Half a surrogate pair, which a text of somebody else's JSON may hold, is written as JSON spells it.
  """
  temporary = path.with_name(f"{path.name}.partial")
  with temporary.open("wb") as file:
    file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


def write_result(path: pathlib.Path, content: str | bytes) -> None:
  """What a program was asked for, as `write_atomically` does, in a directory that is made where there is none.

  Raises:
    InputError: it cannot be written until somebody mends it.
    MachineError: the disk is full or gone.
  """
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)
  except OSError as error:
    raise trouble(error, f"{path}: cannot be written ({reason(error)})") from None


def free_name(path: pathlib.Path) -> pathlib.Path:
  """A name beside a file that nothing has yet, to keep the file by as it is: metrics.jsonl.1, metrics.jsonl.2 ...

  >>> free_name(pathlib.Path("/nowhere/metrics.jsonl")).name
  'metrics.jsonl.1'
  """
  number = 1
  while os.path.lexists(candidate := path.with_name(f"{path.name}.{number}")):
    number += 1
  return candidate


def append(path: pathlib.Path, line: str) -> None:
  """Appends a line; it is on disk when this returns. Part of a line that failed before is taken back first."""
  with path.open("ab+") as file:
    file.truncate(_whole_lines(file))
    file.write(line.encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def _whole_lines(file: BinaryIO) -> int:
  """Bytes up to the last end of a line."""
  end = file.seek(0, os.SEEK_END)
  size = 1  # most files end with a whole line
  while end > 0:
    begin = file.seek(max(end - size, 0))
    place = file.read(end - begin).rfind(b"\n")
    if place >= 0:
      return begin + place + 1
    end, size = begin, _BLOCK
  return 0
