"""Questions with reference answers, read from files.

Two layouts are known. verl's: `prompt` is a list of chat messages and `reward_model` holds `ground_truth`, as in
openbmb/RLPR-Train-Dataset. Plain: a column of questions or chats and a column of answers. Text is taken as it is
written: an answer 007 in a CSV file stays "007", and NA stays "NA".
"""

import decimal
import functools
import json
import math
import os
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from rlpr_jax.data import files
from rlpr_jax.data.tables import Columns, Rows, read_rows
from rlpr_jax.errors import InputError
from rlpr_jax.splicing import CLOSE

# Column names of the plain layout; the first that is there is read.
QUESTION = ("question", "prompt", "problem", "messages")
ANSWER = ("answer", "reference", "reference_answer", "ground_truth", "solution")
SOURCE = ("data_source", "source", "domain", "category")  # of each row, the first that it fills in
RESPONSE = ("response", "completion", "output")  # of demonstrations
SPLIT = "split"

WANTED = frozenset({*QUESTION, *ANSWER, *RESPONSE, *SOURCE, SPLIT, "reward_model"})

ROLES = ("system", "user", "assistant")

# White space, control characters and what Unicode calls default ignorable: a text of these alone shows nothing.
_INVISIBLE = re.compile(
  "[\\s\x00-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f"
  "\u3164\ufe00-\ufe0f\ufeff\uffa0\U000e0000-\U000e0fff]*"
)

T = TypeVar("T")
Messages = tuple[dict[str, str], ...]


@dataclass(frozen=True)
class Example:
  """A question and its reference answer."""

  messages: Messages  # chat messages {role, content}, at least one of them the user's
  reference: str  # not empty, without whitespace around it
  source: str  # where the question comes from; the file's stem when the file does not say
  row: int  # 1-based data row of its file; in JSONL the line
  # Not shown, as most examples have none of these.
  other_references: tuple[str, ...] = field(default=(), repr=False)  # as right, each once
  weight: float = field(default=1.0, repr=False)  # how often it is drawn, relative to others
  file: str = field(default="", repr=False, compare=False)  # that it stands in, "" if in none

  @property
  def origin(self) -> str:
    """File and row, for messages; "" where there are none."""
    return f"{self.file}: row {self.row}" if self.file else ""


class DroppedRow(NamedTuple):
  """A row that cannot be used, and why."""

  file: str
  row: int  # as in `Example`
  reason: str  # in a word or two, the same for all such rows
  detail: str  # what was expected and what was found


class Read(NamedTuple, Generic[T]):
  """Rows of some files as examples, in their order, and those that cannot be used."""

  items: list[T]
  dropped: list[DroppedRow]


def load_examples(path: str | os.PathLike[str], split: str | None = None) -> list[Example]:
  """Reads the questions of a `.parquet`, `.jsonl`, `.csv` or `.json` file, in the file's order.

  Args:
    path: the file.
    split: keep only the rows whose column `split` says this; a file without that column is read whole.

  Raises:
    InputError: the file cannot be read, lacks a column, has no rows (of that split), or a row is not as expected.
  """
  return _strict(_read([files.one_file(Path(path), split)], _question_parser))


def load_demonstrations(path: str | os.PathLike[str], split: str | None = None) -> list[tuple[Example, str]]:
  """Reads prompts, each with a response to imitate: a column of questions or of chat messages, and one of responses.

  Args, Raises: as for `load_examples`.

  Returns:
    each row's question, without a reference, and its response as it is written.
  """
  return _strict(_read([files.one_file(Path(path), split)], _demonstration_parser))


def read_examples(
  path: str, split: str | None = None, max_dropped: float = 0.0, max_references: int | None = None
) -> Read[Example]:
  """Reads the questions of files, directories and data sets of the hub, and tells which rows cannot be used.

  Args:
    path: as in `files.find`.
    split: as in `files.find`.
    max_dropped: largest share of rows that may be of no use.
    max_references: a row with more reference answers is of none; None for any number.

  Raises:
    InputError: nothing is there, a file cannot be read or lacks a column, there are no rows (of that split), or more of
      them than `max_dropped` cannot be used.
  """
  parser = functools.partial(_question_parser, max_references=max_references)
  return _check(path, _read(files.find(path, split), parser), max_dropped)


def read_demonstrations(path: str, split: str | None = None, max_dropped: float = 0.0) -> Read[tuple[Example, str]]:
  """Reads prompts, each with a response to imitate; arguments and errors are those of `read_examples`."""
  return _check(path, _read(files.find(path, split), _demonstration_parser), max_dropped)


def count_reasons(dropped: Sequence[DroppedRow]) -> dict[str, int]:
  """How many rows were dropped for which reason, the most frequent first.

  >>> count_reasons([DroppedRow("a.csv", 3, "answer: empty", "")])
  {'answer: empty': 1}
  """
  return dict(Counter(row.reason for row in dropped).most_common())


def _strict(read: Read[T]) -> list[T]:
  """All that was read, if nothing was dropped."""
  for row in read.dropped:
    raise InputError(_describe(row))
  return read.items


def _check(name: str, read: Read[T], max_dropped: float) -> Read[T]:
  """Refuses rows of which too many cannot be used, and tells of the reason to look at first."""
  total = len(read.items) + len(read.dropped)
  if not read.dropped or (read.items and len(read.dropped) <= max_dropped * total):
    return read
  reason, count = next(iter(count_reasons(read.dropped).items()))
  first = next(row for row in read.dropped if row.reason == reason)
  found = f"{len(read.dropped)} of {total} rows cannot be used, expected at most {100 * max_dropped:g}% (max_dropped)"
  if not read.items:
    found = f"none of {total} rows can be used"
  raise InputError(f"{name}: {found}; {count} of them: {reason}, first {_describe(first)}")


def _describe(row: DroppedRow) -> str:
  return f"{row.file}: row {row.row}{', ' if row.detail.startswith('column') else ': '}{row.detail}"


# ---- files ----

Row = dict[str, Any]
Parser = Callable[[files.DataFile, Columns, float], Callable[[int, Row], T]]  # of a file's columns and weight


def _read(parts: Sequence[files.Part], make_parser: Parser[T]) -> Read[T]:
  items: list[T] = []
  dropped: list[DroppedRow] = []
  for part in parts:
    elsewhere: set[str] = set()  # other splits than the part's
    read = 0
    for file in part.files:
      refused: list[DroppedRow] = []

      def refuse(
        number: int, reason: str, detail: str, refused: list[DroppedRow] = refused, name: str = file.name
      ) -> None:
        refused.append(DroppedRow(name, number, reason, detail))

      columns, rows = read_rows(file.path, WANTED, file.name, refuse)
      rows = _of_split(file, part, columns, rows, elsewhere)
      if rows:
        parse = make_parser(file, columns, part.weight)
        for number, row in rows:
          try:
            items.append(parse(number, row))
          except _BadCellError as error:
            refused.append(DroppedRow(file.name, number, error.reason, error.detail))
      read += len(rows) + len(refused)
      dropped += sorted(refused, key=lambda row: row.row)
    if not read and elsewhere:
      found = ", ".join(sorted(elsewhere))
      raise InputError(f"{part.name}: expected rows with {part.split} in column {SPLIT}, found only {found}")
    if not read:
      raise InputError(f"{part.name}: expected at least one row, found none")
  return Read(items, dropped)


def _of_split(file: files.DataFile, part: files.Part, columns: Columns, rows: Rows, elsewhere: set[str]) -> Rows:
  """The rows of the part's split; adds to `elsewhere` of which splits the others are."""
  if part.split is None or not rows:
    return rows
  if SPLIT not in columns:
    if part.needs_column:
      raise InputError(
        f"{file.name}: expected a column {SPLIT} with {part.split} in it, found only {', '.join(columns)}"
      )
    return rows
  elsewhere |= {str(row.get(SPLIT)) for _, row in rows if row.get(SPLIT) != part.split}
  return [(number, row) for number, row in rows if row.get(SPLIT) == part.split]


def _question_parser(
  file: files.DataFile, columns: Columns, weight: float, max_references: int | None = None
) -> Callable[[int, Row], Example]:
  """Makes the function that reads a question of a row of this file."""
  if "reward_model" in columns:
    question, answer = _pick(file.name, columns, ("prompt",)), "reward_model"
  else:
    question, answer = _pick(file.name, columns, QUESTION), _pick(file.name, columns, ANSWER)
  to_messages = _chat if answer == "reward_model" or question == "messages" else _question

  def parse(number: int, row: Row) -> Example:
    messages = to_messages(row.get(question), question)
    if question == "messages":
      messages = _before_response(messages)
    to_references = _verl_references if answer == "reward_model" else _references
    reference, *others = references = to_references(row.get(answer), answer)
    if max_references is not None and len(references) > max_references:
      expected = f"at most {max_references} different references (data.max_references), found {len(references)}"
      raise _BadCellError(answer, "too many references", expected)
    return Example(messages, reference, _source(row, file), number, tuple(others), weight, file.name)

  return parse


def _demonstration_parser(
  file: files.DataFile, columns: Columns, weight: float
) -> Callable[[int, Row], tuple[Example, str]]:
  """Makes the function that reads a prompt and its response of a row of this file."""
  question, response = _pick(file.name, columns, QUESTION), _pick(file.name, columns, RESPONSE)
  to_messages = _chat if question == "messages" else _question

  def parse(number: int, row: Row) -> tuple[Example, str]:
    messages = to_messages(row.get(question), question)
    example = Example(messages, "", file.source, number, weight=weight, file=file.name)
    return example, _text(row.get(response), response)

  return parse


def _pick(name: str, columns: Columns, names: Sequence[str]) -> str:
  """The first of `names` among the columns."""
  for one in names:
    if one in columns:
      return one
  raise InputError(f"{name}: expected a column {' or '.join(names)}, found only {', '.join(columns)}")


def _source(row: Row, file: files.DataFile) -> str:
  name = next((name for name in SOURCE if row.get(name)), None)
  return _whole(str(row[name]), name) if name else file.source


# ---- one cell ----


class _BadCellError(Exception):
  """A cell that makes its row useless."""

  def __init__(self, column: str, reason: str, expected: str):
    super().__init__(reason)
    self.reason = f"{column.partition(',')[0]}: {reason}"
    self.detail = f"column {column}: expected {expected}"


def _text(value: Any, column: str) -> str:
  if not isinstance(value, str) or _INVISIBLE.fullmatch(value):
    reason = "empty" if value is None or isinstance(value, str) else "not text"
    raise _BadCellError(column, reason, f"non-empty text, found {reprlib.repr(value)}")
  return _whole(value, column)


def _whole(text: str, column: str) -> str:
  """A text that can be encoded: JSON can spell half a surrogate pair, which neither a tokenizer nor a file takes."""
  try:
    text.encode()
  except UnicodeEncodeError as error:
    found = f"text, found a lone surrogate at character {error.start + 1}"
    raise _BadCellError(column, "half a surrogate pair", found) from None
  return text


def _question(value: Any, column: str) -> Messages:
  """Plain text, or a chat as a list or as its JSON."""
  if isinstance(value, str) and not _is_chat(_from_json(value)):
    return ({"role": "user", "content": _text(value, column)},)
  if isinstance(value, str | list):
    return _chat(value, column)
  return ({"role": "user", "content": _text(value, column)},)


def _is_chat(value: Any) -> bool:
  return isinstance(value, list) and bool(value) and all(isinstance(one, dict) and "role" in one for one in value)


def _from_json(value: Any) -> Any:
  """Reads a text of a JSON object or list; any other value stays as it is."""
  if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
    try:
      return json.loads(value)
    except (ValueError, RecursionError):
      return value
  return value


def _chat(value: Any, column: str) -> Messages:
  value = _from_json(value)
  expected = "a list of messages {role, content}, one or more of them the user's; found"
  if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
    raise _BadCellError(column, "not a chat", f"{expected} {reprlib.repr(value)}")
  roles = [message.get("role") for message in value]
  if "user" not in roles or not all(role in ROLES for role in roles):
    raise _BadCellError(column, "other roles", f"{expected} roles {reprlib.repr(roles)}")
  return tuple(
    {"role": message["role"], "content": _text(message.get("content"), f"{column}, message {number}")}
    for number, message in enumerate(value, 1)
  )


def _before_response(messages: Messages) -> Messages:
  """A chat up to its last question: what `messages` holds behind it is a response, which would give the answer away.

  >>> _before_response(({"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}))
  ({'role': 'user', 'content': '1 + 1?'},)
  """
  last = max(i for i, message in enumerate(messages) if message["role"] == "user")
  return messages[: last + 1]


def _references(value: Any, column: str) -> list[str]:
  """One answer or several, without whitespace around them, each once."""
  if isinstance(value, list) and value:
    texts = [_reference(one, f"{column}, reference {number}") for number, one in enumerate(value, 1)]
    return list(dict.fromkeys(texts))
  return [_reference(value, column)]


def _reference(value: Any, column: str) -> str:
  if isinstance(value, bool | int | decimal.Decimal) or (isinstance(value, float) and math.isfinite(value)):
    value = str(value)
  text = _text(value, column).strip()
  if CLOSE in text:
    raise _BadCellError(column, f"holds {CLOSE}", f"an answer without {CLOSE}, found {reprlib.repr(text)}")
  return text


def _verl_references(value: Any, column: str) -> list[str]:
  value = _from_json(value)
  if not isinstance(value, dict):
    raise _BadCellError(column, "no ground_truth", f"{{style, ground_truth}}, found {reprlib.repr(value)}")
  return _references(value.get("ground_truth"), f"{column}.ground_truth")
