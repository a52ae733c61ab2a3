"""The jitted half of a rollout: prefill, decoding in slots, scoring from the cache. Arrays in, arrays out.

    prompts -> prefill -> insert into free slots -> decode a few steps -> collect ended rows -> score from their cache
                         ^______________________________________________________________________________|

Shapes: P prompts read together, S slots, C tokens of room in a slot, T response tokens, R rows decoded or scored
together, E tokens of the suffixes after a row, A of them scored.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt32

from rlpr_jax.models import UNSEEN, CacheView, Decoder, KVCache, Params
from rlpr_jax.sampling.params import RowParams, SamplingParams, sample_token, stack
from rlpr_jax.sharding import Sharding


@dataclasses.dataclass(frozen=True)
class DecodeSettings:
  """What the compiled decoding program depends on, beside its shapes."""

  steps: int  # tokens a call, at most
  eos_ids: tuple[int, ...]


class Slots(NamedTuple):
  """Rows under way, and rows that ended and were not replaced yet. A slot's text is its prompt and its response."""

  cache: KVCache  # of the text; rows are slots, of C tokens
  lengths: Int[Array, "S"]  # tokens of text in the cache
  hidden: Float[Array, "S D"]  # at the last of them: what predicts the next
  keys: UInt32[Array, "S 2"]  # of each row's random numbers
  limits: Int[Array, "S"]  # most response tokens
  choices: RowParams  # how each row's tokens are drawn
  tokens: Int[Array, "S T"]  # response, EOS included where it was sampled
  logprobs: Float[Array, "S T"]  # of the response's tokens, at the sampling temperature
  counts: Int[Array, "S"]  # response tokens so far
  finished: Bool[Array, "S"]  # ended by EOS
  active: Bool[Array, "S"]  # still under way


@functools.partial(jax.jit, static_argnames=("model", "slots", "capacity", "limit"))
def empty_slots(model: nnx.GraphDef, params: Params, slots: int, capacity: int, limit: int) -> Slots:
  """Slots with nothing in them; `capacity` is C, `limit` T."""
  decoder: Decoder = nnx.merge(model, params)
  config, dtype = decoder.config, decoder.runtime.compute_dtype
  new = Slots(
    cache=decoder.empty_cache(slots, capacity),
    lengths=jnp.zeros(slots, jnp.int32),
    hidden=jnp.zeros((slots, config.embed_dim), dtype),
    keys=jnp.zeros((slots, 2), jnp.uint32),
    limits=jnp.zeros(slots, jnp.int32),
    choices=jax.tree.map(jnp.asarray, stack([SamplingParams()] * slots)),
    tokens=jnp.zeros((slots, limit), jnp.int32),
    logprobs=jnp.zeros((slots, limit), jnp.float32),
    counts=jnp.zeros(slots, jnp.int32),
    finished=jnp.zeros(slots, bool),
    active=jnp.zeros(slots, bool),
  )
  return _lay(decoder, new)


def _lay(decoder: Decoder, slots: Slots) -> Slots:
  """Slots as they always lie on the mesh; laid otherwise, they would have all that takes them compiled again."""
  constrain = decoder.runtime.sharding.constrain
  cache = jax.tree.map(decoder.place_cache, slots.cache)
  rows = jax.tree.map(lambda x: constrain(x, "batch", *[None] * (x.ndim - 1)), slots._replace(cache=None))
  return rows._replace(cache=cache)


@functools.partial(jax.jit, static_argnames=("model",))
def prefill(
  model: nnx.GraphDef, params: Params, tokens: Int[Array, "P N"], lengths: Int[Array, "P"]
) -> tuple[Float[Array, "P D"], KVCache]:
  """Reads each prompt once: the hidden state of its last token, and its keys and values."""
  decoder: Decoder = nnx.merge(model, params)
  hidden, cache = decoder.prefill(tokens)
  return hidden[jnp.arange(tokens.shape[0]), lengths - 1], cache


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("slots",))
def insert(
  model: nnx.GraphDef,
  params: Params,
  slots: Slots,
  hidden: Float[Array, "P D"],
  cache: KVCache,
  prompt_lengths: Int[Array, "P"],
  source: Int[Array, "I"],
  target: Int[Array, "I"],
  keys: UInt32[Array, "I 2"],
  limits: Int[Array, "I"],
  choices: RowParams,
) -> Slots:
  """Puts prefilled prompts into slots: prompt `source[i]` into slot `target[i]`, or nowhere if that is S."""
  decoder: Decoder = nnx.merge(model, params)

  def at(old: jax.Array, new: jax.Array | int | bool) -> jax.Array:
    return old.at[target].set(new, mode="drop")

  fill = functools.partial(_fill, source=source, target=target, where=decoder.runtime.sharding)
  new = slots._replace(
    cache=jax.tree.map(fill, slots.cache, cache),
    lengths=at(slots.lengths, prompt_lengths[source]),
    hidden=at(slots.hidden, hidden[source]),
    keys=at(slots.keys, keys),
    limits=at(slots.limits, limits),
    choices=jax.tree.map(at, slots.choices, choices),
    counts=at(slots.counts, 0),
    finished=at(slots.finished, False),
    active=at(slots.active, limits > 0),
  )
  return _lay(decoder, new)


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("slots",))
def move(model: nnx.GraphDef, params: Params, slots: Slots, source: Int[Array, "M"], target: Int[Array, "M"]) -> Slots:
  """Copies slot `source[i]` to slot `target[i]`; on a mesh each part of the slots its own M / parts, counted in it.

  Sources are no targets, but for those that stay where they are.
  """
  decoder: Decoder = nnx.merge(model, params)
  where = decoder.runtime.sharding

  def one(x: jax.Array, axis: int) -> jax.Array:
    def rows(x, source, target):
      def one(i, x):
        return jax.lax.dynamic_update_slice_in_dim(x, _row(x, source[i], axis), target[i], axis)

      return jax.lax.fori_loop(0, source.size, one, x)

    axes = CACHE if axis else ("batch", *[None] * (x.ndim - 1))
    return _on_each_part(rows, where, (x, source, target), (axes, ROWS, ROWS))

  cache = jax.tree.map(functools.partial(one, axis=1), slots.cache)
  rows = jax.tree.map(functools.partial(one, axis=0), slots._replace(cache=None))
  return _lay(decoder, rows._replace(cache=cache))


@functools.partial(jax.jit, static_argnames=("model", "settings", "rows", "kv_length"), donate_argnames=("slots",))
def decode(
  model: nnx.GraphDef, params: Params, slots: Slots, settings: DecodeSettings, rows: int, kv_length: int
) -> Slots:
  """Up to `settings.steps` more tokens of every active row; ends early when none is active any more.

  Each token's key is its row's key folded with its place, so a row does not depend on its neighbours or its slot.
  Meanwhile new keys and values stand in a small cache of their own, so that the large one is read only, and is written
  once at the end.

  Args:
    rows: R, how many slots are decoded; the first of them, or on a mesh the first of each part. The others are left.
    kv_length: how much of each slot is read; at least the longest text of an active row.
  """
  decoder: Decoder = nnx.merge(model, params)
  num_shards, steps = decoder.runtime.sharding.num_shards("batch"), settings.steps
  cache, whole = slots.cache, slots._replace(cache=None)
  state = jax.tree.map(lambda x: _first(x, rows, num_shards), whole)
  begin, numbers, eos_ids = state.lengths, jnp.arange(rows), jnp.array(settings.eos_ids)
  filled, offsets = jnp.arange(kv_length), jnp.arange(steps)
  text = CacheView(cache, jnp.where(filled < begin[:, None], filled, UNSEEN))

  def step(carry):
    j, recent, state = carry
    keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(state.keys), state.counts)
    tokens, logps = sample_token(decoder.logits(state.hidden[:, None])[:, 0], keys, state.choices)
    places = jnp.where(state.active, state.counts, state.tokens.shape[1])  # beyond the end: not written
    counts = state.counts + state.active
    finished = state.finished | (state.active & jnp.isin(tokens, eos_ids))
    newest = CacheView(recent, jnp.where(offsets < j, begin[:, None] + offsets, UNSEEN))
    hidden, added = decoder.extend(tokens[:, None], (begin + j)[:, None], (text, newest))
    recent = recent.map(lambda axis, old, new: jax.lax.dynamic_update_slice_in_dim(old, new, j, axis), added)
    state = state._replace(
      hidden=jnp.where(state.active[:, None], hidden[:, 0], state.hidden),
      tokens=state.tokens.at[numbers, places].set(tokens, mode="drop"),
      logprobs=state.logprobs.at[numbers, places].set(logps, mode="drop"),
      counts=counts,
      finished=finished,
      active=state.active & ~finished & (counts < state.limits),
    )
    return j + 1, recent, state

  def under_way(carry):
    j, _, state = carry
    return (j < steps) & jnp.any(state.active)

  start = (jnp.zeros((), jnp.int32), decoder.empty_cache(rows, steps), state)
  _, recent, new = jax.lax.while_loop(under_way, step, start)
  new = new._replace(lengths=begin + new.counts - state.counts)
  # All of the small cache goes behind each row's text; beyond the row's end it is garbage that nothing reads.
  cache = cache.map(functools.partial(_append, begin, decoder.runtime.sharding), recent)
  whole = jax.tree.map(lambda old, new: _with_first(old, new, num_shards), whole, new)
  return _lay(decoder, whole._replace(cache=cache))


def _first(x: Shaped[Array, "S *B"], rows: int, num_shards: int) -> Shaped[Array, "R *B"]:
  """The first of the rows, of each part as many."""
  return x.reshape(num_shards, -1, *x.shape[1:])[:, : rows // num_shards].reshape(rows, *x.shape[1:])


def _with_first(x: Shaped[Array, "S *B"], new: Shaped[Array, "R *B"], num_shards: int) -> Shaped[Array, "S *B"]:
  """The same with other first rows."""
  if x.shape == new.shape:
    return new
  split = x.reshape(num_shards, -1, *x.shape[1:])
  return split.at[:, : new.shape[0] // num_shards].set(new.reshape(num_shards, -1, *x.shape[1:])).reshape(x.shape)


# Rows of a cache are written one by one, unrolled, for each such write happens in place. A scatter would have the whole
# cache copied first, on every platform, and the TPU compiler of libtpu 0.0.42 fails on a loop.
CACHE, ROWS, EVERYWHERE = ("layers", "batch", "kv_heads", None, None), ("batch",), (None,)


def _append(
  begin: Int[Array, "R"], where: Sharding, axis: int, old: Shaped[Array, "L S K *C"], new: Shaped[Array, "L R K *N"]
) -> Shaped[Array, "L S K *C"]:
  """Writes N tokens into the first R / parts rows of each part of a cache, from their own places on; `axis`: tokens."""

  def rows(old, new, begin):
    for row in range(begin.size):
      place = [0, row, 0, 0, 0]
      place[axis] = begin[row]
      old = jax.lax.dynamic_update_slice(old, new[:, row : row + 1], place)
    return old

  return _on_each_part(rows, where, (old, new, begin), (CACHE, CACHE, ROWS))


def _fill(
  old: Shaped[Array, "L S K *C"],
  new: Shaped[Array, "L P K *N"],
  source: Int[Array, "I"],
  target: Int[Array, "I"],
  where: Sharding,
) -> Shaped[Array, "L S K *C"]:
  """Writes rows of another cache to the beginning of rows of this one, or nowhere where the target is S."""

  def rows(old, new, source, target):
    total, others = old.shape[1], new.shape[1]
    parts = where.spec(ROWS)[0] if where.mesh else None
    part = jax.lax.axis_index(parts) if parts else 0
    for i in range(source.size):
      row = _row(new, jnp.clip(source[i] - part * others, 0, others - 1), axis=1)
      if parts:  # from the device that has it
        row = jax.lax.psum(jnp.where(source[i] // others == part, row, 0), parts)
      place = (0, jnp.clip(target[i] - part * total, 0, total - 1), 0, 0, 0)
      row = jnp.where(target[i] // total == part, row, jax.lax.dynamic_slice(old, place, row.shape))
      old = jax.lax.dynamic_update_slice(old, row, place)
    return old

  return _on_each_part(rows, where, (old, new, source, target), (CACHE, CACHE, EVERYWHERE, EVERYWHERE))


def _row(x: Shaped[Array, "..."], row: Int[Array, ""], axis: int) -> Shaped[Array, "..."]:
  return jax.lax.dynamic_slice_in_dim(x, row, 1, axis)


def _on_each_part(
  function: Callable[..., jax.Array],
  where: Sharding,
  operands: Sequence[jax.Array],
  axes: Sequence[Sequence[str | None]],
) -> jax.Array:
  """`function` on each device's own parts of the operands, whose axes are named so; the result is like the first."""
  if where.mesh is None:
    return function(*operands)
  specs = tuple(map(where.spec, axes))
  return jax.shard_map(function, mesh=where.mesh, in_specs=specs, out_specs=specs[0])(*operands)


class Suffixes(NamedTuple):
  """What is to be scored after a row's text, or after a part of it. numpy or jax.

  Several suffixes of one row, say several reference answers, are segments: each begins with the last token of the text
  that is kept, fed again so that the suffix's first token has a prediction too, and does not see the others.
  """

  tokens: Int[Array, "R E"]
  positions: Int[Array, "R E"]  # in the text
  segment_ids: Int[Array, "R E"]  # 0 is padding
  index: Int[Array, "R A"]  # the place before each token that is scored
  targets: Int[Array, "R A"]  # the tokens that are scored


@functools.partial(jax.jit, static_argnames=("model", "temperature", "kv_length"))
def score(
  model: nnx.GraphDef,
  params: Params,
  cache: KVCache,
  rows: Int[Array, "R"],
  suffixes: Suffixes,
  temperature: float,
  kv_length: int,
) -> Float[Array, "R A"]:
  """Log-probabilities of suffixes after texts whose keys and values are in the cache.

  This is the teacher-forced pass of the reward without a second pass over the reasoning, and with logits at the scored
  tokens alone. The cache is read and not written, so a slot needs no room for suffixes.

  Args:
    rows: of the cache.
    kv_length: how much of each row is read; at least the longest text that a suffix follows.
  """
  decoder: Decoder = nnx.merge(model, params)
  text = CacheView(cache, jnp.broadcast_to(jnp.arange(kv_length), (rows.size, kv_length)), rows)
  hidden, _ = decoder.extend(suffixes.tokens, suffixes.positions, (text,), suffixes.segment_ids)
  hidden = jnp.take_along_axis(hidden, suffixes.index[..., None], axis=1)
  return decoder.logprobs(hidden, suffixes.targets, temperature)[0]


@functools.partial(jax.jit, donate_argnames=("slots",))
def halt(slots: Slots, which: Bool[Array, "S"]) -> Slots:
  """Ends some rows where they are."""
  return slots._replace(active=slots.active & ~which)


@jax.jit
def collect(slots: Slots, rows: Int[Array, "R"]) -> tuple[Int[Array, "R T"], Float[Array, "R T"]]:
  """Tokens and their log-probabilities of some slots."""
  return slots.tokens[rows], slots.logprobs[rows]
