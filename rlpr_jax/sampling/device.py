"""The host's calls of the jitted programs: lists in, padded to the fixed shapes, so that nothing compiles twice."""

import collections
import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from rlpr_jax import machine
from rlpr_jax.errors import SettingError
from rlpr_jax.models import KVCache, ModelGraph, Params
from rlpr_jax.sampling import adjustments, decode
from rlpr_jax.sampling.adjustments import Adjustments, TokenScores
from rlpr_jax.sampling.decode import DecodeSettings, Entries, NewTokens, Prefilled, Slots, Suffixes
from rlpr_jax.sampling.params import SamplingParams, stack
from rlpr_jax.sampling.shapes import Shapes, bucket, pad_prompts
from rlpr_jax.types import Prompt

_TOP_SIZES = 1, 5, adjustments.MOST_TOP  # how many most probable tokens programs tell; each is compiled


class Entry(NamedTuple):
  """A response that goes into a slot."""

  row: int  # of its prompt, among those that were read with it
  slot: int
  draw: int  # its prompt's number
  sample: int  # its own, among the prompt's
  limit: int  # most tokens
  sampling: SamplingParams
  adjustments: Adjustments | None = None
  prompt: np.ndarray | None = None  # its tokens, where there are adjustments


class Suffix(NamedTuple):
  """Tokens to be scored after the text of a row, or after a part of it."""

  row: int  # of the cache
  prefix: int  # tokens of text before it
  last_kept: int  # the last of them
  ids: list[int]
  mask: list[bool]  # True on the tokens that are scored

  @classmethod
  def after(cls, row: int, text: Sequence[int] | np.ndarray, ids: list[int], mask: list[bool]) -> "Suffix":
    """The suffix of a text, up to its last token that is scored.

    >>> Suffix.after(0, [5, 6], ids=[7, 8, 9], mask=[False, True, False])
    Suffix(row=0, prefix=2, last_kept=6, ids=[7, 8], mask=[False, True])
    """
    needed = max(place for place, scored in enumerate(mask) if scored) + 1
    return cls(row=row, prefix=len(text), last_kept=int(text[-1]), ids=ids[:needed], mask=mask[:needed])


def pack_suffixes(
  parts: Sequence[Sequence[Suffix]], size: int, rows_each: int, width: int
) -> tuple[Suffixes, list[int]]:
  """Puts suffixes into arrays of `size` rows for each part of a cache, which has `rows_each`; the rest is padding.

  >>> suffix = Suffix(row=3, prefix=9, last_kept=5, ids=[7, 8, 2], mask=[False, True, True])
  >>> suffixes, rows = pack_suffixes([[suffix]], size=2, rows_each=4, width=4)
  >>> suffixes.tokens.tolist(), suffixes.places[0].tolist(), suffixes.targets[0].tolist(), rows
  ([[5, 7, 8, 0], [0, 0, 0, 0]], [1, 2, 0, 0], [8, 2, 0, 0], [0])

  Returns the arrays, and the row of each suffix in them.
  """
  rows = np.repeat(np.arange(len(parts)) * rows_each, size).astype(np.int32)
  tokens, positions, segment_ids, places, targets = np.zeros((5, rows.size, width), np.int32)
  placed = []
  for shard, suffixes in enumerate(parts):
    for i, suffix in enumerate(suffixes, shard * size):
      length, scored = len(suffix.ids), np.flatnonzero(suffix.mask)
      rows[i] = suffix.row
      tokens[i, :length] = [suffix.last_kept, *suffix.ids[:-1]]
      positions[i] = suffix.prefix - 1 + np.arange(width)
      segment_ids[i, :length] = 1
      places[i, : scored.size] = scored
      targets[i, : scored.size] = np.array(suffix.ids)[scored]
      placed.append(i)
  packed = Suffixes(
    rows=rows, tokens=tokens, positions=positions, segment_ids=segment_ids, places=places, targets=targets
  )
  return packed, placed


@dataclasses.dataclass(frozen=True)
class Device:
  """A model on its devices, and the programs that sample and score with it."""

  model: ModelGraph
  settings: DecodeSettings
  shapes: Shapes
  score_temperature: float = 1.0

  def empty_slots(self, params: Params) -> Slots:
    shapes = self.shapes
    return decode.empty_slots(self.model, params, shapes.slots, shapes.capacity)

  def prefill(self, params: Params, prompts: Sequence[Prompt], width: int) -> Prefilled:
    """Reads at most P prompts of at most `width` tokens."""
    tokens, lengths = self._pad(prompts, width)
    hidden, cache = decode.prefill(self.model, params, tokens, lengths)
    return Prefilled(hidden, cache, lengths)

  def prefill_and_score(
    self, params: Params, prompts: Sequence[Prompt], width: int, top: int
  ) -> tuple[Prefilled, list[TokenScores]]:
    """Reads prompts as `prefill` does, and scores their tokens after the first.

    Args:
      top: most probable tokens that are told of each place.

    Returns:
      the prompts as they were read, and each one's scores of N - 1 tokens, numpy.
    """
    tokens, lengths = self._pad(prompts, width)
    size = bucket(_TOP_SIZES, top)
    hidden, cache, scores = decode.prefill_and_score(self.model, params, tokens, lengths, size)
    scores = jax.device_get(scores)
    of_each = [
      jax.tree.map(lambda x, row=row, prompt=prompt: x[row, : len(prompt.ids) - 1], scores)
      for row, prompt in enumerate(prompts)
    ]
    return Prefilled(hidden, cache, lengths), of_each

  def _pad(self, prompts: Sequence[Prompt], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of P prompts and their lengths; those that are missing are a token each."""
    padding = [Prompt(ids=np.zeros(1, np.int32))] * (self.shapes.prefill_rows - len(prompts))
    return pad_prompts([*prompts, *padding], width)

  def insert(self, params: Params, slots: Slots, prompts: Prefilled, key: jax.Array, entries: Sequence[Entry]) -> Slots:
    """Puts prompts that were read into slots, `insert_rows` at most."""
    nowhere = Entry(row=0, slot=self.shapes.slots, draw=0, sample=0, limit=0, sampling=SamplingParams())
    entries = [*entries, *[nowhere] * (self.shapes.insert_rows - len(entries))]

    def column(name: str, dtype: type = np.int32) -> np.ndarray:
      return np.array([getattr(entry, name) for entry in entries], dtype)

    new = Entries(
      source=column("row"),
      target=column("slot"),
      keys=decode.row_keys(key, column("draw", np.uint32), column("sample", np.uint32)),
      limits=column("limit"),
      sampling=stack([entry.sampling for entry in entries]),
    )
    if slots.adjustments is not None:
      rows = [
        (entry.adjustments or Adjustments(), np.zeros(0, np.int32) if entry.prompt is None else entry.prompt)
        for entry in entries
      ]
      vocabulary = slots.adjustments.bias.shape[1]
      new = new._replace(adjustments=adjustments.fill_rows(rows, self.settings.eos_ids, vocabulary))
    return decode.insert(self.model, params, slots, prompts, new)

  def move(self, params: Params, slots: Slots, pairs: Sequence[tuple[int, int]], rows: int) -> Slots:
    """Copies slots: `pairs` of a slot and a place among the first of its part, `rows` in all."""
    num_shards = self.shapes.num_shards
    each, filled = self.shapes.slots // num_shards, [0] * num_shards
    source, target = np.zeros((2, num_shards, rows // num_shards), np.int32)  # slot 0 to slot 0: nothing
    for old, new in pairs:
      shard = old // each
      source[shard, filled[shard]], target[shard, filled[shard]] = old % each, new % each
      filled[shard] += 1
    return decode.move(self.model, params, slots, source.reshape(-1), target.reshape(-1))

  def with_adjustments(self, params: Params, slots: Slots) -> Slots:
    """Gives slots room for adjustments."""
    return decode.with_adjustments(self.model, params, slots, self.settings)

  def restrict(self, params: Params, slots: Slots, allowed: dict[int, np.ndarray]) -> Slots:
    """Lets only some tokens come next in some slots, and any in the others."""
    assert slots.adjustments is not None
    bits = adjustments.everything(*slots.adjustments.bias.shape)
    for slot, row in allowed.items():
      bits[slot] = row
    return decode.restrict(self.model, params, slots, bits)

  def decode(
    self, params: Params, slots: Slots, rows: int, kv_length: int, one: bool = False
  ) -> tuple[Slots, NewTokens]:
    """Draws a few more tokens in the first `rows` slots, of each part of the mesh as many; `one`: a single one."""
    settings = dataclasses.replace(self.settings, steps=1) if one else self.settings
    return decode.decode(self.model, params, slots, settings, rows, kv_length)

  def score(
    self, params: Params, cache: KVCache, suffixes: Sequence[Suffix], most: int, kv_length: int
  ) -> list[np.ndarray]:
    """Scores suffixes after rows of a cache, `most` at a time; returns each one's log-probabilities, float32[A].

    Rows of a call are of one suffix bucket, and lie as the mesh splits those of the cache.
    """
    num_shards, sizes = self.shapes.num_shards, self.shapes.score_sizes(most)
    logps, by_width = {}, collections.defaultdict(list)
    for number, suffix in enumerate(suffixes):
      by_width[bucket(self.shapes.suffix_buckets, len(suffix.ids))].append(number)
    for width, numbers in sorted(by_width.items()):
      waiting: list[list[int]] = [[] for _ in range(num_shards)]
      for number in numbers:
        waiting[suffixes[number].row * num_shards // cache.rows].append(number)
      while any(waiting):
        needed = max(map(len, waiting)) * num_shards
        size = max((size for size in sizes if size <= needed), default=sizes[0]) // num_shards
        parts, waiting = [part[:size] for part in waiting], [part[size:] for part in waiting]
        of_parts = [[suffixes[number] for number in part] for part in parts]
        packed, rows = pack_suffixes(of_parts, size, cache.rows // num_shards, width)
        scores = np.asarray(self._score(params, cache, packed, kv_length))
        for number, row in zip(itertools.chain(*parts), rows, strict=True):
          logps[number] = scores[row, : sum(suffixes[number].mask)]
    return [logps[number] for number in range(len(suffixes))]

  def _score(self, params: Params, cache: KVCache, suffixes: Suffixes, kv_length: int) -> jax.Array:
    return decode.score(self.model, params, cache, suffixes, self.score_temperature, kv_length)

  def compile_programs(self, params: Params, scoring: bool) -> None:
    """Compiles every program that any lengths may ask for, by running each once on next to nothing.

    Raises:
      SettingError: the device's memory is not enough, and which size to lower.
    """
    shapes = self.shapes
    with self._memory(params, "slots"):
      slots = jax.block_until_ready(self.empty_slots(params))
    with self._memory(params, "prefill_rows"):
      for width in shapes.prompt_buckets:
        slots = self.insert(params, slots, self.prefill(params, [], width), jax.random.key(0), [])
      jax.block_until_ready(slots)
    with self._memory(params, "slots"):
      slots = decode.halt(slots, np.zeros(shapes.slots, bool))
      for rows, kv_length in itertools.product(shapes.decode_rows, shapes.kv_lengths):
        slots, _ = jax.block_until_ready(self.decode(params, slots, rows, kv_length))
      for rows in shapes.decode_rows[:-1]:
        slots = self.move(params, slots, [], rows)
    with self._memory(params, "score_rows"):
      for width in shapes.suffix_buckets if scoring else ():
        self._compile_score(params, slots.cache, width, shapes.score_rows, shapes.longest)
        for length in shapes.prompt_buckets:
          self._compile_score(params, self.prefill(params, [], length).cache, width, shapes.prefill_rows, length)

  def _compile_score(self, params: Params, cache: KVCache, width: int, most: int, kv_length: int) -> None:
    num_shards = self.shapes.num_shards
    for size in self.shapes.score_sizes(most):
      padding, _ = pack_suffixes([[]] * num_shards, size // num_shards, cache.rows // num_shards, width)
      jax.block_until_ready(self._score(params, cache, padding, kv_length))

  @contextlib.contextmanager
  def _memory(self, params: Params, size: str) -> Iterator[None]:
    """Says of a program that does not fit into the device's memory which of the shapes to lower, and what would fit."""
    free = machine.free_memory()
    try:
      yield
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      num_shards, shapes = self.shapes.num_shards, self.shapes
      smaller = dataclasses.replace(self, shapes=dataclasses.replace(shapes, slots=num_shards))
      cache = jax.eval_shape(smaller.empty_slots, params).cache
      slot = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)) // num_shards
      fits = f", room for at most {free // slot} slots" if jax.device_count() == 1 else ""
      why = (
        f"is too much for the device's memory, of which {free / 2**30:.1f} GiB were free{fits};"
        f" each of {{slots}} takes {slot / 2**20:.1f} MiB"
      )
      # Who cannot change how many prompts are read at once can shorten them, or have fewer slots.
      messages = (f"{{{name}}}: {getattr(shapes, name)} {why}" for name in (size, "prompt_limit", "slots"))
      raise SettingError(*messages) from None
