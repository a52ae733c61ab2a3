"""What a run writes down while it goes: metrics, samples of rollouts, lines on the screen."""

import json
import os
import pathlib
import sys
import time
from collections.abc import Iterable
from typing import Any

import jax
from tensorboardX import SummaryWriter

from rlpr_jax import processes

_compilations = 0


def _count_compilation(event: str, _: float, **__: Any) -> None:
  global _compilations
  if event == "/jax/core/compile/backend_compile_duration":
    _compilations += 1


jax.monitoring.register_event_duration_secs_listener(_count_compilation)


def compilations() -> int:
  """Programs compiled (or fetched from the compilation cache) by this process so far."""
  return _compilations


class MetricsWriter:
  """WORKDIR/metrics.jsonl (one object a step), WORKDIR/tensorboard and WORKDIR/rollouts/."""

  def __init__(self, workdir: pathlib.Path, resume_after: int):
    """Opens them; what was written of steps after `resume_after` by a run that was killed is taken back.

    Of many processes the first writes, for all.
    """
    self._writes = processes.is_first()
    if not self._writes:
      return
    self._path = workdir / "metrics.jsonl"
    self._rollouts = workdir / "rollouts"
    self._rollouts.mkdir(exist_ok=True)
    write_atomically(self._path, "".join(f"{json.dumps(row)}\n" for row in read(self._path, resume_after)))
    for file in self._rollouts.glob("step_*.jsonl"):
      if int(file.stem.removeprefix("step_")) > resume_after:
        file.unlink()
    self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_after + 1)

  def write(self, step: int, values: dict[str, float]) -> None:
    """Appends one step's row; it is on disk when this returns."""
    if not self._writes:
      return
    with self._path.open("a") as file:
      file.write(json.dumps({"step": step, **values}) + "\n")
      file.flush()
      os.fsync(file.fileno())
    for name, value in values.items():
      self._tensorboard.add_scalar(name, value, step)
    self._tensorboard.flush()

  def write_rollouts(self, step: int, rows: Iterable[dict[str, Any]]) -> None:
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    if self._writes:
      write_atomically(self._rollouts / f"step_{step:06d}.jsonl", text)

  def close(self) -> None:
    if self._writes:
      self._tensorboard.close()


def read(path: pathlib.Path, last_step: int | None = None) -> list[dict[str, Any]]:
  """Rows of a metrics.jsonl up to `last_step`; a last line that was cut off by a crash is left out."""
  rows = []
  for line in path.read_text().splitlines() if path.exists() else ():
    try:
      row = json.loads(line)
    except ValueError:
      break
    if last_step is None or row["step"] <= last_step:
      rows.append(row)
  return rows


def write_atomically(path: pathlib.Path, text: str) -> None:
  """Either the old file or the whole new one is there, whenever the process dies."""
  temporary = path.with_name(f"{path.name}.partial")
  with temporary.open("w") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


class Progress:
  """One line that says how far a long piece of work is and how long the rest will take.

  On a terminal the line is rewritten in place; elsewhere a new one is printed every 15 seconds.
  """

  def __init__(self, label: str):
    self._label = label
    self._start = time.monotonic()
    self._printed = self._start

  def __call__(self, done: int, total: int, detail: str = "") -> None:
    now = time.monotonic()
    terminal, finished = sys.stdout.isatty(), done == total
    if not (terminal or finished or now - self._printed > 15):
      return
    self._printed = now
    elapsed = now - self._start
    rest = (
      f"in {duration(elapsed)}" if finished else f"{duration(elapsed * (total - done) / done)} left" if done else ""
    )
    line = f"{self._label} {done}/{total}  {detail}  {rest}".rstrip()
    print(f"\r\033[K{line}" if terminal else line, end="\n" if finished or not terminal else "", flush=True)


def duration(seconds: float) -> str:
  """3725 -> 1h02m; 125 -> 2m05s; 5 -> 5s."""
  whole = round(seconds)
  if whole >= 3600:
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
  return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"
