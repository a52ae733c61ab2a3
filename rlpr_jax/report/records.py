"""Reads what a run wrote, also while it is still writing."""

import contextlib
import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from rlpr_jax import errors
from rlpr_jax.report import style
from rlpr_jax.runs import ACCURACY

EXACT = "held_out/exact"  # share of the answers with a reference's very text
RECENT_FILES = 10  # rollout files read, newest first: a long run has more than a report can show

Json = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Series:
  """The finite values of one metric, in step order."""

  steps: np.ndarray  # int[N]
  values: np.ndarray  # float[N]

  def __len__(self) -> int:
    return len(self.steps)


@dataclasses.dataclass(frozen=True)
class Run:
  """One run, as far as it got.

  >>> run = Run("first", rows={0: {"loss": 2.0}, 1: {"loss": 1.5}}, config={}, rollouts=[], unreadable=0)
  >>> run.series("loss").values.tolist()
  [2.0, 1.5]
  """

  name: str
  rows: dict[int, Json]  # step -> its metrics, in step order
  config: Json
  rollouts: list[Json]  # of the newest files, newest file first
  unreadable: int  # lines that were not whole: 1 while a line is being written
  diagnosis: Json = dataclasses.field(default_factory=dict)  # of diagnosis.json, where rlpr diagnose has written one

  def series(self, key: str) -> Series:
    """All finite values of `key`; empty if it was never written."""
    points = [(step, value) for step, row in self.rows.items() if (value := number(row, key)) is not None]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return Series(np.array(steps, dtype=int), np.array(values, dtype=float))

  def metrics(self) -> list[str]:
    """Every metric that was written, in the order it first appeared."""
    return list(dict.fromkeys(key for row in self.rows.values() for key in row if key != "step"))

  def seconds(self) -> float | None:
    """Wall time of all steps, evaluations between them included. None if no step said."""
    values = self.series("seconds/step").values
    return float(values.sum()) if len(values) else None

  def exact(self) -> str:
    """Share of the answers with a reference's text at the first and the last evaluation; "" if it was not measured.

    >>> Run("first", rows={0: {EXACT: 0.25}, 9: {EXACT: 0.5}}, config={}, rollouts=[], unreadable=0).exact()
    '25.0% → 50.0%'
    """
    values = self.series(EXACT).values
    return " → ".join(style.percent(value) for value in values[:: max(len(values) - 1, 1)])

  def headline(self) -> tuple[str, str]:
    """(what was measured, its numbers): held-out accuracy at the first and the last evaluation."""
    accuracy = self.series(ACCURACY)
    ends = list(zip(accuracy.steps, accuracy.values, strict=True))[:: max(len(accuracy) - 1, 1)]
    when = " → ".join("before RL" if step == 0 else f"step {step}" for step, _ in ends)
    return f"Held-out accuracy, {when or 'not evaluated yet'}", " → ".join(style.percent(value) for _, value in ends)

  def domains(self) -> list[str]:
    """The held-out domains, by name."""
    prefix = f"{ACCURACY}/"
    return sorted(key.removeprefix(prefix) for key in self.metrics() if key.startswith(prefix))


def finite(value: object) -> float | None:
  """A finite number, or None: NaN is what a diverged run writes.

  >>> finite(2), finite(math.nan), finite("2"), finite(10**400)
  (2.0, None, None, None)
  """
  with contextlib.suppress(OverflowError):  # an integer that no float holds
    if isinstance(value, int | float) and math.isfinite(value):
      return float(value)
  return None


def number(row: Json, key: str) -> float | None:
  """The finite number under `key`, or None.

  >>> number({"loss": 2}, "loss")
  2.0
  """
  return finite(row.get(key))


def parse(line: bytes) -> Json | None:
  """The object of a line, None for a line that is not whole; what is not UTF-8 in it is shown as such.

  >>> parse(b'{"step": 1}'), parse(b'{"step": '), parse(b"1")
  ({'step': 1}, None, None)
  """
  try:
    content = json.loads(line.decode("utf-8", "replace"))
  except (ValueError, RecursionError):
    return None
  return content if isinstance(content, dict) else None


def read_lines(path: pathlib.Path) -> Iterator[Json | None]:
  """One object a line, None for a line that is not whole."""
  with path.open("rb") as file:
    yield from map(parse, file)


def read_metrics(path: pathlib.Path) -> tuple[dict[int, Json], int]:
  """(step -> metrics, unreadable lines). A step written twice, as after a resume, keeps the later values."""
  if not path.is_file():
    raise errors.InputError(f"{path}: no such file, expected the metrics of a run")
  rows: dict[int, Json] = {}
  unreadable = 0
  for content in read_lines(path):
    if content is None or not isinstance(content.get("step"), int):
      unreadable += 1
    else:
      rows.setdefault(content["step"], {}).update(content)
  if not rows:
    raise errors.InputError(f"{path}: no whole row with a step, expected one JSON object a line")
  return dict(sorted(rows.items())), unreadable


def read_object(path: pathlib.Path) -> Json:
  """An object of JSON, such as the config of the run; empty if there is no such file."""
  if not path.is_file():
    return {}
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except (ValueError, RecursionError) as error:
    raise errors.InputError(f"{path}: not JSON ({error})") from error
  return content if isinstance(content, dict) else {path.stem: content}


def read_run(workdir: pathlib.Path) -> Run:
  """Everything a report shows of `workdir`."""
  if not workdir.is_dir():
    raise errors.InputError(f"{workdir}: no such directory, expected that of a run")
  rows, unreadable = read_metrics(workdir / "metrics.jsonl")
  files = sorted(filter(pathlib.Path.is_file, (workdir / "rollouts").glob("*.jsonl")), reverse=True)[:RECENT_FILES]
  rollouts = [row for path in files for row in read_lines(path)]
  return Run(
    name=workdir.resolve().name,
    rows=rows,
    config=read_object(workdir / "config.json"),
    rollouts=[row for row in rollouts if row is not None],
    unreadable=unreadable + rollouts.count(None),
    diagnosis=read_object(workdir / "diagnosis.json"),
  )
