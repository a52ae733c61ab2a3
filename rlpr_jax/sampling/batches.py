"""Requests as arrays of fixed shapes, as the compiled programs take them."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from rlpr_jax.models import KVCache
from rlpr_jax.sampling.decode import Suffixes
from rlpr_jax.sampling.params import SamplingParams
from rlpr_jax.types import Prompt


class Prefilled(NamedTuple):
  """Prompts on the device, read once for all their samples."""

  hidden: jax.Array  # [P, D]
  cache: KVCache  # of P rows
  lengths: np.ndarray  # int32[P]


class Entry(NamedTuple):
  """A response that goes into a slot."""

  row: int  # of its prompt, in a prefilled batch
  slot: int
  draw: int  # its prompt's number
  sample: int  # its own, among the prompt's
  limit: int  # most tokens
  choice: SamplingParams


class References(NamedTuple):
  """The reference answers of a batch of rows, as they were scored. numpy."""

  tokens: np.ndarray  # int32[B, E] the suffix
  logps: np.ndarray  # float32[B, E] its log-probabilities; 0 where they were not needed
  mask: np.ndarray  # bool[B, E] True on the reference answer's own tokens
  overlong: np.ndarray  # bool[B] a suffix could have been spliced in, but did not fit
  starts: np.ndarray  # int32[B] tokens of the response that stand before the suffix


def empty_references(rows: int, suffix_length: int) -> References:
  shape = (rows, suffix_length)
  return References(
    tokens=np.zeros(shape, np.int32),
    logps=np.zeros(shape, np.float32),
    mask=np.zeros(shape, bool),
    overlong=np.zeros(rows, bool),
    starts=np.zeros(rows, np.int32),
  )


class Scored(NamedTuple):
  """A suffix that is to be scored."""

  row: int  # of the cache
  out: int  # row of the result
  prefix: int  # tokens of text before it
  last_kept: int  # the last of them
  ids: list[int]
  mask: list[bool]


def lay_out(
  batch: Sequence[Sequence[Scored]], size: int, rows_each: int, width: int
) -> tuple[np.ndarray, Suffixes, list[tuple[Scored, int]]]:
  """Suffixes of at most `size` rows in each part of a cache, as arrays of len(batch) * size rows; the rest is padding.

  Returns:
    rows of the cache; the suffixes; and each item with its row in them.
  """
  rows = np.repeat(np.arange(len(batch)) * rows_each, size).astype(np.int32)
  suffixes = Suffixes(*(np.zeros((rows.size, width), np.int32) for _ in Suffixes._fields))
  placed = []
  for shard, items in enumerate(batch):
    for i, item in enumerate(items, shard * size):
      length, scored = len(item.ids), np.flatnonzero(item.mask)
      rows[i] = item.row
      suffixes.tokens[i, :length] = [item.last_kept, *item.ids[:-1]]
      suffixes.positions[i] = item.prefix - 1 + np.arange(width)
      suffixes.segment_ids[i, :length] = 1
      suffixes.index[i, : scored.size] = scored
      suffixes.targets[i, : scored.size] = np.array(item.ids)[scored]
      placed.append((item, i))
  return rows, suffixes, placed


def pad_prompts(prompts: Sequence[Prompt], width: int, rows: int | None = None) -> tuple[np.ndarray, np.ndarray]:
  """Prompts as int32[rows, width], padded on the right and by rows of length 1, and their lengths int32[rows]."""
  rows = len(prompts) if rows is None else rows
  tokens, lengths = np.zeros((rows, width), np.int32), np.ones(rows, np.int32)
  for row, prompt in enumerate(prompts):
    tokens[row, : len(prompt.ids)] = prompt.ids
    lengths[row] = len(prompt.ids)
  return tokens, lengths


@jax.jit
def row_keys(key: jax.Array, draws: jax.Array, samples: jax.Array) -> jax.Array:
  """One key a row, uint32[B, 2]: the run's key, folded with the draw's number, folded with the sample's."""
  rows = jax.vmap(lambda draw, sample: jax.random.fold_in(jax.random.fold_in(key, draw), sample))(draws, samples)
  return jax.random.key_data(rows)
