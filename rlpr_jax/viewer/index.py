"""An index of a run's rollouts: where each lies, and the numbers by which rollouts are chosen; no text is kept."""

import contextlib
import dataclasses
import os
import pathlib
from array import array
from collections.abc import Iterable, Mapping

import numpy as np

from rlpr_jax.answers import extract_answer
from rlpr_jax.report.gallery import text
from rlpr_jax.report.records import Json, finite, number, parse
from rlpr_jax.viewer.tail import Line, Tail

AT_ONCE = 2**24  # bytes that one look reads, so that a page is answered soon; the next look goes on


@dataclasses.dataclass(frozen=True)
class Table:
  """All rollouts that are known, N, in the order of their files."""

  names: list[str]  # of the files, without their suffix
  file: np.ndarray  # int32[N], place in `names`
  number: np.ndarray  # int32[N] of the rollout in its file, from 1
  source: np.ndarray  # int32[N], place in `sources`
  sources: list[str]
  group: np.ndarray  # int32[N]: the same for the responses to one prompt of one step
  columns: dict[str, np.ndarray]  # float64[N] each, NaN where a rollout has no such number

  def __len__(self) -> int:
    return len(self.file)

  def id(self, place: int) -> str:
    """The name of a rollout in an address: its file, and its number there."""
    return f"{self.names[self.file[place]]}:{self.number[place]}"

  def find(self, id: str) -> int | None:
    """The place of a rollout; None where there is none of that name."""
    name, _, row = id.rpartition(":")
    if name not in self.names or not (row.isascii() and row.isdigit() and len(row) < 10):
      return None
    places = np.flatnonzero((self.file == self.names.index(name)) & (self.number == int(row)))
    return int(places[0]) if len(places) else None


def numbers(row: Json) -> dict[str, float]:
  """Every number of a rollout, and what else it may be chosen by: 1 and 0 are yes and no.

  >>> row = {"step": 2, "reference": "4", "response": "<answer></answer>"}
  >>> row |= {"reward_reference": 0.5, "reward_baseline": 0.25}
  >>> found = numbers(row)
  >>> [found[name] for name in ("step", "gain", "empty", "exact")]
  [2.0, 0.25, 1.0, 0.0]
  """
  found = {name: value for name, content in row.items() if (value := finite(content)) is not None}
  answer = extract_answer(text(row, "response"))
  references = row.get("references") or [text(row, "reference")]
  found["answered"] = float(answer is not None)
  found["empty"] = float(answer == "")
  found["exact"] = float(answer is not None and answer in [str(reference).strip() for reference in references])
  if "finish" in row:
    found["truncated"] = float(row["finish"] == "length")
  reference, baseline = number(row, "reward_reference"), number(row, "reward_baseline")
  if reference is not None and baseline is not None:
    found["gain"] = reference - baseline
  return found


class RolloutFile:
  """The rollouts of one file: their places and numbers."""

  def __init__(self, path: pathlib.Path, sources: dict[str, int]):
    self.tail = Tail(path)
    self.damaged = 0
    self.generation = 0  # counts how often it was read anew
    self._sources = sources
    self._begin()

  def _begin(self) -> None:
    self.offsets, self.sizes, self.source = array("q"), array("q"), array("i")
    self._numbers: dict[str, array[float]] = {}
    self.columns: dict[str, np.ndarray] = {}
    self.damaged = 0

  def __len__(self) -> int:
    return len(self.offsets)

  def column(self, name: str) -> np.ndarray:
    """float64 of each rollout, NaN where it has no such number."""
    return self.columns[name] if name in self.columns else np.full(len(self), np.nan)

  def look(self, most: int) -> tuple[bool, bool]:
    """Reads what is new; whether there was anything, and whether there is more at once."""
    news = self.tail.look(most)
    if news.anew:
      self.generation += 1
      self._begin()
    for line in news.lines:
      self._add(line)
    self.damaged += news.damaged
    if news.lines:
      self.columns = {name: np.array(values) for name, values in self._numbers.items()}
    return news.anew or bool(news.lines) or news.damaged > 0, news.more

  def _add(self, line: Line) -> None:
    found, before = numbers(line.content), len(self)
    for name in found.keys() - self._numbers.keys():
      self._numbers[name] = array("d", [np.nan]) * before
    for name, values in self._numbers.items():
      values.append(found.get(name, np.nan))
    source = text(line.content, "source")
    self.source.append(self._sources.setdefault(source, len(self._sources)))
    self.offsets.append(line.offset)
    self.sizes.append(line.size)


class Index:
  """The rollouts in a directory, followed as it changes."""

  def __init__(self, directory: pathlib.Path):
    self._directory = directory
    self._sources: dict[str, int] = {}
    self._table: Table | None = None
    self.files: dict[str, RolloutFile] = {}  # by name without suffix
    self.version = 0  # counts changes
    self.rows_read = 0  # parsed to be shown, over the index's life

  @property
  def damaged(self) -> int:
    """Lines that are no rollouts."""
    return sum(file.damaged for file in self.files.values())

  def look(self, most: int = AT_ONCE) -> bool:
    """Takes in what has changed, newest files first, and at most about `most` bytes; whether there is more at once."""
    there = self._scan()
    changed = bool(self.files.keys() - there.keys())
    self.files = {name: file for name, file in self.files.items() if name in there}
    left, more = most, False
    for name in sorted(there, reverse=True):
      file = self.files.get(name) or RolloutFile(self._directory / f"{name}.jsonl", self._sources)
      if file.tail.has_read(there[name]):
        continue
      if left <= 0:
        more = True
        break
      self.files[name] = file
      before = file.tail.read_bytes
      news, unfinished = file.look(left)
      left -= file.tail.read_bytes - before
      changed, more = changed or news, more or unfinished
    if changed:
      self.version += 1
      self._table = None
    return more

  def _scan(self) -> dict[str, os.stat_result]:
    """The files of rollouts that are there, by name without suffix."""
    found = {}
    with contextlib.suppress(OSError), os.scandir(self._directory) as entries:
      for entry in entries:
        if entry.name.endswith(".jsonl") and entry.is_file():
          with contextlib.suppress(OSError):  # deleted since
            found[entry.name.removesuffix(".jsonl")] = entry.stat()
    return found

  def table(self) -> Table:
    """All rollouts that were taken in."""
    if self._table is None:
      self._table = self._build()
    return self._table

  def _build(self) -> Table:
    names = sorted(self.files)
    files = [self.files[name] for name in names]
    lengths = [len(file) for file in files]
    columns = {
      name: np.concatenate([file.column(name) for file in files])
      for name in dict.fromkeys(name for file in files for name in file.columns)
    }
    place = np.repeat(np.arange(len(files), dtype=np.int32), lengths)
    begins = np.ones(len(place), bool)
    if len(place):
      prompts = [columns.get(name, np.full(len(place), np.nan)) for name in ("step", "row")]
      begins[1:] = (place[1:] != place[:-1]) | np.any([prompt[1:] != prompt[:-1] for prompt in prompts], axis=0)
    return Table(
      names=names,
      file=place,
      number=_join(np.arange(1, length + 1, dtype=np.int32) for length in lengths),
      source=_join(np.array(file.source, np.int32) for file in files),
      sources=list(self._sources),
      group=np.cumsum(begins, dtype=np.int32),
      columns=columns,
    )

  def read(self, places: Iterable[int]) -> dict[int, Json]:
    """Reads the rollouts at some places of the table; what is gone meanwhile is left out."""
    table = self.table()
    found: dict[int, Json] = {}
    by_file: dict[int, list[int]] = {}
    for place in places:
      by_file.setdefault(int(table.file[place]), []).append(int(place))
    for name, of_file in by_file.items():
      file = self.files[table.names[name]]
      rows = self.read_lines(file, [int(table.number[place]) - 1 for place in of_file])
      found |= {place: row for place, line in zip(of_file, rows, strict=True) if (row := parse(line)) is not None}
    self.rows_read += len(found)
    return found

  def read_lines(self, file: RolloutFile, rows: Iterable[int]) -> list[bytes]:
    """Reads lines of a file as they are; empty where they are gone."""
    lines = []
    try:
      with file.tail.path.open("rb") as handle:
        for row in rows:
          handle.seek(file.offsets[row])
          lines.append(handle.read(file.sizes[row]))
          file.tail.read_bytes += len(lines[-1])
    except OSError:
      return [b"" for _ in rows]
    return lines

  @property
  def read_bytes(self) -> int:
    """Bytes that were read of the files that are there, over the index's life."""
    return sum(file.tail.read_bytes for file in self.files.values())


def _join(parts: Iterable[np.ndarray]) -> np.ndarray:
  return np.concatenate([np.zeros(0, np.int32), *parts])


def column_names(table: Table) -> list[str]:
  """Columns with a number in any rollout, the usual ones first.

  >>> column_names(Table([], np.zeros(0), np.zeros(0), np.zeros(0), [], np.zeros(0), {"mine": 1, "step": 1}))
  ['step', 'mine']
  """
  usual = ("step", "reward_total", "reward_reference", "reward_baseline", "gain", "reward_debiased", "length")
  return [name for name in usual if name in table.columns] + sorted(table.columns.keys() - set(usual))


def mean_of(columns: Mapping[str, np.ndarray], name: str, places: np.ndarray) -> float | None:
  """The mean of a column over some places; None where none of them has a number.

  >>> mean_of({"gain": np.array([0.25, np.nan, 0.75])}, "gain", np.array([0, 1, 2]))
  0.5
  """
  values = columns[name][places] if name in columns else np.zeros(0)
  values = values[np.isfinite(values)]
  return float(values.mean()) if len(values) else None
