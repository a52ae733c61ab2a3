"""Programs that a launcher starts: what asks the launcher to stop reaches them, and they end when it does."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from typing import Any

from rlpr_jax.runs.interrupt import LAUNCHER, stop_signals

_LOOK = 0.2  # seconds between two looks at the time


class Children:
  """Starts programs, and passes signals on to them: Ctrl-C as it is, SIGTERM and SIGHUP as SIGTERM.

  What has not ended `grace` seconds after the first signal is killed. Programs that call `watch_launcher` also end
  where the launcher itself is killed.

  >>> with Children(grace=5) as children:
  ...   children.start(["true"]).wait()
  0
  """

  def __init__(self, grace: float):
    self.told: int | None = None  # the signal that asked to stop
    self._told_at = 0.0
    self._grace = grace
    self._started: list[subprocess.Popen[bytes]] = []

  def __enter__(self) -> "Children":
    self._previous = {number: signal.signal(number, self._pass_on) for number in stop_signals()}
    threading.Thread(target=self._limit, name="grace", daemon=True).start()
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def start(self, command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Starts a program in a session of its own: a terminal's Ctrl-C would reach it a second time."""
    environment = os.environ | {LAUNCHER: str(os.getpid())}
    process: subprocess.Popen[bytes] = subprocess.Popen(command, start_new_session=True, env=environment, **options)
    self._started.append(process)
    if self.told is not None:  # since it was asked whether to start
      process.terminate()
    return process

  def kill(self) -> None:
    for process in self._started:
      process.kill()  # does nothing to one whose end is known

  def _pass_on(self, number: int, _: object) -> None:
    if self.told is None:
      self.told, self._told_at = number, time.monotonic()
    for process in self._started:
      process.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

  def _limit(self) -> None:
    while self.told is None or time.monotonic() - self._told_at < self._grace:
      time.sleep(_LOOK)
    self.kill()
