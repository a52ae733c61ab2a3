"""Stopping with nothing lost: a step that samples is given up, one that updates is finished."""

import os
import signal
import sys


class StopRequest:
  """Ctrl-C and SIGTERM ask the run to stop and save what it has; a second Ctrl-C interrupts at once."""

  def __init__(self) -> None:
    self._asked = False

  def __bool__(self) -> bool:
    return self._asked

  def __enter__(self) -> "StopRequest":
    self._previous = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _ask(self, number: int, _: object) -> None:
    self._asked = True
    signal.signal(number, self._previous[signal.Signals(number)])
    # Not by print, which may be what the signal came into.
    os.write(sys.stdout.fileno(), f"\n{signal.Signals(number).name}: saving what is done, then stopping\n".encode())
