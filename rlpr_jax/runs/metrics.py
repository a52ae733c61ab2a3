"""Output of a run while it goes: metrics, samples of rollouts, lines on the screen."""

import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from rlpr_jax import processes
from rlpr_jax.data.sources import DroppedRow
from rlpr_jax.runs import dropped_rows
from rlpr_jax.runs.storage import append, persist, write_atomically

_compilations = 0


def _count_compilation(event: str, duration_secs: float, **_: str | int) -> None:
  global _compilations
  if event == "/jax/core/compile/backend_compile_duration":
    _compilations += 1


jax.monitoring.register_event_duration_secs_listener(_count_compilation)


def compilations() -> int:
  """Programs compiled (or fetched from the compilation cache) by this process so far."""
  return _compilations


class MetricsWriter:
  """WORKDIR/metrics.jsonl (one object a step), WORKDIR/tensorboard, WORKDIR/rollouts/ and what data was of no use."""

  def __init__(self, workdir: pathlib.Path, resume_after: int, retry_seconds: float):
    """Opens them; what was written of steps after `resume_after` by a run that was killed is taken back.

    Of many processes the first writes, for all.

    Args:
      retry_seconds: how long trouble with the storage is borne.
    """
    self._path, self._rollouts = workdir / "metrics.jsonl", workdir / "rollouts"
    self._seconds = retry_seconds
    self._workdir, self._directory = workdir, workdir / "tensorboard"
    self._events: Any = None  # the writer of its file, once something is written
    self.rows = read(self._path, resume_after)  # all that is written, on every process
    if processes.is_first():
      from tensorboardX.proto import event_pb2  # with it comes torch, where that is installed

      self._rollouts.mkdir(exist_ok=True)
      self._rewrite()
      for file in self._rollouts.glob("step_*.jsonl"):
        if int(file.stem.removeprefix("step_")) > resume_after:
          file.unlink()
      start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)  # hides what is after this step
      self._persist(self._directory, lambda: self._to_tensorboard(step=resume_after + 1, session_log=start))

  def write(self, step: int, values: dict[str, float]) -> None:
    """Appends one step's row; it is on disk when this returns."""
    self.rows.append({"step": step, **values})
    if processes.is_first():
      self._persist(self._path, lambda: append(self._path, json.dumps(self.rows[-1])))
      self._scalars(step, values)

  def amend(self, values: dict[str, float]) -> None:
    """Adds to the last row."""
    self.rows[-1] |= values
    if processes.is_first():
      self._rewrite()
      self._scalars(self.rows[-1]["step"], values)

  def _rewrite(self) -> None:
    text = "".join(f"{json.dumps(row)}\n" for row in self.rows)
    self._persist(self._path, lambda: write_atomically(self._path, text))

  def _scalars(self, step: int, values: dict[str, float]) -> None:
    from tensorboardX.proto import summary_pb2

    scalars = [summary_pb2.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
    summary = summary_pb2.Summary(value=scalars)
    self._persist(self._directory, lambda: self._to_tensorboard(step=step, summary=summary))

  def write_rollouts(self, step: int, rows: Iterable[dict[str, Any]]) -> None:
    if processes.is_first():
      path, text = self._rollouts / f"step_{step:06d}.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows)
      self._persist(path, lambda: write_atomically(path, text))

  def write_dropped_rows(self, field: str, rows: Sequence[DroppedRow]) -> None:
    """Names the rows of the files of a field of the config that cannot be used."""
    dropped_rows.write_dropped_rows(self._workdir, field, rows, self._seconds)

  def _persist(self, path: pathlib.Path, write: Callable[[], None]) -> None:
    persist(write, path, self._seconds)

  def _to_tensorboard(self, **fields: Any) -> None:
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto import event_pb2

    try:
      if self._events is None:
        self._directory.mkdir(exist_ok=True)
        self._events = EventsWriter(str(self._directory / "events"))
      self._events.write_event(event_pb2.Event(wall_time=time.time(), **fields))
      self._events.flush()
    except OSError:
      self._events = None  # a record may be broken off: go on in another file
      raise

  def close(self) -> None:
    if self._events is not None:
      self._events.close()


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
  """3725 -> 1h02m; 125 -> 2m05s; 5 -> 5s.

  >>> duration(3725), duration(125), duration(5)
  ('1h02m', '2m05s', '5s')
  """
  whole = round(seconds)
  if whole >= 3600:
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
  return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"
