"""One file of rows: `.parquet`, `.jsonl`, `.csv` or `.json`. Text is taken as it is written."""

import contextlib
import csv
import json
import reprlib
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlpr_jax.errors import InputError

if TYPE_CHECKING:
  import datasets

Columns = list[str]
Rows = list[tuple[int, dict[str, Any]]]  # 1-based number, column -> value
Refuse = Callable[[int, str, str], None]  # what becomes of a row that is none: its number, why in a word, and in full

SUFFIXES = (".parquet", ".jsonl", ".csv", ".json")


def read_rows(
  path: Path, wanted: Collection[str] = (), name: str = "", refuse: Refuse | None = None
) -> tuple[Columns, Rows]:
  """Reads a `.parquet`, `.jsonl`, `.csv` or `.json` file (a list of objects).

  Args:
    path: the file.
    wanted: the columns that are read of a parquet file, where each costs time and may be of a kind that nothing here
      knows; none for all.
    name: what messages call the file; its path if "".
    refuse: is told of each row that is not an object of columns; without it, the first is an error.

  Returns:
    the names of all columns, and the rows.

  Raises:
    InputError: the file is not there or cannot be read, two of its columns have one name, or a row is not an object of
      columns.
  """
  name = name or str(path)

  def fail(number: int, _: str, why: str) -> None:
    raise InputError(f"{name}: row {number}: {why}")

  readers: dict[str, Callable[[Path, Refuse], tuple[Columns, Rows]]] = {
    ".parquet": lambda path, _: _read_parquet(path, wanted),
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".json": _read_json,
  }
  suffix = path.suffix.lower()
  if suffix not in readers:
    raise InputError(f"{name}: expected a file named {', '.join('*' + suffix for suffix in SUFFIXES)}")
  if not path.is_file():
    raise InputError(f"{name}: expected a file, found {'a directory' if path.is_dir() else 'none'}")
  try:
    return readers[suffix](path, refuse or fail)
  except InputError:
    raise
  except _NotReadableError as error:
    raise InputError(f"{name}: {error}") from error.__cause__
  except (OSError, ValueError, OverflowError, pa.ArrowException) as error:  # of text that is no UTF-8, dates of no year
    reason = " ".join(str(error).split())
    raise InputError(f"{name}: cannot be read as {suffix[1:]}: {reason}") from error


def plain_rows(table: "datasets.Dataset") -> list[dict[str, Any]]:
  """The rows of a dataset as Python values; images stay undecoded."""
  import datasets

  for name, feature in table.features.items():
    if isinstance(feature, datasets.Image):
      table = table.cast_column(name, datasets.Image(decode=False))
  return list(table.to_list())


class _NotReadableError(Exception):
  """Why a whole file is refused, without its name."""


def _check_names(columns: Columns) -> None:
  """Refuses two columns of one name: nobody could say which of them is read."""
  twice = [column for column, count in Counter(columns).items() if column and count > 1]
  if twice:
    raise _NotReadableError(f"expected columns of different names, found {twice[0]} {columns.count(twice[0])} times")


# No format goes through `datasets`. Of text it guesses types (the answer "1981-03-12" becomes a timestamp, "42" beside
# 7 a number), drops the first field of rows that have one too many, and does not say which row is wrong. Of parquet it
# wants to know every column, also those that are not read, and fails at what other versions of it have written.


def _read_parquet(path: Path, wanted: Collection[str]) -> tuple[Columns, Rows]:
  with pq.ParquetFile(path) as file:
    columns = [str(name) for name in file.schema_arrow.names]
    _check_names(columns)
    kept = [name for name in columns if not wanted or name in wanted]
    rows: Rows = []
    if kept:
      for batch in file.iter_batches(columns=kept):
        values = [_to_python(batch.column(name)) for name in kept]
        rows += enumerate((dict(zip(kept, row, strict=True)) for row in zip(*values, strict=True)), len(rows) + 1)
    else:
      rows = [(number, {}) for number in range(1, file.metadata.num_rows + 1)]
  return columns, rows


def _to_python(column: pa.Array) -> list[Any]:
  """The values of a column; a float of 32 or 16 bits with the digits that it was written with.

  >>> _to_python(pa.array([0.1, None], pa.float32()))
  [0.1, None]
  """
  if pa.types.is_float32(column.type) or pa.types.is_float16(column.type):
    numbers = column.to_numpy(zero_copy_only=False)
    return [
      float(str(number)) if valid else None
      for number, valid in zip(numbers, column.is_valid().to_pylist(), strict=True)
    ]
  return list(column.to_pylist())


def _read_csv(path: Path, refuse: Refuse) -> tuple[Columns, Rows]:
  with path.open(encoding="utf-8-sig", newline="") as file, _cells_of_any_size():
    reader = csv.reader(file, strict=True)
    rows: Rows = []
    number = 0
    try:
      columns = next(reader, [])
      _check_names(columns)
      for fields in filter(None, reader):  # blank lines are no rows
        number += 1
        if len(fields) == len(columns):
          rows.append((number, dict(zip(columns, fields, strict=True))))
        else:
          refuse(number, "wrong number of fields", f"expected {len(columns)} fields, found {len(fields)}")
    except csv.Error as error:  # where the next row begins is not known then
      raise _NotReadableError(f"row {number + 1}: expected CSV, found {error}") from error
  return columns, rows


@contextlib.contextmanager
def _cells_of_any_size() -> Iterator[None]:
  """The csv module's limit of 131,072 characters, which is one of the whole process, is off inside."""
  limit = csv.field_size_limit(sys.maxsize)
  try:
    yield
  finally:
    csv.field_size_limit(limit)


def _read_jsonl(path: Path, refuse: Refuse) -> tuple[Columns, Rows]:
  rows: Rows = []
  with path.open(encoding="utf-8-sig") as file:
    for number, line in enumerate(file, 1):
      if not line.strip():
        continue
      try:
        row = json.loads(line)
      except (ValueError, RecursionError) as error:
        refuse(number, "not JSON", f"expected JSON, found {error}")
        continue
      _add_object(rows, number, row, refuse)
  return _columns(rows), rows


def _read_json(path: Path, refuse: Refuse) -> tuple[Columns, Rows]:
  try:
    found = json.loads(path.read_text(encoding="utf-8-sig"))
  except (ValueError, RecursionError) as error:
    raise _NotReadableError(f"expected JSON, found {error}") from error
  if not isinstance(found, list):
    raise _NotReadableError(f"expected a JSON list of objects, found {reprlib.repr(found)}")
  rows: Rows = []
  for number, row in enumerate(found, 1):
    _add_object(rows, number, row, refuse)
  return _columns(rows), rows


def _add_object(rows: Rows, number: int, row: Any, refuse: Refuse) -> None:
  if isinstance(row, dict):
    rows.append((number, row))
  else:
    refuse(number, "not a JSON object", f"expected a JSON object, found {reprlib.repr(row)}")


def _columns(rows: Rows) -> Columns:
  """Names in the order in which they first come up.

  >>> _columns([(1, {"question": "q"}), (2, {"answer": "a", "question": "r"})])
  ['question', 'answer']
  """
  return list(dict.fromkeys(name for _, row in rows for name in row))
