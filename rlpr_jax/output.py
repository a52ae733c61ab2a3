"""The screen: what a program prints can neither end nor delay it.

A reader that goes away (`| head`), a disk that fills up with the log on it, a terminal that is closed or stopped: what
is printed is then lost, and nothing else.
"""

import contextlib
import io
import os
import queue
import sys
import threading
from collections.abc import Iterator
from typing import TextIO

_MOST = 10_000  # texts that wait for a reader who is slow; what comes beyond that is lost
_PATIENCE = 1.0  # seconds that a flush waits for one


class ShieldedStream(io.TextIOBase):
  """A stream of text in front of another: another thread writes there, and nothing is raised.

  >>> screen = io.StringIO()
  >>> print("step 1", file=ShieldedStream(screen), flush=True)
  >>> screen.getvalue()
  'step 1\\n'
  """

  def __init__(self, stream: TextIO):
    self._stream, self._patience = stream, _PATIENCE
    self._waiting: queue.SimpleQueue[str | threading.Event] = queue.SimpleQueue()  # may be put into by signal handlers
    threading.Thread(target=self._write_for_ever, daemon=True, name="output").start()

  def write(self, text: str) -> int:
    if self._waiting.qsize() < _MOST:
      self._waiting.put(text)
    return len(text)

  def flush(self) -> None:
    """Waits until all is written, for a moment; not at all for a reader that let it wait before and is still stuck."""
    written = threading.Event()
    self._waiting.put(written)
    self._patience = _PATIENCE if written.wait(self._patience) else 0.0

  def writable(self) -> bool:
    return True

  def isatty(self) -> bool:
    try:
      return self._stream.isatty()
    except (OSError, ValueError):
      return False

  def fileno(self) -> int:
    return self._stream.fileno()

  def _write_for_ever(self) -> None:
    while True:
      item = self._waiting.get()
      if isinstance(item, threading.Event):
        item.set()
      else:
        with contextlib.suppress(OSError, ValueError):
          self._write(item)

  def _write(self, text: str) -> None:
    """Past the stream's own buffer, which Python would try to write once more when it ends."""
    try:
      number = self._stream.fileno()
    except (OSError, ValueError):  # no file: a notebook's, a test's
      self._stream.write(text)
      self._stream.flush()
      return
    data = text.encode(getattr(self._stream, "encoding", None) or "utf-8", "backslashreplace")
    while data:
      data = data[os.write(number, data) :]


@contextlib.contextmanager
def shielded() -> Iterator[None]:
  """Around a program: whatever becomes of its output and error stream, it goes on."""
  for number in range(3):
    try:
      os.fstat(number)
    except OSError:  # closed: the next file that is opened would get what is printed
      os.open(os.devnull, os.O_RDWR)
  before = sys.stdout, sys.stderr
  # Python has no stream where its output was closed.
  sys.stdout, sys.stderr = (ShieldedStream(stream or open(os.devnull, "w")) for stream in before)  # noqa: SIM115
  try:
    yield
  finally:
    for stream in (sys.stdout, sys.stderr):
      stream.flush()
    sys.stdout, sys.stderr = before
