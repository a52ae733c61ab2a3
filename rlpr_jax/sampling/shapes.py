"""The sizes of the programs that sample and score, all fixed, so that nothing compiles twice."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from rlpr_jax.types import Prompt

_LANES = 128  # numbers that lie side by side in a TPU's registers


@dataclasses.dataclass(frozen=True)
class Shapes:
  """The sizes of the compiled programs, in rows and tokens."""

  slots: int  # S, rows that are sampled at once
  prompt_limit: int  # longest prompt
  max_response_length: int  # T, EOS included
  suffix_length: int  # E, longest spliced reference
  steps: int  # tokens that a call decodes, at most; ended rows wait so long for their successor
  prefill_rows: int  # P, prompts read at once
  score_rows: int  # R, rows scored at once
  insert_rows: int  # rows that go into slots at once
  num_shards: int = 1  # parts into which the mesh splits rows; divides S, P and R
  ragged: bool = False  # whether a kernel reads of each slot what its text is long
  continues: bool = False  # whether responses may have begun before: they are read with their prompts

  @property
  def capacity(self) -> int:
    """C, room in a slot: a text, and the last call's garbage behind it.

    In whole lanes of a TPU, beyond the first: it lays other lengths out in another order, and decoding would copy all
    keys to turn them round.
    """
    room = self.prompt_limit + self.max_response_length + self.steps
    return room if room < _LANES else -(-room // _LANES) * _LANES

  def takes(self, prompt: Prompt) -> bool:
    """Whether the prompt can be read."""
    return 0 < len(prompt.ids) <= self.prompt_limit

  @property
  def prompt_buckets(self) -> tuple[int, ...]:
    """Lengths of prompts that are read together, with what has been written behind them."""
    longest = self.longest if self.continues else self.prompt_limit
    return buckets(longest, smallest=max(32, self.prompt_limit // 8), ratio=2)

  @property
  def suffix_buckets(self) -> tuple[int, ...]:
    return buckets(self.suffix_length, smallest=4, ratio=4)

  @property
  def decode_rows(self) -> tuple[int, ...]:
    """How many slots are decoded: all, or a quarter, or a quarter of that, once fewer rows are left. Ascending."""
    counts = [self.slots]
    while counts[-1] >= 16 * self.num_shards:
      counts.append(-(-counts[-1] // (4 * self.num_shards)) * self.num_shards)
    return tuple(reversed(counts))

  def score_sizes(self, rows: int) -> tuple[int, ...]:
    """How many of at most `rows` suffixes a call scores: all, or a quarter. Ascending."""
    return tuple(sorted({max(rows // 4 // self.num_shards, 1) * self.num_shards, rows}))

  @property
  def longest(self) -> int:
    """Tokens of a text, at most."""
    return self.prompt_limit + self.max_response_length

  @property
  def kv_lengths(self) -> tuple[int, ...]:
    """How much of a slot is read: quarters, for attention to skip what no row has filled. A kernel needs none."""
    longest = self.longest
    if longest < 256 or self.ragged:
      return (longest,)
    return tuple(sorted({min(-(-longest * i // 4 // 64) * 64, longest) for i in range(1, 5)}))


def buckets(limit: int, smallest: int, ratio: int) -> tuple[int, ...]:
  """Lengths up to `limit`, each `ratio` times the one before and not under `smallest`; a few, for each is compiled.

  >>> buckets(100, smallest=16, ratio=2)
  (25, 50, 100)
  """
  lengths = [limit]
  while lengths[-1] // ratio >= smallest:
    lengths.append(-(-lengths[-1] // ratio))
  return tuple(reversed(lengths))


def bucket(lengths: Sequence[int], needed: int) -> int:
  """The smallest of the lengths that is enough.

  >>> bucket((25, 50, 100), 26)
  50
  """
  return next(length for length in lengths if length >= needed)


def pad_rows(rows: Sequence[Sequence[Any] | np.ndarray], width: int, dtype: type = np.int32) -> np.ndarray:
  """Rows of several lengths as one array [rows, width], with zeros behind each.

  >>> pad_rows([[1, 2], [], [3]], width=3).tolist()
  [[1, 2, 0], [0, 0, 0], [3, 0, 0]]
  """
  padded: np.ndarray = np.zeros((len(rows), width), dtype)
  for row, values in zip(padded, rows, strict=True):
    row[: len(values)] = values
  return padded


def pad_prompts(prompts: Sequence[Prompt], width: int) -> tuple[Int[np.ndarray, "P N"], Int[np.ndarray, "P"]]:
  """Token ids of prompts, padded on the right, and their lengths.

  >>> tokens, lengths = pad_prompts([Prompt(ids=np.array([5, 6])), Prompt(ids=np.array([7]))], width=3)
  >>> tokens.tolist(), lengths.tolist()
  ([[5, 6, 0], [7, 0, 0]], [2, 1])
  """
  ids = [prompt.ids for prompt in prompts]
  return pad_rows(ids, width), np.array([len(row) for row in ids], np.int32)
