"""WORKDIR/dropped_rows.jsonl: rows of the data that were of no use, each with its file, its number and why."""

import contextlib
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from rlpr_jax import processes
from rlpr_jax.data.sources import DroppedRow, count_reasons
from rlpr_jax.errors import trouble
from rlpr_jax.runs.storage import persist, reason, write_atomically

FILE = "dropped_rows.jsonl"


def write_dropped_rows(workdir: pathlib.Path, field: str, rows: Sequence[DroppedRow], retry_seconds: float) -> None:
  """Writes the rows of one field of the config, such as `config.data.path`; those of others that are there stay.

  Of many processes, which all read the same rows, the first writes. No rows leave no file.
  """
  path = workdir / FILE
  if not processes.is_first() or not (rows or path.exists()):
    return
  lines = [json.dumps(row) for row in _read(path) if row["field"] != field]
  lines += [json.dumps({"field": field, **row._asdict()}) for row in rows]
  if lines:
    persist(lambda: write_atomically(path, "".join(f"{line}\n" for line in lines)), path, retry_seconds)
  else:
    persist(lambda: path.unlink(missing_ok=True), path, retry_seconds)


def _read(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  """The rows of such a file; what is none is left out, as they are found anew with each start."""
  try:
    lines = path.read_bytes().splitlines() if path.exists() else []
  except OSError as error:
    raise trouble(error, f"{path}: cannot be read ({reason(error)}), expected rows that were dropped") from None
  for line in lines:
    with contextlib.suppress(ValueError, RecursionError):
      row = json.loads(line)
      if isinstance(row, dict) and "field" in row:
        yield row


def describe_dropped_rows(rows: Sequence[DroppedRow]) -> str:
  """The end of a line on data: how many rows cannot be used, for which reasons; "" for none.

  >>> describe_dropped_rows(
  ...   [DroppedRow("a.csv", 3, "answer: empty", "column answer: expected non-empty text, found ''")]
  ... )
  "; 1 unusable, named in dropped_rows.jsonl: {'answer: empty': 1}"
  """
  return f"; {len(rows)} unusable, named in {FILE}: {count_reasons(rows)}" if rows else ""
