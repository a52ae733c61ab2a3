"""Requests on their way through the slots; they may come and go at any time. A round of `Scheduler.round`:

score the rows that finished two rounds ago -> their slots are free -> refill -> decode a chunk
                                               meanwhile: text and splicing of the rows that finished one round ago
"""

import collections
import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from rlpr_jax.models import Params
from rlpr_jax.sampling import decode
from rlpr_jax.sampling.adjustments import Adjustments, Form, TokenScores, TopTokens
from rlpr_jax.sampling.decode import NewTokens
from rlpr_jax.sampling.device import Device, Entry, Suffix
from rlpr_jax.sampling.params import SamplingParams
from rlpr_jax.sampling.shapes import bucket
from rlpr_jax.splicing import Splice
from rlpr_jax.types import Prompt


@dataclasses.dataclass(frozen=True)
class Extras:
  """What a server's responses may ask for beside their tokens."""

  adjustments: Adjustments | None = None  # None, and not neutral ones, where there are none: they take time
  prompt_top: int | None = None  # scores of the prompt's tokens, with so many most probable ones; None: no scores
  hidden: frozenset[int] = frozenset()  # tokens that a text does not show


class Beginning(NamedTuple):
  """What was sampled of a response before, by other parameters maybe; it is read, and goes on from there."""

  tokens: np.ndarray  # int32[N]
  logprobs: np.ndarray  # float32[N]
  finished: bool = False  # it has ended: nothing is left to do
  parts: int = 1  # in which it came, so that the next has random numbers of its own


@dataclasses.dataclass(eq=False)
class Group:
  """A prompt, which is read once for all its samples; those that have begun before are a group each."""

  prompt: Prompt
  draw: int  # its number
  sampling: SamplingParams
  stop: tuple[str, ...]  # strings that end a response
  waiting: int  # samples that are in no slot yet
  extras: Extras = Extras()
  beginning: Beginning | None = None
  place: tuple[decode.Prefilled, int] | None = None  # where it was read to, as long as samples are waiting
  scores: TokenScores | None = None  # of the prompt's N tokens but the first, if they were asked for; numpy

  @functools.cached_property
  def text(self) -> Prompt:
    """What is read before the first token is drawn."""
    if self.beginning is None:
      return self.prompt
    return dataclasses.replace(self.prompt, ids=np.concatenate([self.prompt.ids, self.beginning.tokens]))

  @property
  def min_tokens(self) -> int:
    """Tokens of a response before which no string ends it."""
    return self.extras.adjustments.min_tokens if self.extras.adjustments else 0


class Reference(NamedTuple):
  """A reference answer in the place of a response's own, as it was scored."""

  start: int  # tokens of the response that stand before the suffix
  tokens: list[int]  # the suffix
  mask: list[bool]  # True on the reference answer's own tokens
  logps: np.ndarray  # float32[A] of these


@dataclasses.dataclass(eq=False)
class Request:
  """A response that is to be sampled, and what has come of it."""

  group: Group
  sample: int  # among the group's
  limit: int  # most tokens
  searched: int = 0  # tokens of the response that were searched for stop strings
  form: Form | None = None  # that the response follows
  followed: int = 0  # tokens of the response that it has taken
  tokens: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))  # so far, EOS included
  logprobs: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.float32))
  top: TopTokens | None = None  # of each token so far, if they were asked for; numpy
  finished: bool = False  # ended by EOS, another token that ends it or a stop string; else cut at its limit
  text: str = ""  # without EOS or stop string
  # Each of the prompt's that was asked for, None where it has no room; [] if the response has no place for them.
  references: list[Reference | None] = dataclasses.field(default_factory=list)
  overlong: bool = False  # there is a place for the references, but not room for all

  @property
  def text_length(self) -> int:
    """Tokens of prompt and response so far."""
    return len(self.group.prompt.ids) + self.tokens.size

  def add(self, new: NewTokens, row: int) -> int:
    """Takes what was drawn in a row; returns how many tokens it is."""
    count = int(new.counts[row])
    self.tokens = np.concatenate([self.tokens, new.tokens[row, :count]])
    self.logprobs = np.concatenate([self.logprobs, new.logprobs[row, :count]])
    self.finished = bool(new.finished[row])
    asked = self.group.extras.adjustments
    if asked and asked.top and new.top:
      top = TopTokens(new.top.ids[row, :count].copy(), new.top.logprobs[row, :count].copy())  # no view of all rows
      self.top = top if self.top is None else TopTokens(*map(np.concatenate, zip(self.top, top, strict=True)))
    return count

  def cut(self, length: int) -> None:
    """Ends the response after its first tokens, the last of which completes a stop string."""
    self.tokens, self.logprobs, self.finished = self.tokens[:length], self.logprobs[:length], True
    self.top = self.top and TopTokens(self.top.ids[:length], self.top.logprobs[:length])


class Clock(NamedTuple):
  """What has been spent on rollouts."""

  seconds: dict[str, float]  # wall time of "prefill", "decode", "score"
  slot_steps: tuple[int, int]  # as in `Rollouts`

  def __sub__(self, earlier: "Clock") -> "Clock":
    """What was spent since."""
    seconds = {name: spent - earlier.seconds[name] for name, spent in self.seconds.items()}
    (busy, slots), (busy_before, slots_before) = self.slot_steps, earlier.slot_steps
    return Clock(seconds, (busy - busy_before, slots - slots_before))


class Scheduler:
  """Decides which prompt goes into which slot, and when; functions that it is given do what needs a tokenizer."""

  def __init__(
    self,
    device: Device,
    params: Params,
    key: jax.Array,
    decode_text: Callable[[Sequence[int] | np.ndarray], str],
    splice: Callable[[Prompt, list[int]], Sequence[Splice]] | None = None,
  ):
    """
    Args:
      key: with a group's draw and a request's sample it decides the response, whatever its slot and neighbours.
      decode_text: tokens to text.
      splice: puts each of a prompt's reference answers into the place of a response's own; None: nothing is scored.
    """
    self.device, self.shapes = device, device.shapes
    self.params, self.key = params, key
    self.decode_text, self.splice = decode_text, splice
    self.slots = device.empty_slots(params)
    # A request is in one of these after the other; from `running` to `to_score` it has a slot.
    self.waiting: collections.deque[Request] = collections.deque()
    self.running: dict[int, Request] = {}  # by slot
    self.finished: list[tuple[int, Request]] = []  # slot and request; its text is to be read
    self.to_score: list[tuple[Request, int, Suffix]] = []  # request, number of the reference, and the reference
    count = self.shapes.slots
    self.slots_each = count // self.shapes.num_shards  # of a part of the mesh
    self.free = sorted(range(count), key=lambda slot: slot % self.slots_each)  # the parts by turns
    self.seconds = dict.fromkeys(("prefill", "decode", "score"), 0.0)
    self.busy_steps = self.steps = 0  # of decoding: times the slots whose response went on, and by themselves

  @property
  def busy(self) -> bool:
    """Whether there is anything left to do."""
    return next(self.pending(), None) is not None

  def pending(self) -> Iterator[Request]:
    """Requests for which something is left to do."""
    yield from (request for request, *_ in self.to_score)
    yield from (request for _, request in self.finished)
    yield from self.running.values()
    yield from self.waiting

  def clock(self) -> Clock:
    """What has been spent so far."""
    return Clock(dict(self.seconds), (self.busy_steps, self.steps * self.shapes.slots))

  def add(
    self,
    prompt: Prompt,
    draw: int,
    limits: Sequence[int] | np.ndarray,
    sampling: SamplingParams,
    stop: Sequence[str] = (),
    extras: Extras = Extras(),
    beginnings: Sequence[Beginning] = (),
  ) -> list[Request]:
    """Asks for a response to the prompt for each of the limits, which are of tokens; 0 for the prompt's scores alone.

    Args:
      prompt: is refused if it is not one that `Shapes.takes`.
      draw: its number, a uint32.
      stop: strings that end a response. Its tokens then end with the one that completes the string, wherever in a token
        that is, and its text before the string.
      beginnings: what there is of each response already; none where they all begin now. Limits are of what is added.
        Those that have ended are returned as they are, and not scored again.
    """
    group = Group(prompt, draw, sampling, tuple(stop), waiting=len(limits), extras=extras)
    most = self.shapes.max_response_length  # a slot has no room for more
    requests = [Request(group, sample, min(int(limit), most)) for sample, limit in enumerate(limits)]
    if extras.adjustments and extras.adjustments.form:
      for request in requests:
        request.form = extras.adjustments.form()
    for request, beginning in zip(requests, beginnings, strict=bool(beginnings)):
      group.waiting -= 1
      request.group = dataclasses.replace(group, waiting=1, beginning=beginning)
      request.sample += len(limits) * beginning.parts
      request.limit = min(request.limit, most - beginning.tokens.size)
      request.tokens, request.logprobs, request.finished = beginning.tokens, beginning.logprobs, beginning.finished
      if beginning.finished:
        request.text = self.response_text(group, beginning.tokens.tolist())
    if self.shapes.takes(prompt):
      self.waiting += [request for request in requests if not request.finished]
    return requests

  def cancel(self, requests: Collection[Request]) -> None:
    """Gives requests up that have not finished; their slots are free at once."""
    for request in [request for request in self.waiting if request in requests]:
      self.waiting.remove(request)
      request.group.waiting -= 1
    halted = np.zeros(self.shapes.slots, bool)
    for slot in [slot for slot, request in self.running.items() if request in requests]:
      halted[slot] = True
      del self.running[slot]
      self.free.append(slot)
    if halted.any():
      self.slots = decode.halt(self.slots, halted)

  def round(self) -> list[Request]:
    """Draws a few more tokens for everyone; returns the requests whose text is known now."""
    # 1. Score from the cache before the next prompts overwrite it.
    with self.timed("score"):
      self.score_references()
    # 2. Fill every free slot: a row takes its time whether anything is in it or not.
    with self.timed("prefill"):
      self.refill()
      jax.block_until_ready(self.slots)
    with self.timed("decode"):
      # 3. Start decoding, of as few rows and reading as little of each as the compiled programs allow.
      longest = max((request.text_length for request in self.running.values()), default=1)
      kv_length = bucket(self.shapes.kv_lengths, longest)
      rows = self.compact()
      has_forms = self.follow_forms()
      self.slots, new = self.device.decode(self.params, self.slots, rows, kv_length, one=has_forms)
      # 4. While the device is busy, read the texts of the round before: so scoring lags two rounds behind.
      done = self.read_finished()
      # 5. Wait for the device, and see who finished.
      self.gather(jax.device_get(new))
    return done

  def score_references(self) -> None:
    """Scores what was spliced; then the slots are free."""
    suffixes = [suffix for *_, suffix in self.to_score]
    if suffixes:
      shapes = self.shapes
      logps = self.device.score(self.params, self.slots.cache, suffixes, shapes.score_rows, shapes.longest)
      for (request, number, suffix), scores in zip(self.to_score, logps, strict=True):
        start = suffix.prefix - len(request.group.prompt.ids)
        request.references[number] = Reference(start, suffix.ids, suffix.mask, scores)
    self.free += dict.fromkeys(suffix.row for suffix in suffixes)  # several references of a row free one slot
    self.to_score = []

  def refill(self) -> None:
    """Puts the next requests into free slots; each prompt is read once, when its first sample's turn comes."""
    entries: dict[int, tuple[decode.Prefilled, list[Entry]]] = {}  # by the identity of what was read together
    while self.free and self.waiting:
      request, slot = self.waiting.popleft(), self.free.pop(0)
      group = request.group
      prompts, row = group.place or self.read_prompts(group)
      entry = Entry(
        row=row,
        slot=slot,
        draw=group.draw,
        sample=request.sample,
        limit=request.limit,
        sampling=group.sampling,
        adjustments=group.extras.adjustments,
        prompt=group.prompt.ids,
      )
      entries.setdefault(id(prompts), (prompts, []))[1].append(entry)
      group.waiting -= 1
      if not group.waiting:
        group.place = None
      self.running[slot] = request
    self.make_room_for_adjustments()
    size = self.shapes.insert_rows
    for prompts, new in entries.values():
      for first in range(0, len(new), size):
        self.slots = self.device.insert(self.params, self.slots, prompts, self.key, new[first : first + size])

  def read_prompts(self, first: Group) -> tuple[decode.Prefilled, int]:
    """Prefills a prompt, and with it the next ones of the same bucket that were not read yet; returns where it is."""
    size, width = self.shapes.prefill_rows, bucket(self.shapes.prompt_buckets, len(first.text.ids))
    near: dict[Group, None] = {}  # not far ahead: what is read waits in memory for its turn
    for request in self.waiting:
      near[request.group] = None
      if len(near) > 2 * size:
        break
    others = [group for group in near if group is not first and group.place is None and len(group.text.ids) <= width]
    chosen = [first, *others[: size - 1]]
    tops = [group.extras.prompt_top for group in chosen if group.extras.prompt_top is not None]
    texts = [group.text for group in chosen]
    if tops:
      prompts, scores = self.device.prefill_and_score(self.params, texts, width, max(tops))
      for group, of_group in zip(chosen, scores, strict=True):
        group.scores = of_group
    else:
      prompts = self.device.prefill(self.params, texts, width)
    for row, group in enumerate(chosen):
      group.place = prompts, row
    return prompts, 0

  def make_room_for_adjustments(self) -> None:
    """Has the slots hold adjustments while a response in them asks for some, and no longer."""
    wanted = any(request.group.extras.adjustments for request in self.running.values())
    if wanted and self.slots.adjustments is None:
      self.slots = self.device.with_adjustments(self.params, self.slots)
    elif not wanted and self.slots.adjustments is not None:
      self.slots = self.slots._replace(adjustments=None)

  def follow_forms(self) -> bool:
    """Lets in each slot only what its response's form allows next; whether there is any."""
    with_form = {slot: request.form for slot, request in self.running.items() if request.form}
    if not with_form:
      return False
    allowed = {}
    for slot, form in with_form.items():
      request = self.running[slot]
      for token in request.tokens[request.followed :]:
        form.take(int(token))
      request.followed = request.tokens.size
      allowed[slot] = form.allowed()
    self.slots = self.device.restrict(self.params, self.slots, allowed)
    return True

  def compact(self) -> int:
    """Moves rows to the front once so few are left that a smaller program decodes them; returns how many it decodes."""
    shapes, each = self.shapes, self.slots_each
    taken = collections.Counter(slot // each for slot in range(shapes.slots) if slot not in self.free)
    rows = bucket(shapes.decode_rows, max(taken.values(), default=0) * shapes.num_shards)
    front = rows // shapes.num_shards
    pairs: list[tuple[int, int]] = []
    for shard in range(shapes.num_shards):
      behind = [slot for slot in self.running if slot // each == shard and slot % each >= front]
      places = sorted(slot for slot in self.free if slot // each == shard and slot % each < front)
      pairs += zip(behind, places, strict=False)
    if not pairs:
      return rows
    left = np.zeros(shapes.slots, bool)
    for old, new in pairs:
      self.running[new] = self.running.pop(old)
      self.free[self.free.index(new)] = old
      left[old] = True
    # A copy stays behind, which would be decoded too once more rows are.
    self.slots = decode.halt(self.device.move(self.params, self.slots, pairs, rows), left)
    return rows

  def read_finished(self) -> list[Request]:
    """Reads the text of rows that have finished; a row whose reference can be scored keeps its slot until it is."""
    finished, self.finished = self.finished, []
    for slot, request in finished:
      prompt, response = request.group.prompt, request.tokens.tolist()
      request.text = self.response_text(request.group, response)
      splices = self.splice(prompt, response) if self.splice else ()
      request.references = [None] * len(splices)
      fitting: list[tuple[Request, int, Suffix]] = []
      for number, splice in enumerate(splices):
        kept = [*prompt.ids.tolist(), *response[: splice.prefix_length]]
        suffix = Suffix.after(slot, kept, splice.suffix_ids, splice.answer_mask)
        if len(suffix.ids) <= self.shapes.suffix_length:
          fitting.append((request, number, suffix))
      request.overlong = len(fitting) < len(splices)
      self.to_score += fitting
      if self.splice and not fitting:
        self.free.append(slot)
    return [request for _, request in finished]

  def gather(self, new: NewTokens) -> None:
    """Hands requests what was drawn for them, and takes the rows that have ended; `new`: numpy."""
    rows, ended, drawn = new.counts.size // self.shapes.num_shards, [], []
    halted = np.zeros(self.shapes.slots, bool)
    for slot, request in self.running.items():
      row = slot // self.slots_each * rows + slot % self.slots_each  # the first of each part were decoded
      drawn.append(request.add(new, row))
      halted[slot] = new.active[row] & self.cut_at_stop(request)
      if halted[slot] or not new.active[row]:
        ended.append((slot, request))
    self.busy_steps, self.steps = self.busy_steps + sum(drawn), self.steps + max(drawn, default=0)
    for slot, _ in ended:
      del self.running[slot]
      if not self.splice:
        self.free.append(slot)
    if halted.any():
      self.slots = decode.halt(self.slots, halted)
    self.finished = ended

  def cut_at_stop(self, request: Request) -> bool:
    """Ends a response in whose text a stop string has come up, at the token that completes it; whether one has."""
    margin = max((len(text.encode()) for text in request.group.stop), default=0)  # a token is a byte at least
    least, last = request.group.min_tokens, request.tokens.size
    first, request.searched = max(request.searched, least), last
    if not self.has_stop(request.group, request.tokens[max(least, first - margin) : last]):
      return False
    ends = (x for x in range(first + 1, last + 1) if self.has_stop(request.group, request.tokens[least:x]))
    end = next(ends, None)
    if end is not None:
      request.cut(end)
    return end is not None

  def has_stop(self, group: Group, tokens: np.ndarray) -> bool:
    return bool(group.stop) and first_stop(self.shown(group, tokens), group.stop) is not None

  def shown(self, group: Group, tokens: Sequence[int] | np.ndarray) -> str:
    """The text of tokens but for those that are hidden."""
    hidden = group.extras.hidden
    return self.decode_text([token for token in tokens if token not in hidden] if hidden else tokens)

  def response_text(self, group: Group, response: list[int]) -> str:
    """The text of a whole response, up to what ended it."""
    settings, adjustments = self.device.settings, group.extras.adjustments
    if adjustments is None:
      tokens = settings.without_eos(response)
    else:
      ended = len(response) > 0 and response[-1] in adjustments.ends(settings.eos_ids)
      tokens = response[: len(response) - ended]
    text = self.shown(group, tokens)
    start = len(self.shown(group, tokens[: group.min_tokens])) if group.min_tokens else 0
    end = first_stop(text[start:], group.stop)
    return text if end is None else text[: start + end]

  @contextlib.contextmanager
  def timed(self, name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    self.seconds[name] += time.perf_counter() - start


def first_stop(text: str, stop: Sequence[str]) -> int | None:
  """Finds where the first of the stop strings begins; None where there is none.

  >>> first_stop("one, two; three", [";", ","])
  3
  """
  return min((text.find(string) for string in stop if string in text), default=None)
