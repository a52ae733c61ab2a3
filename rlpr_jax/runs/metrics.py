"""Output of a run while it goes: metrics, samples of rollouts, lines on the screen."""

import contextlib
import functools
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import rich.progress

from rlpr_jax import processes
from rlpr_jax.data.sources import DroppedRow
from rlpr_jax.errors import InputError
from rlpr_jax.runs import dropped_rows
from rlpr_jax.runs.storage import append, free_name, persist, reason, write_atomically
from rlpr_jax.runs.trackers import TensorBoard

Row = dict[str, Any]  # "step" and the metrics of it
_compilations = 0


def _count_compilation(event: str, duration_secs: float, **_: str | int) -> None:
  global _compilations
  if event == "/jax/core/compile/backend_compile_duration":
    _compilations += 1


jax.monitoring.register_event_duration_secs_listener(_count_compilation)


def compilations() -> int:
  """Programs compiled (or fetched from the compilation cache) by this process so far."""
  return _compilations


class History(NamedTuple):
  """What a metrics.jsonl says."""

  rows: list[Row]  # in the file's order
  damaged: list[str]  # "line 7: not UTF-8", for what is no row of metrics


class MetricsWriter:
  """WORKDIR/metrics.jsonl (one object a step), WORKDIR/tensorboard, WORKDIR/rollouts/ and what data was of no use.

  All of them are there again with the next step where somebody deletes them: what is written is kept in memory too.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    resume_after: int | None,
    retry_seconds: float,
    unsaved: int = 0,
    tensorboard: bool = True,
  ):
    """Opens them; what was written of steps after `resume_after` by a run that was killed is taken back.

    What is no row of metrics is left out, and the file as it was is kept beside the new one. Of many processes the
    first writes, for all.

    Args:
      resume_after: step of the checkpoint that a run goes on from; None where there is none.
      retry_seconds: how long trouble with the storage is borne.
      unsaved: how many steps a run may have taken before its first checkpoint.
      tensorboard: whether its files are written.

    Raises:
      InputError: metrics of more steps than that have no checkpoint, or what is there is no file of metrics.
    """
    self._path, self._rollouts = workdir / "metrics.jsonl", workdir / "rollouts"
    self._seconds = retry_seconds
    self._workdir = workdir
    self._last = -1 if resume_after is None else resume_after
    history = read_history(self._path)
    steps = [row["step"] for row in history.rows]
    if resume_after is None and max(steps, default=0) > unsaved:
      raise InputError(
        f"{self._path}: metrics of {max(steps)} steps, and {workdir / 'checkpoints'} holds no checkpoint: expected the"
        " checkpoints back, or --fresh to begin anew"
      )
    if os.path.lexists(self._rollouts) and not self._rollouts.is_dir():
      raise InputError(f"{self._rollouts}: not a directory, expected one for samples of rollouts")
    self.rows = [row for row in history.rows if row["step"] <= self._last]  # all that is written, on every process
    self._tensorboard = TensorBoard(workdir, self.rows, self._last) if tensorboard and processes.is_first() else None
    if processes.is_first():
      if history.damaged:
        self._set_aside(history.damaged)
      if resume_after is not None and max((row["step"] for row in self.rows), default=-1) < resume_after:
        last = self.rows[-1]["step"] if self.rows else "no step at all"
        print(f"{self._path}: ends with {last}, the checkpoint is of step {resume_after}: what lies between is lost")
      self._persist(self._rollouts, lambda: self._rollouts.mkdir(exist_ok=True))
      self._rewrite()
      for file in self._rollouts.glob("step_*.jsonl"):
        step = file.stem.removeprefix("step_")
        if step.isascii() and step.isdigit() and int(step) > self._last:
          self._persist(file, functools.partial(file.unlink, missing_ok=True))
      if self._tensorboard:
        self._tensorboard.open()

  def _set_aside(self, damaged: Sequence[str]) -> None:
    """Keeps the file as it is beside the new one, and says why."""
    copy = free_name(self._path)
    more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
    print(f"{self._path}, {damaged[0]}{more}: left out, the file as it was is {copy.name}", flush=True)
    content = self._path.read_bytes()
    self._persist(copy, lambda: write_atomically(copy, content))

  def write(self, step: int, values: dict[str, float]) -> None:
    """Appends one step's row; it is on disk when this returns."""
    self.rows.append({"step": step, **values})
    if processes.is_first():
      if self._path.exists():
        self._persist(self._path, lambda: append(self._path, json.dumps(self.rows[-1])))
      else:
        self._rewrite()
      if self._tensorboard:
        self._tensorboard.log(step, values)

  def amend(self, step: int, values: dict[str, float]) -> None:
    """Adds to the row of a step, which is the last one; writes it where it is lost."""
    if not self.rows or self.rows[-1]["step"] != step:
      self.write(step, values)
      return
    self.rows[-1] |= values
    if processes.is_first():
      self._rewrite()
      if self._tensorboard:
        self._tensorboard.log(step, values)

  def value(self, step: int, name: str) -> float | None:
    """What was measured after a step, if it was."""
    return self.rows[-1].get(name) if self.rows and self.rows[-1]["step"] == step else None

  def _rewrite(self) -> None:
    text = "".join(f"{json.dumps(row)}\n" for row in self.rows)
    self._persist(self._path, lambda: write_atomically(self._path, text))

  def write_rollouts(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
    if processes.is_first():
      path, text = self._rollouts / f"step_{step:06d}.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows)

      def write() -> None:
        self._rollouts.mkdir(exist_ok=True)
        write_atomically(path, text)

      self._persist(path, write)
      if self._tensorboard and rows:
        self._tensorboard.log_rollouts(step, rows)

  def write_dropped_rows(self, field: str, rows: Sequence[DroppedRow]) -> None:
    """Names the rows of the files of a field of the config that cannot be used."""
    dropped_rows.write_dropped_rows(self._workdir, field, rows, self._seconds)

  def _persist(self, path: pathlib.Path, write: Callable[[], None]) -> None:
    persist(write, path, self._seconds)

  def close(self) -> None:
    if processes.is_first() and not self._path.exists():
      self._rewrite()
    if self._tensorboard is not None:
      self._tensorboard.close()


def read(path: pathlib.Path) -> list[Row]:
  """Rows of a metrics.jsonl; what is no row of metrics is left out."""
  return read_history(path).rows


def read_history(path: pathlib.Path) -> History:
  """Reads a metrics.jsonl; a last line that was cut off by a crash is no damage.

  Raises:
    InputError: it cannot be read.
  """
  try:
    lines = path.read_bytes().split(b"\n") if path.exists() else []
  except OSError as error:
    raise InputError(f"{path}: cannot be read ({reason(error)}), expected the metrics of a run") from None
  rows: list[Row] = []
  damaged: list[str] = []
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
      row, why = None, "not UTF-8" if isinstance(error, UnicodeDecodeError) else "not JSON"
    else:
      why = "no row of metrics with a step"
    if isinstance(row, dict) and type(row.get("step")) is int and all(isinstance(x, int | float) for x in row.values()):
      rows.append(row)
    elif number < len(lines):  # the last one ends in no newline
      damaged.append(f"line {number}: {why}")
  return History(rows, damaged)


class Progress:
  """Says how far a long piece of work is and how long the rest will take: a bar on a terminal, else lines.

  A line is printed every 15 seconds, and at the end.
  """

  def __init__(self, label: str):
    self._label = label
    self._start = time.monotonic()
    self._printed = self._start
    self._bar: rich.progress.Progress | None = None

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
    text = f"{done}/{total}  {detail}  {rest}".rstrip()
    if terminal:
      self._draw(done, total, text)
    else:
      print(f"{self._label} {text}", flush=True)

  def _draw(self, done: int, total: int, text: str) -> None:
    if self._bar is None:
      words = [rich.progress.TextColumn(f"{{task.{name}}}", markup=False) for name in ("description", "fields[text]")]
      self._bar = rich.progress.Progress(words[0], rich.progress.BarColumn(), words[1], auto_refresh=False)
      self._bar.add_task(self._label, text="")
      self._bar.start()
      self._bar.console.show_cursor(True)  # it stays where the work is given up
    (task,) = self._bar.task_ids
    self._bar.update(task, completed=done, total=total, text=text, refresh=True)
    if done == total:
      self._bar.stop()


@contextlib.contextmanager
def announced(work: str) -> Iterator[None]:
  """Around a piece of work that shows no progress: says what is done before it, and how long it took after it.

  >>> with announced("compiling"):
  ...   pass
  compiling ...
  compiling: 0s
  """
  start = time.monotonic()
  print(f"{work} ...", flush=True)
  yield
  print(f"{work}: {duration(time.monotonic() - start)}", flush=True)


def duration(seconds: float) -> str:
  """3725 -> 1h02m; 125 -> 2m05s; 5 -> 5s.

  >>> duration(3725), duration(125), duration(5)
  ('1h02m', '2m05s', '5s')
  """
  whole = round(seconds)
  if whole >= 3600:
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
  return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"
