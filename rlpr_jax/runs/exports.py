"""Exports of a run while it goes, in WORKDIR/exports and on the hub if wanted.

Each is a process of its own, `rlpr export` on the CPU, that reads a checkpoint from the disk: the run does not wait for
it and does not notice where it fails.
"""

import contextlib
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from typing import IO

from ml_collections import ConfigDict

NAME = "exports"
_LOG = "export.log"
_LAST = 1800.0  # seconds that one may take when a run is done
_LOOK = 0.5  # seconds between two looks at it


class Exports:
  """Starts an export for checkpoints that are due, one at a time; one that has to wait for another may be overtaken."""

  def __init__(self, workdir: pathlib.Path, config: ConfigDict):
    self._workdir, self._steps = workdir, config.steps
    self._settings = config.export
    self._running: subprocess.Popen[bytes] | None = None
    self._step = -1  # the last one that was begun

  def is_due(self, step: int) -> bool:
    """Whether the checkpoint of a step is to be exported; it has to be saved then.

    >>> from rlpr_jax.config import default
    >>> config = default()
    >>> config.export.every, config.steps = 20, 50
    >>> [step for step in range(51) if Exports(pathlib.Path("run"), config).is_due(step)]
    [20, 40, 50]
    """
    every = self._settings.every
    return every > 0 and step > 0 and (step % every == 0 or step == self._steps)

  def look(self, step: int | None) -> None:
    """Says what became of the one under way; starts that of the newest checkpoint on the disk, if it is due."""
    self._collect()
    free = self._running is None
    if free and step is not None and step > self._step and self.is_due(step) and not self._directory(step).exists():
      self._start(step)

  def finish(self, step: int | None, given_up: Callable[[], bool]) -> None:
    """Ends: waits for the one under way, and for that of the newest checkpoint.

    Args:
      given_up: asked again and again whether not to wait any longer.
    """
    self._wait(given_up)
    if not given_up():
      self.look(step)
      self._wait(given_up)

  def _wait(self, given_up: Callable[[], bool]) -> None:
    if self._running is not None and not given_up():
      print(f"waiting for the export of step {self._step}", flush=True)
    deadline = time.monotonic() + _LAST
    while self._running is not None and self._running.poll() is None:
      if given_up() or time.monotonic() > deadline:
        self._running.kill()
        self._running.wait()
        self._clear()
      else:
        time.sleep(_LOOK)
    self._collect()

  def _directory(self, step: int) -> pathlib.Path:
    return self._workdir / NAME / f"step_{step:06d}"

  def _start(self, step: int) -> None:
    self._step = step
    command = [sys.executable, "-m", "rlpr_jax.export", f"--workdir={self._workdir}", f"--step={step}"]
    command += [f"--out={self._directory(step)}", f"--dtype={self._settings.dtype}"]
    command += [f"--push={self._settings.push}"] if self._settings.push else []
    # The accelerators are the run's. Where memory is short, or the processor busy, the run goes first.
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    try:
      (self._workdir / NAME).mkdir(exist_ok=True)
      self._clear()
      with self._log("wb") as log:
        self._running = subprocess.Popen(
          command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )
    except OSError as error:
      print(f"export of step {step}: {error.strerror}", file=sys.stderr, flush=True)
      return
    with contextlib.suppress(OSError):
      os.setpriority(os.PRIO_PROCESS, self._running.pid, max(os.getpriority(os.PRIO_PROCESS, 0), 10))
      pathlib.Path(f"/proc/{self._running.pid}/oom_score_adj").write_text("1000")

  def _log(self, mode: str) -> IO[bytes]:
    return (self._workdir / NAME / _LOG).open(mode)

  def _clear(self) -> None:
    """Removes what an export has left that was killed."""
    for path in (self._workdir / NAME).glob(".step_*"):
      shutil.rmtree(path, ignore_errors=True)

  def _collect(self) -> None:
    if self._running is None or self._running.poll() is None:
      return
    status, self._running = self._running.returncode, None
    lines = [""]
    with contextlib.suppress(OSError), self._log("rb") as log:
      lines = log.read().decode(errors="replace").splitlines() or lines
    if status:
      said = next((line for line in reversed(lines) if line.startswith("error: ")), f"ended with status {status}")
      print(f"export of step {self._step}: {said.removeprefix('error: ')}", file=sys.stderr, flush=True)
    else:
      print(f"export of step {self._step}: {lines[-1]}", flush=True)
    exported = sorted(path for path in (self._workdir / NAME).glob("step_*") if path.is_dir())
    for path in exported[: -self._settings.keep]:
      shutil.rmtree(path, ignore_errors=True)
