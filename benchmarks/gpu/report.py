"""What a part finds, told line by line to a file, so that what came before a crash or a time-out is kept.

Each line is a JSON object with one key:

    {"row": {"table": ..., "columns": {...}}}   {"value": {"name": ..., "number": ...}}
    {"note": ...}   {"say": ...}   {"failed": ...}   {"skipped": ...}   {"refused": ...}
"""

import json
import math
import pathlib
import time
from typing import Any, NamedTuple

OK = "ok"  # the column of a row that is checked; a part with a row in which it is False has failed


class Job(NamedTuple):
  """What a part's process is told."""

  part: str
  events: str  # directory with a file of events for each part, NAME.jsonl
  out: str  # directory for files that come back
  until: float  # seconds since the epoch, when the process is ended
  cache: str  # directory of compiled programs
  rehearse: bool  # tiny sizes, to see that everything runs


class Report:
  """One part's side of it."""

  def __init__(self, job: Job):
    self.job = job
    self.rehearse = job.rehearse
    self._file = events_file(job, job.part).open("a")

  def row(self, table: str, columns: dict[str, Any], ok: bool | None = None) -> None:
    """One row of a table.

    Args:
      columns: headings and what stands under them: text, numbers, None for what is not known.
      ok: whether the row meets its bound; None where there is none.
    """
    if ok is not None:
      columns = columns | {OK: bool(ok)}
    self._tell("row", {"table": table, "columns": {name: _plain(value) for name, value in columns.items()}})

  def value(self, name: str, number: float) -> None:
    """A number that other parts ask for by its name."""
    self._tell("value", {"name": name, "number": _plain(number)})

  def note(self, text: str) -> None:
    """A line under the part's tables: what was left out, what a number means."""
    self._tell("note", text)

  def say(self, text: str) -> None:
    """What is being done."""
    self._tell("say", text)

  def failed(self, text: str) -> None:
    self._tell("failed", text)

  def skipped(self, text: str) -> None:
    self._tell("skipped", text)

  def refused(self, text: str) -> None:
    """No part can run here."""
    self._tell("refused", text)

  def left(self) -> float:
    """Seconds until the process is ended."""
    return self.job.until - time.time()

  def earlier(self, part: str, name: str) -> float | None:
    """A value of a part that ran before; None if there is none."""
    for kind, told in read(events_file(self.job, part)):
      if kind == "value" and told["name"] == name:
        return told["number"]
    return None

  def _tell(self, kind: str, what: Any) -> None:
    self._file.write(json.dumps({kind: what}) + "\n")
    self._file.flush()


def events_file(job: Job, part: str) -> pathlib.Path:
  return pathlib.Path(job.events) / f"{part}.jsonl"


def read(file: pathlib.Path) -> list[tuple[str, Any]]:
  """What was told, as (kind, what); a last line that is cut off is left out."""
  told = []
  for line in file.read_text().splitlines() if file.exists() else []:
    try:
      told += json.loads(line).items()
    except ValueError:
      break
  return told


def _plain(value: Any) -> Any:
  """As JSON takes it: numpy's numbers as Python's, and what is not finite as text."""
  value = value.item() if hasattr(value, "item") else value
  return str(value) if isinstance(value, float) and not math.isfinite(value) else value
