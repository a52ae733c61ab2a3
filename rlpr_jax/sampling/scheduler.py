"""Requests on their way through the slots of an engine; they may come and go at any time. A round of `Scheduler.round`:

score the rows that ended two rounds ago -> their slots are free -> refill -> decode a chunk
                                            meanwhile: text and splicing of the rows that ended one round ago
"""

import collections
import contextlib
import dataclasses
import time
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from rlpr_jax import splicing
from rlpr_jax.models import Params
from rlpr_jax.sampling import decode
from rlpr_jax.sampling.batches import Entry, Prefilled, References, Scored
from rlpr_jax.sampling.params import SamplingParams
from rlpr_jax.sampling.shapes import bucket
from rlpr_jax.types import Prompt

if TYPE_CHECKING:
  from rlpr_jax.sampling.engine import Engine


@dataclasses.dataclass(eq=False)
class Group:
  """A prompt, which is read once for all its samples."""

  prompt: Prompt
  draw: int  # its number
  choice: SamplingParams
  stop: tuple[str, ...]  # strings that end a response
  waiting: int  # samples that are in no slot yet
  place: tuple[Prefilled, int] | None = None  # where it was read to, as long as samples are waiting


@dataclasses.dataclass(eq=False)
class Request:
  """A response that is to be sampled, and what has come of it."""

  row: int  # of the references, and the caller's
  group: Group
  sample: int  # among the group's
  limit: int  # most tokens
  tokens: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))  # EOS included
  logprobs: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.float32))
  finished: bool = False  # ended by EOS or a stop string; else cut at its limit
  text: str = ""  # without EOS or stop string


class Scheduler:
  """Samples in slots what is asked for, and scores the reference answers if it is given a place for them."""

  def __init__(self, engine: "Engine", params: Params, key: jax.Array, references: References | None = None):
    """
    Args:
      key: with a group's draw and a request's sample it decides the response, whatever its slot and neighbours.
      references: rows for the requests that will come, to be written to.
    """
    self.engine, self.params, self.key, self.references = engine, params, key, references
    shapes = self.shapes = engine.shapes
    self.pending: collections.deque[Request] = collections.deque()
    self.slots = decode.empty_slots(engine.model, params, shapes.slots, shapes.capacity, shapes.max_response_length)
    each = shapes.slots // shapes.num_shards
    self.free = sorted(range(shapes.slots), key=lambda slot: slot % each)  # the parts of a mesh by turns
    self.under_way: dict[int, Request] = {}  # by slot
    self.ended: list[tuple[int, Request]] = []  # slot and request; its text is to be read
    self.ready: list[Scored] = []  # to be scored; then its slot is free
    self.longest = np.zeros(shapes.slots, np.int32)  # tokens of text in each slot
    self.looked_at = np.zeros(shapes.slots, np.int32)  # tokens of its response that were searched for stop strings
    self.seconds = dict.fromkeys(("prefill", "decode", "score"), 0.0)

  @property
  def busy(self) -> bool:
    """Whether there is anything left to do."""
    return bool(self.pending or self.under_way or self.ended or self.ready)

  def add(
    self,
    prompt: Prompt,
    draw: int,
    limits: Sequence[int],
    choice: SamplingParams,
    stop: Sequence[str] = (),
    row: int = 0,
  ) -> list[Request]:
    """Asks for a response to the prompt for each of the limits, which are of tokens, 1 or more.

    Args:
      prompt: one that `Shapes.takes`.
      draw: its number, a uint32.
      stop: strings that end a response. Its tokens then end with the one that completes the string, wherever in a token
        that is, and its text before the string.
      row: of the first response; the others follow.
    """
    group = Group(prompt, draw, choice, tuple(stop), len(limits))
    most = self.shapes.max_response_length  # a slot has no room for more
    requests = [Request(row + sample, group, sample, min(limit, most)) for sample, limit in enumerate(limits)]
    self.pending += requests
    return requests

  def cancel(self, requests: Collection[Request]) -> None:
    """Gives requests up that have not ended; their slots are free at once."""
    for request in [request for request in self.pending if request in requests]:
      self.pending.remove(request)
      request.group.waiting -= 1
    halted = np.zeros(self.shapes.slots, bool)
    for slot in [slot for slot, request in self.under_way.items() if request in requests]:
      halted[slot] = True
      del self.under_way[slot]
      self.free.append(slot)
    if halted.any():
      self.slots = decode.halt(self.slots, halted)

  def round(self) -> list[Request]:
    """A few more tokens for everyone; returns the requests whose text is known now."""
    with self.timed("score"):
      self.score_ready()
    with self.timed("prefill"):
      self.refill()
      jax.block_until_ready(self.slots)
    with self.timed("decode"):
      kv_length = bucket(self.shapes.kv_lengths, max((self.longest[slot] for slot in self.under_way), default=1))
      rows = self.compact()
      self.slots = decode.decode(self.engine.model, self.params, self.slots, self.engine.settings, rows, kv_length)
      done = self.read_ended()  # while the device decodes
      self.gather()
    return done

  def refill(self) -> None:
    """Next requests into free slots; each prompt is read once, when its first sample's turn comes."""
    chosen: dict[int, tuple[Prefilled, list[Entry]]] = {}  # by the identity of the batch
    while self.free and self.pending:
      request, slot = self.pending.popleft(), self.free.pop(0)
      group = request.group
      if group.place is None:
        self.read_prompts(group)
      batch, row = group.place
      entry = Entry(row, slot, group.draw, request.sample, request.limit, group.choice)
      chosen.setdefault(id(batch), (batch, []))[1].append(entry)
      group.waiting -= 1
      if not group.waiting:
        group.place = None
      self.under_way[slot] = request
      self.longest[slot], self.looked_at[slot] = len(group.prompt.ids), 0
    width = self.shapes.insert_rows
    for batch, entries in chosen.values():
      for first in range(0, len(entries), width):
        part = entries[first : first + width]
        self.slots = self.engine.insert(self.params, self.slots, batch, self.key, part)

  def compact(self) -> int:
    """Moves rows to the front once so few are left that a smaller program decodes them; returns how many it decodes."""
    shapes = self.shapes
    each = shapes.slots // shapes.num_shards
    taken = collections.Counter(slot // each for slot in range(shapes.slots) if slot not in self.free)
    rows = bucket(shapes.decode_rows, max(taken.values(), default=0) * shapes.num_shards)
    front, pairs = rows // shapes.num_shards, []
    for shard in range(shapes.num_shards):
      behind = [slot for slot in self.under_way if slot // each == shard and slot % each >= front]
      places = sorted(slot for slot in self.free if slot // each == shard and slot % each < front)
      pairs += zip(behind, places, strict=False)
    if pairs:
      self.slots = self.engine.move(self.params, self.slots, pairs, rows)
    for old, new in pairs:
      self.under_way[new] = self.under_way.pop(old)
      self.longest[new], self.looked_at[new] = self.longest[old], self.looked_at[old]
      self.free[self.free.index(new)] = old
    return rows

  def read_prompts(self, first: Group) -> None:
    """Prefills a prompt, and with it the next ones that were not read yet and fit into the same bucket."""
    size, width = self.shapes.prefill_rows, bucket(self.shapes.prompt_buckets, len(first.prompt.ids))
    near: dict[Group, None] = {}  # not far ahead: what is read waits in memory for its turn
    for request in self.pending:
      near[request.group] = None
      if len(near) > 2 * size:
        break
    others = [group for group in near if group is not first and group.place is None and len(group.prompt.ids) <= width]
    chosen = [first, *others[: size - 1]]
    batch = self.engine.prefill(self.params, [group.prompt for group in chosen], width)
    for row, group in enumerate(chosen):
      group.place = batch, row

  def gather(self) -> None:
    """Waits for the device, and takes the rows that have ended."""
    slots = self.slots
    state = jax.device_get((slots.active, slots.lengths, slots.counts, slots.finished))
    active, self.longest, counts, finished = map(np.array, state)  # to be written to
    if any(request.group.stop for request in self.under_way.values()):
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
        request.tokens, request.logprobs = tokens[i, :count].copy(), logprobs[i, :count].copy()
        request.finished = bool(finished[slot])
        del self.under_way[slot]
        if self.references is None:
          self.free.append(slot)
    self.ended = ended

  def find_stops(self, active: np.ndarray, counts: np.ndarray, finished: np.ndarray) -> None:
    """Ends the rows in whose text a stop string has come up, at the token that completes it; changes the arrays."""
    tokens = jax.device_get(self.slots.tokens)
    halted = np.zeros(self.shapes.slots, bool)
    for slot, request in self.under_way.items():
      stop = request.group.stop
      margin = max((len(text.encode()) for text in stop), default=0)  # a token is a byte at least
      first, last = self.looked_at[slot], counts[slot]
      if not self.has_stop(tokens[slot, max(0, first - margin) : last], stop):
        continue
      ends = [count for count in range(first + 1, last + 1) if self.has_stop(tokens[slot, :count], stop)]
      if ends:
        halted[slot], finished[slot], active[slot], counts[slot] = True, True, False, ends[0]
    self.looked_at = counts
    if halted.any():
      self.slots = decode.halt(self.slots, halted)

  def has_stop(self, tokens: np.ndarray, stop: Sequence[str]) -> bool:
    return bool(stop) and first_stop(self.engine.decode_text(tokens), stop) is not None

  def so_far(self) -> list[tuple[Request, np.ndarray, np.ndarray]]:
    """Of each request in a slot: its tokens by now, and their log-probabilities."""
    slots = self.slots
    counts, tokens, logprobs = jax.device_get((slots.counts, slots.tokens, slots.logprobs))
    return [
      (request, tokens[slot, : counts[slot]].copy(), logprobs[slot, : counts[slot]].copy())
      for slot, request in self.under_way.items()
    ]

  def read_ended(self) -> list[Request]:
    """The text of rows that have ended, and where their reference answers go."""
    engine, done = self.engine, [request for _, request in self.ended]
    for slot, request in self.ended:
      prompt, response = request.group.prompt, request.tokens.tolist()
      text = engine.response_text(response)
      request.text = text[: first_stop(text, request.group.stop)]
      if self.references is None:
        continue
      splice = splicing.splice(engine.tokenizer, prompt.ids, response, prompt.reference, engine.template)
      fits, suffix = engine.cut(splice.suffix_ids, splice.answer_mask) if splice else (False, None)
      if fits:
        kept = [*prompt.ids, *response[: splice.prefix_length]]
        self.ready.append(Scored(slot, request.row, len(kept), int(kept[-1]), *suffix))
        self.references.starts[request.row] = splice.prefix_length
      else:
        self.references.overlong[request.row] = splice is not None
        self.free.append(slot)
    self.ended = []
    return done

  def score_ready(self) -> None:
    if self.ready:
      shapes = self.shapes
      self.engine.score(self.params, self.slots.cache, self.ready, shapes.score_rows, shapes.longest, self.references)
    self.free += [item.row for item in self.ready]
    self.ready = []

  @contextlib.contextmanager
  def timed(self, name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    self.seconds[name] += time.perf_counter() - start


def first_stop(text: str, stop: Sequence[str]) -> int | None:
  """Where the first of the stop strings begins; None where there is none."""
  return min((text.find(string) for string in stop if string in text), default=None)
