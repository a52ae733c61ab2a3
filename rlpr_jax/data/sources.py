"""Questions with reference answers, read from files.

Two layouts are known. verl's: `prompt` is a list of chat messages and `reward_model` holds `ground_truth`, as in
openbmb/RLPR-Train-Dataset. Plain: a column of questions and a column of answers. Text is taken as it is written: an
answer 007 in a CSV file stays "007", and NA stays "NA".
"""

import contextlib
import csv
import json
import os
import reprlib
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlpr_jax.errors import InputError

if TYPE_CHECKING:
  import datasets

# Column names of the plain layout; the first that is there is read.
QUESTION = ("question", "prompt", "problem")
ANSWER = ("answer", "reference", "reference_answer", "ground_truth")
SOURCE = ("data_source", "source", "domain", "category")  # of each row, the first that it fills in
RESPONSE = ("response", "completion", "output")  # of demonstrations
SPLIT = "split"

WANTED = frozenset({*QUESTION, *ANSWER, *RESPONSE, *SOURCE, SPLIT, "reward_model"})

ROLES = ("system", "user", "assistant")

Columns = list[str]
Rows = list[tuple[int, dict[str, Any]]]  # 1-based number, column -> value


@dataclass(frozen=True)
class Example:
  """A question and its reference answer."""

  messages: tuple[dict[str, str], ...]  # chat messages {role, content}, at least one of them the user's
  reference: str  # not empty, without whitespace around it
  source: str  # where the question comes from; the file's stem when the file does not say
  row: int  # 1-based data row of the file; in JSONL the line


def load_examples(path: str | os.PathLike[str], split: str | None = None) -> list[Example]:
  """Reads the questions of a `.parquet`, `.jsonl`, `.csv` or `.json` file, in the file's order.

  Args:
    path: the file.
    split: keep only the rows whose column `split` says this; a file without that column is read whole.

  Raises:
    InputError: the file cannot be read, lacks a column, has no rows (of that split), or a row is not as expected.
  """
  path = Path(path)
  columns, rows = read_rows(path, WANTED)
  if not rows:
    raise InputError(f"{path}: expected at least one row, found none")
  if "reward_model" in columns:
    question, answer = _pick(path, columns, ("prompt",)), "reward_model"
    to_messages, to_reference = _verl_prompt, _verl_reference
  else:
    question, answer = _pick(path, columns, QUESTION), _pick(path, columns, ANSWER)
    to_messages, to_reference = _plain_question, _text
  return [
    Example(
      messages=to_messages(row.get(question), f"{path}: row {number}, column {question}"),
      reference=to_reference(row.get(answer), f"{path}: row {number}, column {answer}").strip(),
      source=str(next((row[name] for name in SOURCE if row.get(name)), path.stem)),
      row=number,
    )
    for number, row in _of_split(path, columns, rows, split)
  ]


def load_demonstrations(path: str | os.PathLike[str], split: str | None = None) -> list[tuple[Example, str]]:
  """Reads prompts, each with a response to imitate: a column of questions or of chat messages, and one of responses.

  Args, Raises: as for `load_examples`.

  Returns:
    each row's question, without a reference, and its response as it is written.
  """
  path = Path(path)
  columns, rows = read_rows(path, WANTED)
  if not rows:
    raise InputError(f"{path}: expected at least one row, found none")
  question, response = _pick(path, columns, QUESTION), _pick(path, columns, RESPONSE)
  pairs = []
  for number, row in _of_split(path, columns, rows, split):
    value, where = row.get(question), f"{path}: row {number}, column {question}"
    messages = _verl_prompt(value, where) if isinstance(value, list) else _plain_question(value, where)
    text = _text(row.get(response), f"{path}: row {number}, column {response}")
    pairs.append((Example(messages, "", path.stem, number), text))
  return pairs


def _pick(path: Path, columns: Columns, names: Sequence[str]) -> str:
  """The first of `names` among the columns."""
  for name in names:
    if name in columns:
      return name
  raise InputError(f"{path}: expected a column {' or '.join(names)}, found only {', '.join(columns)}")


def _of_split(path: Path, columns: Columns, rows: Rows, split: str | None) -> Rows:
  if split is None or SPLIT not in columns:
    return rows
  kept = [(number, row) for number, row in rows if row.get(SPLIT) == split]
  if not kept:
    found = ", ".join(sorted({str(row.get(SPLIT)) for _, row in rows}))
    raise InputError(f"{path}: expected rows with {split} in column {SPLIT}, found only {found}")
  return kept


# ---- one cell ----


def _text(value: Any, where: str) -> str:
  if not isinstance(value, str) or not value.strip():
    raise InputError(f"{where}: expected non-empty text, found {reprlib.repr(value)}")
  try:
    value.encode()
  except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which no tokenizer takes
    raise InputError(f"{where}: expected text, found a lone surrogate at character {error.start + 1}") from error
  return value


def _plain_question(value: Any, where: str) -> tuple[dict[str, str], ...]:
  return ({"role": "user", "content": _text(value, where)},)


def _verl_prompt(value: Any, where: str) -> tuple[dict[str, str], ...]:
  expected = f"{where}: expected a list of messages {{role, content}}, one or more of them the user's"
  if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
    raise InputError(f"{expected}; found {reprlib.repr(value)}")
  roles = [message.get("role") for message in value]
  if "user" not in roles or not all(role in ROLES for role in roles):
    raise InputError(f"{expected}; found roles {reprlib.repr(roles)}")
  return tuple(
    {"role": message["role"], "content": _text(message.get("content"), f"{where}, message {number}")}
    for number, message in enumerate(value, 1)
  )


def _verl_reference(value: Any, where: str) -> str:
  if not isinstance(value, dict):
    raise InputError(f"{where}: expected {{style, ground_truth}}, found {reprlib.repr(value)}")
  return _text(value.get("ground_truth"), f"{where}.ground_truth")


# ---- one file ----


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
