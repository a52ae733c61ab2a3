"""Questions with reference answers, read from files.

Two layouts are known. verl's: `prompt` is a list of chat messages and `reward_model` holds `ground_truth`, as in
openbmb/RLPR-Train-Dataset. Plain: a column of questions and a column of answers. Text is taken as it is written: an
answer 007 in a CSV file stays "007", and NA stays "NA".
"""

import os
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlpr_jax.data.tables import Columns, Rows, read_rows
from rlpr_jax.errors import InputError

# Column names of the plain layout; the first that is there is read.
QUESTION = ("question", "prompt", "problem")
ANSWER = ("answer", "reference", "reference_answer", "ground_truth")
SOURCE = ("data_source", "source", "domain", "category")  # of each row, the first that it fills in
RESPONSE = ("response", "completion", "output")  # of demonstrations
SPLIT = "split"

WANTED = frozenset({*QUESTION, *ANSWER, *RESPONSE, *SOURCE, SPLIT, "reward_model"})

ROLES = ("system", "user", "assistant")


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
