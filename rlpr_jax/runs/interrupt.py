"""Stopping with nothing lost: a step that samples is given up, one that updates is finished."""

import contextlib
import os
import select
import signal
import sys
import threading
import time

from rlpr_jax.runs.lock import is_alive

LAUNCHER = "RLPR_LAUNCHER"  # environment variable in which scripts of launch/ give their process id
_LOOK = 1.0  # seconds between two looks at the launcher


def stop_signals() -> list[signal.Signals]:
  """The signals that ask to stop. A SIGHUP that is ignored, as under nohup, stays so."""
  hang_up = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
  return [signal.SIGINT, signal.SIGTERM, *hang_up]


class StopRequest:
  """SIGTERM, SIGHUP and Ctrl-C ask the run to stop and save what it has; a second Ctrl-C interrupts at once.

  Further SIGTERMs change nothing: who sends them, a cluster or a launcher, kills what takes too long.

  >>> with StopRequest() as stop:
  ...   bool(stop)
  False
  """

  def __init__(self) -> None:
    self._asked = False

  def __bool__(self) -> bool:
    return self._asked

  def __enter__(self) -> "StopRequest":
    self._previous = {number: signal.signal(number, self._ask) for number in stop_signals()}
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _ask(self, number: int, _: object) -> None:
    first, self._asked = not self._asked, True
    with contextlib.suppress(Exception):  # whatever becomes of the words, the run is to save
      if number == signal.SIGINT:
        signal.signal(number, self._previous[signal.SIGINT])
      if first:
        _say(f"\n{signal.Signals(number).name}: saving what is done, then stopping\n")


def _say(text: str) -> None:
  """Not by print, which may be what the signal came into; nor to a pipe that is full, where it would wait."""
  file = sys.stdout.fileno()
  if select.select([], [file], [], 0)[1]:
    os.write(file, text.encode())


def watch_launcher() -> None:
  """Has this process end with the script of launch/ that started it, if one did: as by SIGTERM, so that it saves."""
  launcher = os.environ.get(LAUNCHER, "")
  if launcher.isdigit():
    threading.Thread(target=_end_with, args=(int(launcher),), name="launcher", daemon=True).start()


def _end_with(launcher: int) -> None:
  while os.getppid() == launcher or is_alive(launcher):
    time.sleep(_LOOK)
  while True:  # more than once: jax takes the first in many processes that have not begun yet
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_LOOK)
