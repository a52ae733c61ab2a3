"""WORKDIR/dropped_rows.jsonl: rows of the data that were of no use, each with its file, its number and why."""

import json
import pathlib
from collections.abc import Sequence

from rlpr_jax import processes
from rlpr_jax.data.sources import DroppedRow, count_reasons
from rlpr_jax.runs.storage import persist, write_atomically

FILE = "dropped_rows.jsonl"


def write_dropped_rows(workdir: pathlib.Path, field: str, rows: Sequence[DroppedRow], retry_seconds: float) -> None:
  """Writes the rows of one field of the config, such as `config.data.path`; those of others that are there stay.

  Of many processes, which all read the same rows, the first writes. No rows leave no file.
  """
  path = workdir / FILE
  if not processes.is_first() or not (rows or path.exists()):
    return
  others = path.read_text().splitlines() if path.exists() else []
  lines = [line for line in others if json.loads(line)["field"] != field]
  lines += [json.dumps({"field": field, **row._asdict()}) for row in rows]
  if lines:
    persist(lambda: write_atomically(path, "".join(f"{line}\n" for line in lines)), path, retry_seconds)
  else:
    path.unlink()


def describe_dropped_rows(rows: Sequence[DroppedRow]) -> str:
  """The end of a line on data: how many rows cannot be used, for which reasons; "" for none.

  >>> describe_dropped_rows(
  ...   [DroppedRow("a.csv", 3, "answer: empty", "column answer: expected non-empty text, found ''")]
  ... )
  "; 1 unusable, named in dropped_rows.jsonl: {'answer: empty': 1}"
  """
  return f"; {len(rows)} unusable, named in {FILE}: {count_reasons(rows)}" if rows else ""
