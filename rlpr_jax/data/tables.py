"""One file of rows: `.parquet`, `.jsonl`, `.csv` or `.json`. Text is taken as it is written."""

import contextlib
import csv
import json
import reprlib
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlpr_jax.errors import InputError

if TYPE_CHECKING:
  import datasets

Columns = list[str]
Rows = list[tuple[int, dict[str, Any]]]  # 1-based number, column -> value


def read_rows(path: Path, wanted: Collection[str] = ()) -> tuple[Columns, Rows]:
  """Reads a `.parquet`, `.jsonl`, `.csv` or `.json` file (a list of objects).

  Args:
    path: the file.
    wanted: the columns that are read of a parquet file, where each costs time; none for all.

  Returns:
    the names of all columns, and the rows.

  Raises:
    InputError: the file is not there or cannot be read, or a row is not an object of columns.
  """
  readers = {
    ".parquet": lambda path: _read_parquet(path, wanted),
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".json": _read_json,
  }
  if path.suffix.lower() not in readers:
    raise InputError(f"{path}: expected a file named {', '.join('*' + suffix for suffix in readers)}")
  if not path.is_file():
    raise InputError(f"{path}: expected a file, found {'a directory' if path.is_dir() else 'none'}")
  try:
    return readers[path.suffix.lower()](path)
  except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
    reason = " ".join(str(error).split())
    raise InputError(f"{path}: cannot be read as {path.suffix[1:]}: {reason}") from error


def plain_rows(table: "datasets.Dataset") -> list[dict[str, Any]]:
  """The rows of a dataset as Python values; images stay undecoded."""
  import datasets

  for name, feature in table.features.items():
    if isinstance(feature, datasets.Image):
      table = table.cast_column(name, datasets.Image(decode=False))
  return list(table.to_list())


def _read_parquet(path: Path, wanted: Collection[str]) -> tuple[Columns, Rows]:
  if pq.read_metadata(path).num_rows == 0:  # which `datasets` takes for an error
    return [], []
  # The library writes a copy of every file it reads: into a folder that goes again, not into the home directory.
  import datasets  # takes two seconds, pandas with it

  with tempfile.TemporaryDirectory() as cache, _quiet_datasets():
    try:
      table = datasets.Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True)
    except datasets.exceptions.DatasetGenerationError as error:
      raise pa.ArrowException(str(error.__cause__ or error)) from error
  kept = [name for name in table.column_names if not wanted or name in wanted]
  return table.column_names, list(enumerate(plain_rows(table.select_columns(kept)), 1))


# CSV and JSONL do not go through `datasets`: it guesses types (the answer "1981-03-12" becomes a timestamp, "42"
# beside 7 a number), drops the first field of rows that have one too many, and does not say which row is wrong.


def _read_csv(path: Path) -> tuple[Columns, Rows]:
  with path.open(encoding="utf-8-sig", newline="") as file:
    reader = csv.reader(file, strict=True)
    rows: Rows = []
    try:
      columns = next(reader, [])
      for fields in filter(None, reader):  # blank lines are no rows
        if len(fields) != len(columns):
          raise InputError(f"{path}: row {len(rows) + 1}: expected {len(columns)} fields, found {len(fields)}")
        rows.append((len(rows) + 1, dict(zip(columns, fields, strict=True))))
    except csv.Error as error:
      raise InputError(f"{path}: row {len(rows) + 1}: expected CSV, found {error}") from error
  return columns, rows


def _read_jsonl(path: Path) -> tuple[Columns, Rows]:
  rows: Rows = []
  with path.open(encoding="utf-8-sig") as file:
    for number, line in enumerate(file, 1):
      if not line.strip():
        continue
      try:
        row = json.loads(line)
      except ValueError as error:
        raise InputError(f"{path}: row {number}: expected JSON, found {error}") from error
      if not isinstance(row, dict):
        raise InputError(f"{path}: row {number}: expected a JSON object, found {reprlib.repr(row)}")
      rows.append((number, row))
  return list(dict.fromkeys(name for _, row in rows for name in row)), rows


def _read_json(path: Path) -> tuple[Columns, Rows]:
  try:
    found = json.loads(path.read_text(encoding="utf-8-sig"))
  except ValueError as error:
    raise InputError(f"{path}: expected JSON, found {error}") from error
  if not isinstance(found, list):
    raise InputError(f"{path}: expected a JSON list of objects, found {reprlib.repr(found)}")
  for number, row in enumerate(found, 1):
    if not isinstance(row, dict):
      raise InputError(f"{path}: row {number}: expected a JSON object, found {reprlib.repr(row)}")
  return list(dict.fromkeys(name for row in found for name in row)), list(enumerate(found, 1))


@contextlib.contextmanager
def _quiet_datasets() -> Iterator[None]:
  """No progress bars, and no log lines about what `InputError` says in one."""
  import datasets

  bars, verbosity = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
  datasets.disable_progress_bars()
  datasets.logging.set_verbosity(datasets.logging.CRITICAL)
  try:
    yield
  finally:
    datasets.logging.set_verbosity(verbosity)
    if bars:
      datasets.enable_progress_bars()
