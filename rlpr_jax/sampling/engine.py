"""Rollouts: prompts in, sampled responses and the probability of each reference answer out.

What the host asks of the device, beside `decode.py`, which says what that computes. `session.py` decides which prompt
goes into which slot, and when.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from transformers import PreTrainedTokenizerBase

from rlpr_jax import splicing
from rlpr_jax.errors import InputError
from rlpr_jax.models import KVCache, Params
from rlpr_jax.sampling import decode
from rlpr_jax.sampling.batches import (
  Entry,
  Prefilled,
  References,
  Scored,
  empty_references,
  lay_out,
  pad_prompts,
  row_keys,
)
from rlpr_jax.sampling.decode import DecodeSettings, Slots
from rlpr_jax.sampling.params import SamplingParams, stack
from rlpr_jax.sampling.scheduler import Scheduler
from rlpr_jax.sampling.shapes import Shapes, bucket
from rlpr_jax.types import Prompt, Rollouts, Samples


class StoppedError(Exception):
  """The caller asked to stop; what was sampled so far is lost."""


class SizeNames(NamedTuple):
  """What the user of a program calls the sizes of an engine, in errors; "" for what is not theirs to change."""

  slots: str = "config.rollout.slots"
  prefill_rows: str = "config.rollout.prefill_prompts"
  score_rows: str = "config.rollout.score_rows"
  prompt_limit: str = "config.data.prompt_limit"
  max_response_length: str = "config.rollout.max_response_length"


OF_TRAINING = SizeNames()


@dataclasses.dataclass(frozen=True)
class Engine:
  """Samples and scores in slots of fixed shapes, so that nothing compiles twice, whatever lengths come."""

  model: nnx.GraphDef
  tokenizer: PreTrainedTokenizerBase
  settings: DecodeSettings
  shapes: Shapes
  template: str  # think | answer_only
  score_temperature: float
  baseline_prefix: str  # bare | tagged
  choice: SamplingParams = SamplingParams()  # how tokens are drawn
  names: SizeNames = OF_TRAINING

  def sample(
    self,
    params: Params,
    draws: Sequence[tuple[int, Prompt]],
    key: jax.Array,
    samples: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    limits: Sequence[int] | None = None,
    stop: Sequence[str] = (),
    interrupted: Callable[[], bool] = lambda: False,
  ) -> Samples:
    """`samples` responses to each prompt; a draw's number and `key` decide its responses, not slots or neighbours.

    Args:
      progress: called with how many responses have ended, of how many.
      limits: most tokens of each response, a prompt's samples together; at most, and None for, `max_response_length`.
      stop: strings that end a response. Its tokens then end with the one that completes the string, wherever in a token
        that is, and its text before the string.
      interrupted: looked at every few tokens; once it is true, `StoppedError` is raised.
    """
    return self.finish(params, draws, key, samples, None, progress, limits, stop, interrupted)[0]

  def rollout(
    self,
    params: Params,
    draws: Sequence[tuple[int, Prompt]],
    key: jax.Array,
    samples: int,
    interrupted: Callable[[], bool] = lambda: False,
    limits: Sequence[int] | None = None,
  ) -> Rollouts:
    """Samples responses and scores the reference answer in the place of each response's own (RLPR, section 3.2)."""
    references = empty_references(len(draws) * samples, self.shapes.suffix_length)
    sampled, seconds = self.finish(params, draws, key, samples, references, limits=limits, interrupted=interrupted)
    return Rollouts(
      *sampled,
      scorable=references.mask.any(axis=1),
      overlong=references.overlong,
      reference_starts=references.starts,
      reference_tokens=references.tokens,
      reference_logps=references.logps,
      reference_mask=references.mask,
      seconds=seconds,
    )

  def finish(
    self,
    params: Params,
    draws: Sequence[tuple[int, Prompt]],
    key: jax.Array,
    samples: int,
    references: References | None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    limits: Sequence[int] | None = None,
    stop: Sequence[str] = (),
    interrupted: Callable[[], bool] = lambda: False,
  ) -> tuple[Samples, dict[str, float]]:
    """Runs a session until all of a batch has ended; request b is sample b % G of prompt b // G."""
    session, total = Scheduler(self, params, key, references), len(draws) * samples
    limits = np.full(total, self.shapes.max_response_length) if limits is None else limits
    out = Samples(
      np.zeros((total, self.shapes.max_response_length), np.int32),
      np.zeros(total, np.int32),
      np.zeros((total, self.shapes.max_response_length), np.float32),
      np.zeros(total, bool),
      [""] * total,
      np.ones(total, bool),
    )
    for first, (draw, prompt) in zip(range(0, total, samples), draws, strict=True):
      if self.shapes.takes(prompt):
        session.add(prompt, draw, limits[first : first + samples], self.choice, stop, first)
        out.refused[first : first + samples] = False
    done = int(out.refused.sum())
    while session.busy:
      if interrupted():
        raise StoppedError
      for request in session.round():
        row, length = request.row, request.tokens.size
        out.tokens[row, :length], out.logprobs[row, :length] = request.tokens, request.logprobs
        out.lengths[row], out.finished[row], out.texts[row] = length, request.finished, request.text
      if done != (done := total - len(session.pending) - len(session.under_way)):
        progress(done, total)
    return out, session.seconds

  def response_text(self, response: Sequence[int]) -> str:
    """A response's text, without its EOS."""
    ended = bool(response) and response[-1] in self.settings.eos_ids
    return self.decode_text(response[: len(response) - ended])

  def decode_text(self, tokens: Sequence[int]) -> str:
    return self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)

  def baseline(self, params: Params, prompts: Sequence[Prompt]) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities [N, E] and mask [N, E] of each reference straight after the prompt, with no reasoning."""
    out = empty_references(len(prompts), self.shapes.suffix_length)
    by_bucket = collections.defaultdict(list)
    for row, prompt in enumerate(prompts):
      if self.shapes.takes(prompt):
        by_bucket[bucket(self.shapes.prompt_buckets, len(prompt.ids))].append(row)
    size = self.shapes.prefill_rows
    for width, rows in sorted(by_bucket.items()):
      for first in range(0, len(rows), size):
        part = rows[first : first + size]
        batch = self.prefill(params, [prompts[row] for row in part], width)
        todo = []
        for place, row in enumerate(part):
          ids, mask = splicing.baseline_suffix(self.tokenizer, prompts[row].reference, self.baseline_prefix)
          fits, suffix = self.cut(ids, mask)
          out.overlong[row] = not fits
          if fits:
            todo.append(Scored(place, row, len(prompts[row].ids), int(prompts[row].ids[-1]), *suffix))
        self.score(params, batch.cache, todo, size, width, out)
    return out.logps, out.mask

  def prefill(self, params: Params, prompts: Sequence[Prompt], width: int) -> Prefilled:
    """Reads at most P prompts of at most `width` tokens."""
    tokens, lengths = pad_prompts(prompts, width, self.shapes.prefill_rows)
    hidden, cache = decode.prefill(self.model, params, tokens, lengths)
    return Prefilled(hidden, cache, lengths)

  def cut(self, ids: list[int], mask: list[bool]) -> tuple[bool, tuple[list[int], list[bool]]]:
    """A suffix up to the last token that counts, and whether it fits."""
    needed = max(place for place, counts in enumerate(mask) if counts) + 1
    return needed <= self.shapes.suffix_length, (ids[:needed], mask[:needed])

  def score(
    self,
    params: Params,
    cache: KVCache,
    todo: Sequence[Scored],
    most: int,
    kv_length: int,
    out: References,
  ) -> None:
    """Scores suffixes after rows of a cache, `most` at a time, and writes them into `out`.

    Rows of a call are of one suffix bucket, and lie as the mesh splits them: a part of the call's rows for each part
    of the cache's.
    """
    num_shards, all_rows, sizes = self.shapes.num_shards, cache.rows, self.shapes.score_sizes(most)
    by_bucket = collections.defaultdict(list)
    for item in todo:
      by_bucket[bucket(self.shapes.suffix_buckets, len(item.ids))].append(item)
    for width, items in sorted(by_bucket.items()):
      waiting = [[item for item in items if item.row * num_shards // all_rows == shard] for shard in range(num_shards)]
      while any(waiting):
        left = max(map(len, waiting)) * num_shards
        size = max((size for size in sizes if size <= left), default=sizes[0])
        batch = [shard[: size // num_shards] for shard in waiting]
        waiting = [shard[size // num_shards :] for shard in waiting]
        rows, suffixes, placed = lay_out(batch, size // num_shards, all_rows // num_shards, width)
        logps = decode.score(self.model, params, cache, rows, suffixes, self.score_temperature, kv_length)
        for (item, _), row in zip(placed, np.asarray(logps)[[place for _, place in placed]], strict=True):
          mask = np.array(item.mask)
          out.tokens[item.out, : len(mask)], out.mask[item.out, : len(mask)] = item.ids, mask
          out.logps[item.out, np.flatnonzero(mask)] = row[: mask.sum()]

  def insert(self, params: Params, slots: Slots, batch: Prefilled, key: jax.Array, entries: Sequence[Entry]) -> Slots:
    """Puts prompts into slots, `insert_rows` at most."""
    filling = [Entry(0, slots.counts.size, 0, 0, 0, SamplingParams())] * (self.shapes.insert_rows - len(entries))
    *numbers, choices = zip(*entries, *filling, strict=True)
    source, target, draws, samples, limits = np.array(numbers, np.uint32)
    keys = row_keys(key, draws, samples)
    places = source.astype(np.int32), target.astype(np.int32)
    return decode.insert(
      self.model,
      params,
      slots,
      batch.hidden,
      batch.cache,
      batch.lengths,
      *places,
      keys,
      limits.astype(np.int32),
      stack(choices),
    )

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

  def compile_programs(self, params: Params, scoring: bool) -> None:
    """Compiles every program that any lengths may ask for, by running each once on next to nothing.

    Raises:
      InputError: the device's memory is not enough, and which setting to lower.
    """
    shapes = self.shapes
    with self._memory(params, "slots"):
      slots = decode.empty_slots(self.model, params, shapes.slots, shapes.capacity, shapes.max_response_length)
      jax.block_until_ready(slots)
    with self._memory(params, "prefill_rows"):
      for width in shapes.prompt_buckets:
        batch = self.prefill(params, [], width)
        slots = self.insert(params, slots, batch, jax.random.key(0), [])
      jax.block_until_ready(slots)
    with self._memory(params, "slots"):
      decode.collect(slots, np.zeros(shapes.score_rows, np.int32))
      slots = decode.halt(slots, np.zeros(shapes.slots, bool))
      for rows, kv_length in itertools.product(shapes.decode_rows, shapes.kv_lengths):
        slots = jax.block_until_ready(decode.decode(self.model, params, slots, self.settings, rows, kv_length))
      for rows in shapes.decode_rows[:-1]:
        slots = self.move(params, slots, [], rows)
    with self._memory(params, "score_rows"):
      for width in shapes.suffix_buckets if scoring else ():
        for size in shapes.score_sizes(shapes.score_rows):
          self.score_padding(params, slots.cache, size, shapes.longest, width)
        for length in shapes.prompt_buckets:
          cache = self.prefill(params, [], length).cache
          for size in shapes.score_sizes(shapes.prefill_rows):
            self.score_padding(params, cache, size, length, width)

  def score_padding(self, params: Params, cache: KVCache, size: int, kv_length: int, width: int) -> None:
    """Runs a scoring program on nothing."""
    num_shards, all_rows = self.shapes.num_shards, cache.rows
    rows, suffixes, _ = lay_out([[] for _ in range(num_shards)], size // num_shards, all_rows // num_shards, width)
    jax.block_until_ready(decode.score(self.model, params, cache, rows, suffixes, self.score_temperature, kv_length))

  @contextlib.contextmanager
  def _memory(self, params: Params, size: str) -> Iterator[None]:
    """Says of a program that does not fit into the device's memory which setting to lower, and what would fit.

    Args:
      size: of the program, as `Shapes` calls it.
    """
    free = free_bytes()
    try:
      yield
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      num_shards, shapes = self.shapes.num_shards, self.shapes
      one = functools.partial(
        decode.empty_slots, self.model, slots=num_shards, capacity=shapes.capacity, limit=shapes.max_response_length
      )
      slot = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(one, params).cache)) // num_shards
      fits = f", room for at most {free // slot} slots" if jax.device_count() == 1 else ""
      # Who cannot change how many prompts are read at once can shorten them.
      size = next(name for name in (size, "prompt_limit", "slots") if getattr(self.names, name))
      raise InputError(
        f"{getattr(self.names, size)}: {getattr(shapes, size)} is too much for the device's memory, of which"
        f" {free / 2**30:.1f} GiB were free{fits}; each of {self.names.slots} takes {slot / 2**20:.1f} MiB"
      ) from None


def free_bytes() -> int:
  """Memory that the first device still has, or the host where the device does not say."""
  stats = jax.local_devices()[0].memory_stats()
  if stats and "bytes_limit" in stats:
    return stats["bytes_limit"] - stats["bytes_in_use"]
  return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
