"""Stack traces of libraries: hundreds of lines around the one that matters go to a file, WORKDIR/traces.log."""

import contextlib
import gc
import logging
import pathlib
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

NAME = "traces.log"


def keep(workdir: pathlib.Path, text: str) -> pathlib.Path | None:
  """Appends to the file, and returns it; None where that fails too, as on a full disk."""
  path = workdir / NAME
  try:
    with path.open("a", errors="backslashreplace") as file:
      file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')}\n{text.rstrip()}\n")
  except OSError:
    return None
  return path


@contextlib.contextmanager
def kept(workdir: pathlib.Path) -> Iterator[None]:
  """Around a run: what threads and coroutines of libraries leave behind, and absl's errors, is kept in the file.

  What concerns the run is raised as well, and said in one line.
  """
  hooks = sys.unraisablehook, threading.excepthook
  absl = logging.getLogger("absl")
  handler = _Handler(workdir)

  def keep_error(args: Any) -> None:
    trace = traceback.format_exception(args.exc_type, args.exc_value, args.exc_traceback)
    keep(workdir, "".join(trace))

  sys.unraisablehook = threading.excepthook = keep_error
  handlers, absl.handlers, propagate, absl.propagate = absl.handlers, [handler], absl.propagate, False
  try:
    yield
  finally:
    gc.collect()  # coroutines that failed say so when they are collected
    sys.unraisablehook, threading.excepthook = hooks
    absl.handlers, absl.propagate = handlers, propagate


class _Handler(logging.Handler):
  def __init__(self, workdir: pathlib.Path):
    super().__init__(logging.WARNING)
    self._workdir = workdir

  def emit(self, record: logging.LogRecord) -> None:
    keep(self._workdir, self.format(record))
