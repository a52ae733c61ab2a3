"""Rollouts: prompts in, sampled responses and the probability of each reference answer out.

The host's half: which prompt goes into which slot, text, token ids and padding. What the device computes is in
`decode.py`. A round of the loop in `_Run.finish`:

    score the rows that ended two chunks ago -> their slots are free -> refill -> decode a chunk
                                                meanwhile: text and splicing of the rows that ended one chunk ago
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from transformers import PreTrainedTokenizerBase

from rlpr_jax import splicing
from rlpr_jax.data.pipeline import Prompt
from rlpr_jax.errors import InputError
from rlpr_jax.models import KVCache, Params
from rlpr_jax.sampling import decode
from rlpr_jax.sampling.decode import DecodeSettings, Slots, Suffixes


class StoppedError(Exception):
  """The caller asked to stop; what was sampled so far is lost."""


class Samples(NamedTuple):
  """Sampled responses. numpy. Only lengths say what is a token and what is padding (padding may equal EOS)."""

  tokens: np.ndarray  # int32[B, T] EOS included where it was sampled
  lengths: np.ndarray  # int32[B]
  logprobs: np.ndarray  # float32[B, T] of the sampled tokens, at the sampling temperature; 0 beyond the length
  finished: np.ndarray  # bool[B] True: ended by EOS; False: cut at its limit
  texts: list[str]  # [B] decoded, without the EOS
  refused: np.ndarray  # bool[B] the prompt is empty or over the limit: nothing was sampled


class References(NamedTuple):
  """The reference answers of a batch of rows, as they were scored. numpy."""

  tokens: np.ndarray  # int32[B, E] the suffix
  logps: np.ndarray  # float32[B, E] its log-probabilities; 0 where they were not needed
  mask: np.ndarray  # bool[B, E] True on the reference answer's own tokens
  overlong: np.ndarray  # bool[B] a suffix could have been spliced in, but did not fit
  starts: np.ndarray  # int32[B] tokens of the response that stand before the suffix


class Rollouts(NamedTuple):
  """Responses of a batch of prompts, with what the reward needs. numpy; B = P * G, a prompt's samples together."""

  tokens: np.ndarray  # int32[B, T]
  lengths: np.ndarray  # int32[B]
  logprobs: np.ndarray  # float32[B, T] of the sampled tokens
  finished: np.ndarray  # bool[B] True: ended by EOS
  texts: list[str]  # [B] decoded, without the EOS
  refused: np.ndarray  # bool[B] the prompt is empty or over the limit: nothing was sampled
  scorable: np.ndarray  # bool[B] the reference answer could be spliced in
  overlong: np.ndarray  # bool[B] it could have been, but did not fit
  reference_starts: np.ndarray  # int32[B] tokens of the response that stand before the suffix
  reference_tokens: np.ndarray  # int32[B, E] the suffix that was scored
  reference_logps: np.ndarray  # float32[B, E] log-probabilities of the reference answer's own tokens, else 0
  reference_mask: np.ndarray  # bool[B, E] True on the reference answer's own tokens
  seconds: dict[str, float]  # wall time of "prefill", "decode", "score"


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
  ways: int = 1  # parts into which the mesh splits rows; divides S, P and R

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
    return buckets(self.prompt_limit, smallest=max(32, self.prompt_limit // 8), ratio=2)

  @property
  def suffix_buckets(self) -> tuple[int, ...]:
    return buckets(self.suffix_length, smallest=4, ratio=4)

  @property
  def decode_rows(self) -> tuple[int, ...]:
    """How many slots are decoded: all, or a quarter, or a quarter of that, once fewer rows are left. Ascending."""
    counts = [self.slots]
    while counts[-1] >= 16 * self.ways:
      counts.append(-(-counts[-1] // (4 * self.ways)) * self.ways)
    return tuple(reversed(counts))

  def score_sizes(self, rows: int) -> tuple[int, ...]:
    """How many of at most `rows` suffixes a call scores: all, or a quarter. Ascending."""
    return tuple(sorted({max(rows // 4 // self.ways, 1) * self.ways, rows}))

  @property
  def longest(self) -> int:
    """Tokens of a text, at most."""
    return self.prompt_limit + self.max_response_length

  @property
  def reaches(self) -> tuple[int, ...]:
    """How much of a slot is read: quarters, for attention to skip what no row has filled."""
    longest = self.longest
    if longest < 256:
      return (longest,)
    return tuple(sorted({min(-(-longest * i // 4 // 64) * 64, longest) for i in range(1, 5)}))


def buckets(limit: int, smallest: int, ratio: int) -> tuple[int, ...]:
  """Lengths up to `limit`, each `ratio` times the one before and not under `smallest`; a few, for each is compiled."""
  lengths = [limit]
  while lengths[-1] // ratio >= smallest:
    lengths.append(-(-lengths[-1] // ratio))
  return tuple(reversed(lengths))


def bucket(lengths: Sequence[int], needed: int) -> int:
  """The smallest of the lengths that is enough."""
  return next(length for length in lengths if length >= needed)


class _Prefilled(NamedTuple):
  """Prompts on the device, read once for all their samples."""

  hidden: jax.Array  # [P, D]
  cache: KVCache  # of P rows
  lengths: np.ndarray  # int32[P]


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
    return _Run(self, params, draws, key, samples, False, limits, stop).finish(interrupted, progress)[0]

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
    sampled, references, seconds = _Run(self, params, draws, key, samples, True, limits).finish(interrupted)
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
            todo.append(_Scored(place, row, len(prompts[row].ids), int(prompts[row].ids[-1]), *suffix))
        self.score(params, batch.cache, todo, size, width, out)
    return out.logps, out.mask

  def prefill(self, params: Params, prompts: Sequence[Prompt], width: int) -> _Prefilled:
    """Reads at most P prompts of at most `width` tokens."""
    tokens, lengths = pad_prompts(prompts, width, self.shapes.prefill_rows)
    hidden, cache = decode.prefill(self.model, params, tokens, lengths)
    return _Prefilled(hidden, cache, lengths)

  def cut(self, ids: list[int], mask: list[bool]) -> tuple[bool, tuple[list[int], list[bool]]]:
    """A suffix up to the last token that counts, and whether it fits."""
    needed = max(place for place, counts in enumerate(mask) if counts) + 1
    return needed <= self.shapes.suffix_length, (ids[:needed], mask[:needed])

  def score(
    self,
    params: Params,
    cache: KVCache,
    todo: Sequence["_Scored"],
    most: int,
    reach: int,
    out: "References",
  ) -> None:
    """Scores suffixes after rows of a cache, `most` at a time, and writes them into `out`.

    Rows of a call are of one suffix bucket, and lie as the mesh splits them: a part of the call's rows for each part
    of the cache's.
    """
    ways, all_rows, sizes = self.shapes.ways, cache.rows, self.shapes.score_sizes(most)
    by_bucket = collections.defaultdict(list)
    for item in todo:
      by_bucket[bucket(self.shapes.suffix_buckets, len(item.ids))].append(item)
    for width, items in sorted(by_bucket.items()):
      waiting = [[item for item in items if item.row * ways // all_rows == way] for way in range(ways)]
      while any(waiting):
        left = max(map(len, waiting)) * ways
        size = max((size for size in sizes if size <= left), default=sizes[0])
        batch = [way[: size // ways] for way in waiting]
        waiting = [way[size // ways :] for way in waiting]
        rows, suffixes, placed = lay_out(batch, size // ways, all_rows // ways, width)
        logps = decode.score(self.model, params, cache, rows, suffixes, self.score_temperature, reach)
        for (item, _), row in zip(placed, np.asarray(logps)[[place for _, place in placed]], strict=True):
          mask = np.array(item.mask)
          out.tokens[item.out, : len(mask)], out.mask[item.out, : len(mask)] = item.ids, mask
          out.logps[item.out, np.flatnonzero(mask)] = row[: mask.sum()]

  def insert(
    self, params: Params, slots: Slots, batch: _Prefilled, key: jax.Array, requests: Sequence["_Request"]
  ) -> Slots:
    """Puts prompts into slots, `insert_rows` at most."""
    filling = [_Request(0, slots.counts.size, 0, 0, 0)] * (self.shapes.insert_rows - len(requests))
    source, target, draws, samples, limits = np.array([*requests, *filling], np.uint32).T
    keys = row_keys(key, draws, samples)
    places = source.astype(np.int32), target.astype(np.int32)
    return decode.insert(
      self.model, params, slots, batch.hidden, batch.cache, batch.lengths, *places, keys, limits.astype(np.int32)
    )

  def move(self, params: Params, slots: Slots, pairs: Sequence[tuple[int, int]], rows: int) -> Slots:
    """Copies slots: `pairs` of a slot and a place among the first of its part, `rows` in all."""
    ways = self.shapes.ways
    each, filled = self.shapes.slots // ways, [0] * ways
    source, target = np.zeros((2, ways, rows // ways), np.int32)  # slot 0 to slot 0: nothing
    for old, new in pairs:
      way = old // each
      source[way, filled[way]], target[way, filled[way]] = old % each, new % each
      filled[way] += 1
    return decode.move(self.model, params, slots, source.reshape(-1), target.reshape(-1))

  def warm_up(self, params: Params, scoring: bool) -> None:
    """Compiles every program that any lengths may ask for, by running each once on next to nothing.

    Raises:
      InputError: the device's memory is not enough, and which setting to lower.
    """
    shapes = self.shapes
    with self._memory(params, "rollout.slots", shapes.slots):
      slots = decode.empty_slots(self.model, params, shapes.slots, shapes.capacity, shapes.max_response_length)
      jax.block_until_ready(slots)
    with self._memory(params, "rollout.prefill_prompts", shapes.prefill_rows):
      for width in shapes.prompt_buckets:
        batch = self.prefill(params, [], width)
        slots = self.insert(params, slots, batch, jax.random.key(0), [])
      jax.block_until_ready(slots)
    with self._memory(params, "rollout.slots", shapes.slots):
      decode.collect(slots, np.zeros(shapes.score_rows, np.int32))
      slots = decode.halt(slots, np.zeros(shapes.slots, bool))
      for rows, reach in itertools.product(shapes.decode_rows, shapes.reaches):
        slots = jax.block_until_ready(decode.decode(self.model, params, slots, self.settings, rows, reach))
      for rows in shapes.decode_rows[:-1]:
        slots = self.move(params, slots, [], rows)
    with self._memory(params, "rollout.score_rows", shapes.score_rows):
      for width in shapes.suffix_buckets if scoring else ():
        for size in shapes.score_sizes(shapes.score_rows):
          self.score_padding(params, slots.cache, size, shapes.longest, width)
        for length in shapes.prompt_buckets:
          cache = self.prefill(params, [], length).cache
          for size in shapes.score_sizes(shapes.prefill_rows):
            self.score_padding(params, cache, size, length, width)

  def score_padding(self, params: Params, cache: KVCache, size: int, reach: int, width: int) -> None:
    """Runs a scoring program on nothing."""
    ways, all_rows = self.shapes.ways, cache.rows
    rows, suffixes, _ = lay_out([[] for _ in range(ways)], size // ways, all_rows // ways, width)
    jax.block_until_ready(decode.score(self.model, params, cache, rows, suffixes, self.score_temperature, reach))

  @contextlib.contextmanager
  def _memory(self, params: Params, field: str, value: int) -> Iterator[None]:
    """Says of a program that does not fit into the device's memory which setting to lower, and what would fit."""
    free = free_bytes()
    try:
      yield
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      ways, shapes = self.shapes.ways, self.shapes
      one = functools.partial(
        decode.empty_slots, self.model, slots=ways, capacity=shapes.capacity, limit=shapes.max_response_length
      )
      slot = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(one, params).cache)) // ways
      fits = f", room for at most {free // slot} slots" if jax.device_count() == 1 else ""
      raise InputError(
        f"config.{field}: {value} is too much for the device's memory, of which {free / 2**30:.1f} GiB were free{fits};"
        f" each of config.rollout.slots takes {slot / 2**20:.1f} MiB"
      ) from None


class _Request(NamedTuple):
  """A response that is to be sampled."""

  row: int  # of its prompt, in a prefilled batch
  slot: int
  draw: int  # its prompt's number
  sample: int  # its own, among the prompt's
  limit: int  # most tokens


class _Scored(NamedTuple):
  """A suffix that is to be scored."""

  row: int  # of the cache
  out: int  # row of the result
  prefix: int  # tokens of text before it
  last_kept: int  # the last of them
  ids: list[int]
  mask: list[bool]


def lay_out(
  batch: Sequence[Sequence[_Scored]], size: int, rows_each: int, width: int
) -> tuple[np.ndarray, Suffixes, list[tuple[_Scored, int]]]:
  """Suffixes of at most `size` rows in each part of a cache, as arrays of len(batch) * size rows; the rest is padding.

  Returns:
    rows of the cache; the suffixes; and each item with its row in them.
  """
  rows = np.repeat(np.arange(len(batch)) * rows_each, size).astype(np.int32)
  suffixes = Suffixes(*(np.zeros((rows.size, width), np.int32) for _ in Suffixes._fields))
  placed = []
  for way, items in enumerate(batch):
    for i, item in enumerate(items, way * size):
      length, scored = len(item.ids), np.flatnonzero(item.mask)
      rows[i] = item.row
      suffixes.tokens[i, :length] = [item.last_kept, *item.ids[:-1]]
      suffixes.positions[i] = item.prefix - 1 + np.arange(width)
      suffixes.segment_ids[i, :length] = 1
      suffixes.index[i, : scored.size] = scored
      suffixes.targets[i, : scored.size] = np.array(item.ids)[scored]
      placed.append((item, i))
  return rows, suffixes, placed


class _Run:
  """One batch of requests on its way through the slots. Request b is sample b % G of prompt b // G."""

  def __init__(
    self,
    engine: Engine,
    params: Params,
    draws: Sequence[tuple[int, Prompt]],
    key: jax.Array,
    samples: int,
    score: bool,
    limits: Sequence[int] | None = None,
    stop: Sequence[str] = (),
  ):
    self.engine, self.params, self.samples, self.scoring = engine, params, samples, score
    self.prompts = [prompt for _, prompt in draws]
    self.key, self.draws = key, np.array([draw for draw, _ in draws], np.uint32)
    shapes = self.shapes = engine.shapes
    total = len(draws) * samples
    self.stop = tuple(stop)
    self.limits = np.full(total, shapes.max_response_length)
    if limits is not None:
      self.limits = np.minimum(self.limits, limits)  # a slot has no room for more
    self.out = Samples(
      np.zeros((total, shapes.max_response_length), np.int32),
      np.zeros(total, np.int32),
      np.zeros((total, shapes.max_response_length), np.float32),
      np.zeros(total, bool),
      [""] * total,
      ~np.repeat(np.array([shapes.takes(prompt) for prompt in self.prompts], bool), samples),
    )
    self.references = empty_references(total, shapes.suffix_length)
    self.pending = collections.deque(np.flatnonzero(~self.out.refused).tolist())
    self.prefilled: dict[int, tuple[_Prefilled, int]] = {}  # prompt -> where it was read to
    self.slots = decode.empty_slots(engine.model, params, shapes.slots, shapes.capacity, shapes.max_response_length)
    each = shapes.slots // shapes.ways
    self.free = sorted(range(shapes.slots), key=lambda slot: slot % each)  # the parts of a mesh by turns
    self.under_way: dict[int, int] = {}  # slot -> request
    self.ended: list[tuple[int, int]] = []  # slot and request; its text is to be read
    self.ready: list[_Scored] = []  # to be scored; then its slot is free
    self.longest = np.zeros(shapes.slots, np.int32)  # tokens of text in each slot
    self.looked_at = np.zeros(shapes.slots, np.int32)  # tokens of its response that were searched for stop strings
    self.seconds = dict.fromkeys(("prefill", "decode", "score"), 0.0)

  def finish(
    self, interrupted: Callable[[], bool], progress: Callable[[int, int], None] = lambda done, total: None
  ) -> tuple[Samples, References, dict[str, float]]:
    """Runs until every request has ended and is scored."""
    total, done = len(self.out.texts), 0
    while self.pending or self.under_way or self.ended or self.ready:
      if interrupted():
        raise StoppedError
      with self.timed("score"):
        self.score_ready()
      with self.timed("prefill"):
        self.refill()
        jax.block_until_ready(self.slots)
      with self.timed("decode"):
        reach = bucket(self.shapes.reaches, max((self.longest[slot] for slot in self.under_way), default=1))
        rows = self.compact()
        self.slots = decode.decode(self.engine.model, self.params, self.slots, self.engine.settings, rows, reach)
        self.read_ended()  # while the device decodes
        self.gather()
      if done != (done := total - len(self.pending) - len(self.under_way)):
        progress(done, total)
    return self.out, self.references, self.seconds

  def refill(self) -> None:
    """Next requests into free slots; each prompt is read once, when its first sample's turn comes."""
    chosen = collections.defaultdict(list)
    while self.free and self.pending:
      request, slot = self.pending.popleft(), self.free.pop(0)
      prompt = request // self.samples
      if prompt not in self.prefilled:
        self.read_prompts(prompt)
      batch, row = self.prefilled[prompt]
      chosen[id(batch)].append((batch, row, slot, request))
      if (request + 1) % self.samples == 0:  # its last sample
        del self.prefilled[prompt]
      self.under_way[slot] = request
      self.longest[slot], self.looked_at[slot] = len(self.prompts[prompt].ids), 0
    width = self.shapes.insert_rows
    for group in chosen.values():
      for first in range(0, len(group), width):
        part = group[first : first + width]
        requests = [
          _Request(row, slot, self.draws[request // self.samples], request % self.samples, self.limits[request])
          for _, row, slot, request in part
        ]
        self.slots = self.engine.insert(self.params, self.slots, part[0][0], self.key, requests)

  def compact(self) -> int:
    """Moves rows to the front once so few are left that a smaller program decodes them; returns how many it decodes."""
    shapes = self.shapes
    each = shapes.slots // shapes.ways
    taken = collections.Counter(slot // each for slot in range(shapes.slots) if slot not in self.free)
    rows = bucket(shapes.decode_rows, max(taken.values(), default=0) * shapes.ways)
    front, pairs = rows // shapes.ways, []
    for way in range(shapes.ways):
      behind = [slot for slot in self.under_way if slot // each == way and slot % each >= front]
      places = sorted(slot for slot in self.free if slot // each == way and slot % each < front)
      pairs += zip(behind, places, strict=False)
    if pairs:
      self.slots = self.engine.move(self.params, self.slots, pairs, rows)
    for old, new in pairs:
      self.under_way[new] = self.under_way.pop(old)
      self.longest[new], self.looked_at[new] = self.longest[old], self.looked_at[old]
      self.free[self.free.index(new)] = old
    return rows

  def read_prompts(self, first: int) -> None:
    """Prefills a prompt, and with it the next ones that were not read yet and fit into the same bucket."""
    width = bucket(self.shapes.prompt_buckets, len(self.prompts[first].ids))
    last = self.pending[-1] // self.samples if self.pending else first
    # Not far ahead: what is read waits in memory for its turn.
    near = range(first + 1, min(last, first + 2 * self.shapes.prefill_rows) + 1)
    others = [p for p in near if p not in self.prefilled and 0 < len(self.prompts[p].ids) <= width]
    chosen = [first, *others[: self.shapes.prefill_rows - 1]]
    batch = self.engine.prefill(self.params, [self.prompts[p] for p in chosen], width)
    self.prefilled |= {p: (batch, row) for row, p in enumerate(chosen)}

  def gather(self) -> None:
    """Waits for the device, and takes the rows that have ended."""
    slots = self.slots
    state = jax.device_get((slots.active, slots.lengths, slots.counts, slots.finished))
    active, self.longest, counts, finished = map(np.array, state)  # to be written to
    if self.stop:
      self.find_stops(active, counts, finished)
    ended = [(slot, request) for slot, request in self.under_way.items() if not active[slot]]
    size = self.shapes.score_rows
    for first in range(0, len(ended), size):
      part = ended[first : first + size]
      where = np.zeros(size, np.int32)
      where[: len(part)] = [slot for slot, _ in part]
      tokens, logprobs = jax.device_get(decode.collect(self.slots, where))
      for i, (slot, request) in enumerate(part):
        count = counts[slot]
        self.out.tokens[request, :count], self.out.logprobs[request, :count] = tokens[i, :count], logprobs[i, :count]
        self.out.lengths[request], self.out.finished[request] = count, finished[slot]
        del self.under_way[slot]
        if not self.scoring:
          self.free.append(slot)
    self.ended = ended

  def find_stops(self, active: np.ndarray, counts: np.ndarray, finished: np.ndarray) -> None:
    """Ends the rows in whose text a stop string has come up, at the token that completes it; changes the arrays."""
    tokens = jax.device_get(self.slots.tokens)
    margin = max(len(stop.encode()) for stop in self.stop)  # a token is a byte at least
    halted = np.zeros(self.shapes.slots, bool)
    for slot in self.under_way:
      first, last = self.looked_at[slot], counts[slot]
      if not self.has_stop(tokens[slot, max(0, first - margin) : last]):
        continue
      ends = [count for count in range(first + 1, last + 1) if self.has_stop(tokens[slot, :count])]
      if ends:
        halted[slot], finished[slot], active[slot], counts[slot] = True, True, False, ends[0]
    self.looked_at = counts
    if halted.any():
      self.slots = decode.halt(self.slots, halted)

  def has_stop(self, tokens: np.ndarray) -> bool:
    text = self.engine.decode_text(tokens)
    return any(stop in text for stop in self.stop)

  def read_ended(self) -> None:
    """The text of rows that have ended, and where their reference answers go."""
    engine = self.engine
    for slot, request in self.ended:
      length, prompt = self.out.lengths[request], self.prompts[request // self.samples]
      response = self.out.tokens[request, :length].tolist()
      text = engine.response_text(response)
      self.out.texts[request] = text[: min((text.find(stop) for stop in self.stop if stop in text), default=None)]
      if not self.scoring:
        continue
      splice = splicing.splice(engine.tokenizer, prompt.ids, response, prompt.reference, engine.template)
      fits, suffix = engine.cut(splice.suffix_ids, splice.answer_mask) if splice else (False, None)
      if fits:
        kept = [*prompt.ids, *response[: splice.prefix_length]]
        self.ready.append(_Scored(slot, request, len(kept), int(kept[-1]), *suffix))
        self.references.starts[request] = splice.prefix_length
      else:
        self.references.overlong[request] = splice is not None
        self.free.append(slot)
    self.ended = []

  def score_ready(self) -> None:
    shapes = self.shapes
    self.engine.score(self.params, self.slots.cache, self.ready, shapes.score_rows, shapes.longest, self.references)
    self.free += [item.row for item in self.ready]
    self.ready = []

  @contextlib.contextmanager
  def timed(self, name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    self.seconds[name] += time.perf_counter() - start


def free_bytes() -> int:
  """Memory that the first device still has, or the host where the device does not say."""
  stats = jax.local_devices()[0].memory_stats()
  if stats and "bytes_limit" in stats:
    return stats["bytes_limit"] - stats["bytes_in_use"]
  return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def empty_references(rows: int, suffix_length: int) -> References:
  shape = (rows, suffix_length)
  return References(
    tokens=np.zeros(shape, np.int32),
    logps=np.zeros(shape, np.float32),
    mask=np.zeros(shape, bool),
    overlong=np.zeros(rows, bool),
    starts=np.zeros(rows, np.int32),
  )


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
