"""The jitted half of a rollout: prefill, decoding in slots, scoring from the cache. Arrays in, arrays out.

    prompts -> prefill -> insert into free slots -> decode a few steps -> those that ended: score from the cache
                         ^______________________________________________________________________|

Shapes: P prompts read together, S slots, C tokens of room in a slot, T tokens drawn in a call, R rows decoded or scored
together, E tokens of the suffixes after a row, A of them scored.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt32

from rlpr_jax.models import UNSEEN, CacheView, Decoder, KVCache, ModelGraph, Params, Text
from rlpr_jax.models.cache_rows import append_tokens, copy_rows, fill_rows
from rlpr_jax.sampling.adjustments import (
  RowAdjustments,
  TokenScores,
  TopTokens,
  draw_adjusted,
  everything,
  no_top,
  rank_tokens,
)
from rlpr_jax.sampling.params import RowParams, SamplingParams, sample_token, stack
from rlpr_jax.types import AnyArray

_SCORED_AT_ONCE = 256  # tokens whose logits exist at once where prompts are scored


@dataclasses.dataclass(frozen=True)
class DecodeSettings:
  """The constants of the compiled decoding program, beside its shapes."""

  steps: int  # tokens a call, at most
  eos_ids: tuple[int, ...]

  def without_eos(self, response: Sequence[int] | np.ndarray) -> Sequence[int] | np.ndarray:
    """The response without the EOS that ended it.

    >>> DecodeSettings(steps=4, eos_ids=(2,)).without_eos([7, 9, 2])
    [7, 9]
    """
    ended = len(response) > 0 and response[-1] in self.eos_ids
    return response[: len(response) - ended]


class Prefilled(NamedTuple):
  """Prompts on the device, read once for all their samples."""

  hidden: Float[Array, "P D"]  # at each prompt's last token
  cache: KVCache  # of P rows
  lengths: Int[AnyArray, "P"]


class Entries(NamedTuple):
  """Responses that begin: prompt `source[i]` of some that were read goes into slot `target[i]`. numpy or jax."""

  source: Int[AnyArray, "I"]
  target: Int[AnyArray, "I"]  # S: nowhere
  keys: UInt32[Array, "I 2"]
  limits: Int[AnyArray, "I"]
  sampling: RowParams
  adjustments: RowAdjustments | None = None  # where the slots have some


class NewTokens(NamedTuple):
  """What one call of `decode` drew, and all that the host needs of it."""

  tokens: Int[Array, "R T"]  # the first `counts` of each row are of its response, EOS included
  logprobs: Float[Array, "R T"]  # at the sampling temperature, or as the row's adjustments have it
  counts: Int[Array, "R"]
  finished: Bool[Array, "R"]  # the last of them is an EOS, or another token that ends the row
  active: Bool[Array, "R"]  # the response goes on
  top: TopTokens | None = None  # [R, T, K], where slots have adjustments


class Slots(NamedTuple):
  """Running rows, and rows that ended and were not replaced yet.

  A slot's text is its prompt and its response; the tokens themselves are the host's.
  """

  cache: KVCache  # of the text; rows are slots, of C tokens
  lengths: Int[Array, "S"]  # tokens of text in the cache
  hidden: Float[Array, "S D"]  # at the last of them: what predicts the next
  keys: UInt32[Array, "S 2"]  # of each row's random numbers
  limits: Int[Array, "S"]  # most response tokens
  sampling: RowParams  # how each row's tokens are drawn
  counts: Int[Array, "S"]  # response tokens so far
  active: Bool[Array, "S"]  # still running
  # Where a response asks for more than sampling, as servers' do; else this does not exist.
  adjustments: RowAdjustments | None = None


_Carry = tuple[jax.Array, KVCache, NewTokens, Slots]


@functools.partial(jax.jit, static_argnames=("model", "slots", "capacity"))
def empty_slots(model: ModelGraph, params: Params, slots: int, capacity: int) -> Slots:
  """Makes slots with nothing in them; `capacity` is C.

  Raises:
    SettingError: `Runtime.decode_attention` asks for a kernel that cannot read them.
  """
  decoder = nnx.merge(model, params)
  config, dtype = decoder.config, decoder.runtime.compute_dtype
  cache = decoder.empty_cache(slots, capacity)
  decoder.check_readable(cache)
  new = Slots(
    cache=cache,
    lengths=jnp.zeros(slots, jnp.int32),
    hidden=jnp.zeros((slots, config.embed_dim), dtype),
    keys=jnp.zeros((slots, 2), jnp.uint32),
    limits=jnp.zeros(slots, jnp.int32),
    sampling=jax.tree.map(jnp.asarray, stack([SamplingParams()] * slots)),
    counts=jnp.zeros(slots, jnp.int32),
    active=jnp.zeros(slots, bool),
  )
  return _place_slots(decoder, new)


def _place_slots(decoder: Decoder, slots: Slots) -> Slots:
  """Puts slots where they always are on the mesh; elsewhere, they would have all that takes them compiled again."""
  constrain = decoder.runtime.sharding.constrain
  cache = jax.tree.map(decoder.place_cache, slots.cache)
  rows = jax.tree.map(lambda x: constrain(x, "batch", *[None] * (x.ndim - 1)), _without_cache(slots))
  return rows._replace(cache=cache)


def _without_cache(slots: Slots) -> Slots:
  """All fields but one, to be mapped over: arrays whose rows are slots."""
  return slots._replace(cache=None)  # type: ignore[arg-type]


@functools.partial(jax.jit, static_argnames=("model", "settings"), donate_argnames=("slots",))
def with_adjustments(model: ModelGraph, params: Params, slots: Slots, settings: DecodeSettings) -> Slots:
  """Gives slots room for what responses may ask of their tokens; those that run ask for nothing."""
  decoder = nnx.merge(model, params)
  rows, size = slots.counts.size, decoder.config.vocab_size
  zeros, table = jnp.zeros(rows, jnp.float32), jnp.zeros((rows, size), bool)
  neutral = RowAdjustments(
    presence=zeros,
    frequency=zeros,
    repetition=zeros + 1,
    min_tokens=jnp.zeros(rows, jnp.int32),
    top=jnp.zeros(rows, jnp.int32),
    raw=jnp.zeros(rows, bool),
    bias=jnp.zeros((rows, size), jnp.float32),
    in_prompt=table,
    counts=jnp.zeros((rows, size), jnp.int32),
    ends=table.at[:, jnp.array(settings.eos_ids, jnp.int32)].set(True),
    allowed=jnp.asarray(everything(rows, size)),
  )
  return _place_slots(decoder, slots._replace(adjustments=neutral))


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("slots",))
def restrict(model: ModelGraph, params: Params, slots: Slots, allowed: UInt32[AnyArray, "S W"]) -> Slots:
  """Says which tokens may come next in each slot."""
  assert slots.adjustments is not None
  restricted = slots.adjustments._replace(allowed=jnp.asarray(allowed))
  return _place_slots(nnx.merge(model, params), slots._replace(adjustments=restricted))


@functools.partial(jax.jit, static_argnames=("model",))
def prefill(
  model: ModelGraph, params: Params, tokens: Int[Array, "P N"], lengths: Int[Array, "P"]
) -> tuple[Float[Array, "P D"], KVCache]:
  """Reads each prompt once; returns the hidden states of the last tokens, and all keys and values."""
  decoder = nnx.merge(model, params)
  hidden, cache = decoder.prefill(tokens)
  return hidden[jnp.arange(tokens.shape[0]), lengths - 1], cache


@functools.partial(jax.jit, static_argnames=("model", "top"))
def prefill_and_score(
  model: ModelGraph, params: Params, tokens: Int[Array, "P N"], lengths: Int[Array, "P"], top: int
) -> tuple[Float[Array, "P D"], KVCache, TokenScores]:
  """Reads prompts as `prefill` does, and scores each of their tokens after the first.

  Works through chunks of places, so that only their logits exist at once.

  Args:
    top: most probable tokens that are told of each place.

  Returns:
    as `prefill`; and [P, N] scores, in place i those of token i + 1, the last of no meaning.
  """
  decoder = nnx.merge(model, params)
  hidden, cache = decoder.prefill(tokens)
  rows, length = tokens.shape
  chunk = min(length, max(_SCORED_AT_ONCE // rows, 1))
  padding = -length % chunk

  def chunks(x: jax.Array) -> jax.Array:
    padded = jnp.pad(x, ((0, 0), (0, padding), *[(0, 0)] * (x.ndim - 2)))
    return padded.reshape(rows, -1, chunk, *x.shape[2:]).swapaxes(0, 1)

  targets = jnp.roll(jnp.asarray(tokens), -1, axis=1)
  parts = jax.lax.map(
    lambda part: rank_tokens(decoder.logits(part[0]), part[1], top), (chunks(hidden), chunks(targets))
  )
  scores = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(rows, length + padding, *x.shape[3:])[:, :length], parts)
  return hidden[jnp.arange(rows), lengths - 1], cache, scores


@jax.jit
def row_keys(key: jax.Array, draws: jax.Array, samples: jax.Array) -> UInt32[Array, "B 2"]:
  """One key a row: the run's key, folded with the draw's number, folded with the sample's.

  >>> row_keys(jax.random.key(0), jnp.array([7, 7]), jnp.array([0, 1])).shape
  (2, 2)
  """
  rows = jax.vmap(lambda draw, sample: jax.random.fold_in(jax.random.fold_in(key, draw), sample))(draws, samples)
  return jax.random.key_data(rows)


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("slots",))
def insert(model: ModelGraph, params: Params, slots: Slots, prompts: Prefilled, entries: Entries) -> Slots:
  """Puts prefilled prompts into slots, for responses to begin."""
  decoder = nnx.merge(model, params)
  source, target = entries.source, entries.target

  def at(old: jax.Array, new: AnyArray | int | bool) -> jax.Array:
    return old.at[target].set(new, mode="drop")

  fill = functools.partial(fill_rows, source=source, target=target, sharding=decoder.runtime.sharding)
  new = slots._replace(
    cache=jax.tree.map(fill, slots.cache, prompts.cache),
    lengths=at(slots.lengths, prompts.lengths[source]),
    hidden=at(slots.hidden, prompts.hidden[source]),
    keys=at(slots.keys, entries.keys),
    limits=at(slots.limits, entries.limits),
    sampling=jax.tree.map(at, slots.sampling, entries.sampling),
    adjustments=jax.tree.map(at, slots.adjustments, entries.adjustments),
    counts=at(slots.counts, 0),
    active=at(slots.active, entries.limits > 0),
  )
  return _place_slots(decoder, new)


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("slots",))
def move(model: ModelGraph, params: Params, slots: Slots, source: Int[Array, "M"], target: Int[Array, "M"]) -> Slots:
  """Copies slot `source[i]` to slot `target[i]`; on a mesh each part of the slots its own M / parts, counted in it.

  Sources are no targets, but for those that stay where they are.
  """
  decoder = nnx.merge(model, params)
  copy = functools.partial(copy_rows, source=source, target=target, sharding=decoder.runtime.sharding)
  cache = jax.tree.map(functools.partial(copy, axis=1), slots.cache)
  rows = jax.tree.map(functools.partial(copy, axis=0), _without_cache(slots))
  return _place_slots(decoder, rows._replace(cache=cache))


@functools.partial(jax.jit, static_argnames=("model", "settings", "rows", "kv_length"), donate_argnames=("slots",))
def decode(
  model: ModelGraph, params: Params, slots: Slots, settings: DecodeSettings, rows: int, kv_length: int
) -> tuple[Slots, NewTokens]:
  """Draws up to `settings.steps` more tokens of every active row; ends early when none is active any more.

  Not where a mesh splits the rows: no device knows then whether a row of another still runs, and after each token all
  would wait for the answer. There a call is `settings.steps` tokens, whatever ends meanwhile.

  Each token's key is its row's key folded with its place, so a row does not depend on its neighbours or its slot.
  Meanwhile new keys and values stand in a small cache of their own, so that the large one is read only, and is written
  once at the end.

  Args:
    rows: R, how many slots are decoded; the first of them, or on a mesh the first of each part. The others stay.
    kv_length: how much of each slot plain XLA reads; at least the longest text of an active row.

  Returns:
    the slots; and what was drawn in those that were decoded, in their order.
  """
  decoder = nnx.merge(model, params)
  num_shards, steps = decoder.runtime.sharding.num_shards("batch"), settings.steps
  cache, all_rows = slots.cache, _without_cache(slots)
  state = jax.tree.map(lambda x: _first(x, rows, num_shards), all_rows)
  begin = state.lengths
  eos_ids = jnp.array(settings.eos_ids)
  offsets = jnp.arange(steps)

  def step(carry: _Carry) -> _Carry:
    j, recent, drawn, state = carry
    # 1. Draw from what the step before left, with a key of the token's place alone, so that chunks change nothing.
    keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(state.keys), state.counts)
    logits = decoder.logits(state.hidden[:, None])[:, 0]
    if state.adjustments is None:
      tokens, logps = sample_token(logits, keys, state.sampling)
      ended, top = jnp.isin(tokens, eos_ids), None
    else:
      tokens, logps, ended, top = draw_adjusted(logits, keys, state.sampling, state.adjustments, state.counts)
    # 2. See who ended. Rows that had before are computed too, for shapes are fixed; what they draw does not count.
    counts = state.counts + state.active
    is_last = state.active & ended
    active = state.active & ~ended & (counts < state.limits)
    drawn = NewTokens(
      tokens=drawn.tokens.at[:, j].set(tokens),
      logprobs=drawn.logprobs.at[:, j].set(logps),
      counts=drawn.counts + state.active,
      finished=drawn.finished | is_last,
      active=active,
      top=jax.tree.map(lambda old, new: old.at[:, j].set(new), drawn.top, top),
    )
    # 3. Read the tokens. Their keys and values go to the small cache; the large one is only read.
    newest = CacheView(recent, jnp.where(offsets < j, begin[:, None] + offsets, UNSEEN))
    text = Text(cache, jnp.where(state.active, begin, 0), kv_length)
    hidden, added = decoder.extend(tokens[:, None], (begin + j)[:, None], (newest,), text=text)
    recent = recent.map(
      lambda axis, old, new: jax.lax.dynamic_update_slice_in_dim(old, new, j, axis),
      added,
      value_axis=decoder.value_axis,
    )
    # 4. Keep what is new of the active rows; the others stay as they ended, to be scored.
    state = state._replace(
      hidden=jnp.where(state.active[:, None], hidden[:, 0], state.hidden),
      counts=counts,
      active=active,
    )
    if state.adjustments is not None:
      state = state._replace(adjustments=state.adjustments.after(tokens, state.active))
    return j + 1, recent, drawn, state

  def is_running(carry: _Carry) -> jax.Array:
    j, *_, state = carry
    return j < steps if num_shards > 1 else (j < steps) & jnp.any(state.active)

  nothing = NewTokens(
    tokens=jnp.zeros((rows, steps), jnp.int32),
    logprobs=jnp.zeros((rows, steps), jnp.float32),
    counts=jnp.zeros(rows, jnp.int32),
    finished=jnp.zeros(rows, bool),
    active=state.active,
    top=None if state.adjustments is None else no_top((rows, steps), decoder.config.vocab_size),
  )
  start = (jnp.zeros((), jnp.int32), decoder.empty_cache(rows, steps), nothing, state)
  _, recent, drawn, new = jax.lax.while_loop(is_running, step, start)
  new = new._replace(lengths=begin + drawn.counts)
  # All of the small cache goes behind each row's text; beyond the row's end it is garbage that nothing reads.
  append = functools.partial(append_tokens, begin, decoder.runtime.sharding)
  cache = cache.map(append, recent, value_axis=decoder.value_axis)
  all_rows = jax.tree.map(lambda old, new: _with_first(old, new, num_shards), all_rows, new)
  return _place_slots(decoder, all_rows._replace(cache=cache)), drawn


def _first(x: Shaped[Array, "S *B"], rows: int, num_shards: int) -> Shaped[Array, "R *B"]:
  """Takes the first of the rows, of each part as many."""
  return x.reshape(num_shards, -1, *x.shape[1:])[:, : rows // num_shards].reshape(rows, *x.shape[1:])


def _with_first(x: Shaped[Array, "S *B"], new: Shaped[Array, "R *B"], num_shards: int) -> Shaped[Array, "S *B"]:
  """Puts new rows in the place of the first ones."""
  if x.shape == new.shape:
    return new
  split = x.reshape(num_shards, -1, *x.shape[1:])
  return split.at[:, : new.shape[0] // num_shards].set(new.reshape(num_shards, -1, *x.shape[1:])).reshape(x.shape)


class Suffixes(NamedTuple):
  """Tokens to be scored after the texts of rows, or after parts of them. numpy or jax.

  Several suffixes of one row, say several reference answers, are segments: each begins with the last token of the text
  that is kept, fed again so that the suffix's first token has a prediction too, and does not see the others. After a
  text of nine tokens that ends with 5, of the suffix 7 8 2 with 8 and 2 scored, and of padding:

      tokens       5 7 8 0       places   1 2
      positions    8 9 10 11     targets  8 2
      segment_ids  1 1 1 0
  """

  rows: Int[AnyArray, "R"]  # of the cache
  tokens: Int[AnyArray, "R E"]
  positions: Int[AnyArray, "R E"]  # in the text
  segment_ids: Int[AnyArray, "R E"]  # 0 is padding
  places: Int[AnyArray, "R A"]  # the place before each token that is scored
  targets: Int[AnyArray, "R A"]  # the tokens that are scored


@functools.partial(jax.jit, static_argnames=("model", "temperature", "kv_length"))
def score(
  model: ModelGraph, params: Params, cache: KVCache, suffixes: Suffixes, temperature: float, kv_length: int
) -> Float[Array, "R A"]:
  """Computes log-probabilities of suffixes after texts whose keys and values are in the cache.

  This is the teacher-forced pass of the reward without a second pass over the reasoning, and with logits at the scored
  tokens alone. The cache is read and not written, so a slot needs no room for suffixes.

  Args:
    kv_length: how much of each row plain XLA reads; at least the longest text that a suffix follows.
  """
  decoder = nnx.merge(model, params)
  text = Text(cache, jnp.full(suffixes.rows.size, kv_length), kv_length, suffixes.rows)
  hidden, _ = decoder.extend(suffixes.tokens, suffixes.positions, (), suffixes.segment_ids, text)
  hidden = jnp.take_along_axis(hidden, suffixes.places[..., None], axis=1)
  return decoder.logprobs(hidden, suffixes.targets, temperature)[0]


@functools.partial(jax.jit, donate_argnames=("slots",))
def halt(slots: Slots, which: Bool[Array, "S"]) -> Slots:
  """Ends some rows where they are."""
  return slots._replace(active=slots.active & ~which)
