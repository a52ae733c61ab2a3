"""Which rollouts an address asks for, and in what order: `step=3..9&source=law&kept=1&sort=-reward_total&q=water`."""

import collections
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rlpr_jax.errors import InputError
from rlpr_jax.report.gallery import text
from rlpr_jax.report.records import Json, parse
from rlpr_jax.viewer.index import AT_ONCE, Index, RolloutFile, Table

NEWEST_FIRST = "-step"
SEARCHES = 8  # texts whose findings are remembered
NOT_COLUMNS = ("source", "q", "sort", "id", "offset", "limit", "color")  # parameters that are no numbers of rollouts


class Query(NamedTuple):
  """What is asked of the rollouts."""

  ranges: dict[str, tuple[float, float]]  # column -> least and most, both included
  sources: list[str]  # any of them; all if none
  words: str  # that the question, a reference or the response has, in capitals or not
  sort: str  # a column
  descending: bool


def read_query(parameters: Mapping[str, Sequence[str]]) -> Query:
  """Reads the parameters of an address.

  Raises:
    InputError: one that cannot be read.

  >>> read_query({"step": ["3"], "reward_total": ["0.5.."], "sort": ["-length"]}).ranges
  {'step': (3.0, 3.0), 'reward_total': (0.5, inf)}
  """
  ranges = {name: read_range(name, values[-1]) for name, values in parameters.items() if name not in NOT_COLUMNS}
  sort = parameters.get("sort", [NEWEST_FIRST])[-1]
  return Query(
    ranges=ranges,
    sources=list(parameters.get("source", [])),
    words=parameters.get("q", [""])[-1],
    sort=sort.removeprefix("-"),
    descending=sort.startswith("-"),
  )


def read_range(name: str, value: str) -> tuple[float, float]:
  """Least and most: of `3` both, of `3..`, `..9` and `3..9` what is given.

  >>> read_range("step", "..9")
  (-inf, 9.0)
  """
  low, dots, high = value.partition("..")
  try:
    least = float(low) if low else -np.inf
    most = float(high) if high else np.inf if dots or not low else least
  except ValueError:
    raise InputError(f"{name}={value}: expected a number, or a range as 3..9, 3.. or ..9") from None
  return least, most


def select(table: Table, query: Query) -> np.ndarray:
  """Places of the rollouts that are asked for, in the table's order; their texts are not looked at.

  Raises:
    InputError: a number that no rollout has.
  """
  chosen = np.ones(len(table), bool)
  for name, (least, most) in query.ranges.items():
    values = column(table, name)
    with np.errstate(invalid="ignore"):
      chosen &= (values >= least) & (values <= most)
  if query.sources:
    wanted = [place for place, source in enumerate(table.sources) if source in query.sources]
    chosen &= np.isin(table.source, wanted)
  return np.flatnonzero(chosen)


def column(table: Table, name: str) -> np.ndarray:
  """The numbers of that name; of no rollouts any name has none.

  Raises:
    InputError: no rollout has any.
  """
  if not len(table):
    return np.zeros(0)
  if name not in table.columns:
    raise InputError(f"{name}: no rollout has such a number, expected one of {', '.join(sorted(table.columns))}")
  return table.columns[name]


def order(table: Table, places: np.ndarray, query: Query) -> np.ndarray:
  """The places by the column that is asked for, those without a number last; what is equal stays in the table's order.

  Raises:
    InputError: no rollout has such a number.
  """
  values = column(table, query.sort)[places]
  keys = np.where(np.isfinite(values), -values if query.descending else values, np.inf)
  return places[np.argsort(keys, kind="stable")]


class Searches:
  """Finds rollouts by words, file by file, and remembers what was found: the next page of a search reads nothing."""

  def __init__(self, index: Index):
    self._index = index
    self._found: collections.OrderedDict[str, dict[str, tuple[int, list[bool]]]] = collections.OrderedDict()

  def search(self, places: np.ndarray, words: str, most: int = AT_ONCE) -> tuple[np.ndarray, int]:
    """Searches the texts of some rollouts, newest files first, and at most about `most` bytes that are new.

    Returns:
      those of the places where the words were found, and how many of the places were not searched yet.
    """
    table = self._index.table()
    known = self._found.setdefault(words, {})
    self._found.move_to_end(words)
    while len(self._found) > SEARCHES:
      self._found.popitem(last=False)
    hits, waiting = np.zeros(len(table), bool), 0
    bounds = [*np.flatnonzero(np.diff(table.file[places], prepend=-1)), len(places)]
    for begin, end in reversed(list(itertools.pairwise(bounds))):
      of_file = places[begin:end]
      name = table.names[table.file[of_file[0]]]
      file = self._index.files[name]
      generation, found = known.get(name, (file.generation, []))
      if generation != file.generation:
        found = []
      most -= self._go_on(file, found, words, most)
      known[name] = (file.generation, found)
      rows = table.number[of_file] - 1
      searched = rows < len(found)
      hits[of_file[searched]] = np.array(found, bool)[rows[searched]]
      waiting += int((~searched).sum())
    return places[hits[places]], waiting

  def _go_on(self, file: RolloutFile, found: list[bool], words: str, most: int) -> int:
    """Searches the rollouts of a file behind those that were; how many bytes that took."""
    used = 0
    test = Test(words)
    while len(found) < len(file) and used < most:
      block = range(len(found), min(len(found) + 256, len(file)))
      for line in self._index.read_lines(file, block):
        used += len(line)
        found.append(test(line))
    return used


class Test:
  """Whether a rollout has some words. Most lines that have not are known by their bytes, without being parsed.

  >>> test = Test("Water")
  >>> test(b'{"question": "Why does ice float on water?"}'), test(b'{"response": "ice"}'), test(b'{"water": 1}')
  (True, False, False)
  """

  def __init__(self, words: str):
    self._words = words.lower()
    # JSON may write what is no letter or figure in other ways; of letters beyond ASCII it does.
    plain = max(re.findall(r"[a-z0-9 ]+", self._words), key=len, default="")
    self._plain = plain.encode()

  def __call__(self, line: bytes) -> bool:
    if line.isascii() and b"\\u" not in line and self._plain not in line.lower():
      return False
    row = parse(line)
    return row is not None and any(self._words in words.lower() for words in texts(row))


def texts(row: Json) -> Iterator[str]:
  """What of a rollout is searched.

  >>> list(texts({"question": "6 * 7?", "reference": "42", "references": ["42", "forty-two"], "response": "42"}))
  ['6 * 7?', '42', '42', 'forty-two', '42']
  """
  yield text(row, "question")
  yield text(row, "reference")
  yield from map(str, row.get("references") or [])
  yield text(row, "response")


def page_of(places: np.ndarray, place: int | None, limit: int) -> int:
  """Where the page begins that shows a place: a multiple of the limit; 0 where it is not among them.

  >>> page_of(np.array([9, 8, 7, 6, 5]), 6, limit=2)
  2
  """
  at = np.flatnonzero(places == place) if place is not None else np.zeros(0, int)
  return int(at[0]) // limit * limit if len(at) else 0


def dump(content: object) -> bytes:
  """JSON as browsers read it: numbers that are not finite are null.

  >>> dump({"a": float("nan"), "b": [1.5]})
  b'{"a": null, "b": [1.5]}'
  """
  return json.dumps(_finite(content), ensure_ascii=True).encode()


def _finite(content: object) -> object:
  if isinstance(content, dict):
    return {name: _finite(value) for name, value in content.items()}
  if isinstance(content, list | tuple):
    return [_finite(value) for value in content]
  return None if isinstance(content, float) and not np.isfinite(content) else content
