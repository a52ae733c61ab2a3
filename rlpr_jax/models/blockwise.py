"""Attention by blocks in plain XLA, for whole packed rows on the CPU.

The two loops of FlashAttention (2205.14135) over blocks of queries and of keys: no [T, T] array is held, forwards or
backwards, and blocks of keys that no query of a block sees are left out. What a block takes fits in a core's cache.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from rlpr_jax.models.kernels import AttentionSettings, each_device, pad
from rlpr_jax.models.masks import Places, Spans, visible_blocks

BLOCK = 64
RESIDUALS = "attention"  # name of what its gradient needs beside its operands, for `jax.checkpoint`


class _Blocks(NamedTuple):
  """Of the M blocks of queries of all rows: what each sees."""

  starts: Int[Array, "M"]  # its first place in its row
  counts: Int[Array, "M"]  # blocks of keys in which something is seen
  keys: Int[Array, "M A"]  # their numbers among the blocks of all rows come first
  first: Int[Array, "M S"]  # first place that each token sees
  until: Int[Array, "M S"]  # place from which on no token sees it


class _Rule(NamedTuple):
  """How scores are made of products."""

  scale: float
  softcap: float | None


def blockwise_attention(
  queries: Float[Array, "B T N H"],
  keys: Float[Array, "B T K H"],
  values: Float[Array, "B T K H"],
  places: Places,
  settings: AttentionSettings,
) -> Float[Array, "B T N H"]:
  """As `attention.attend`, of whole rows; T is padded to whole blocks.

  >>> x = jnp.array([[[[1.0, 0.0]], [[0.0, 2.0]]]])  # one row of two tokens, one head
  >>> settings = AttentionSettings(backend="blockwise", scale=0.0)
  >>> blockwise_attention(x, x, x, Places(jnp.ones((1, 2), int)), settings)[0, :, 0].tolist()
  [[1.0, 0.0], [0.5, 1.0]]
  """

  def attend(
    queries: jax.Array, keys: jax.Array, values: jax.Array, ids: tuple[jax.Array, ...], windowed: jax.Array | None
  ) -> jax.Array:
    rows, length, kv_heads = queries.shape[0], queries.shape[1], keys.shape[2]
    queries, keys, values = (_split(pad(x, BLOCK), kv_heads) for x in (queries, keys, values))
    padded = [pad(x, BLOCK, -1) for x in ids]  # a segment and a group of its own
    whole = Places(padded[0], windowed, group_ids=padded[1] if len(padded) > 1 else None)
    mixed = _mix(_Rule(settings.scale, settings.softcap), queries, keys, values, _find_blocks(whole, settings.window))
    return _join(mixed, rows)[:, :length]

  ids = [jnp.asarray(x) for x in (places.segment_ids, places.group_ids) if x is not None]
  return each_device(attend, settings, queries, keys, values, ids, places.windowed)


def _find_blocks(places: Places, window: int | None) -> _Blocks:
  spans = Spans.of(places.segment_ids, places.group_ids)
  rows, length = spans.group.shape
  count = length // BLOCK

  def visible(window: int | None) -> Bool[Array, "B A A"]:
    return jax.vmap(lambda spans: visible_blocks(spans, window, BLOCK))(spans)

  runs = visible(None)
  if places.windowed is not None and window is not None:
    runs = jnp.where(places.windowed, visible(window), runs)
  order = jnp.argsort(~runs, axis=-1, stable=True) + count * jnp.arange(rows)[:, None, None]
  until = places.visible_until()
  return _Blocks(
    starts=jnp.tile(BLOCK * jnp.arange(count), rows),
    counts=jnp.sum(runs, axis=-1).reshape(-1),
    keys=order.reshape(-1, count),
    first=places.first_visible(window).reshape(-1, BLOCK),
    until=(jnp.full_like(spans.group, length) if until is None else until).reshape(-1, BLOCK),
  )


def _split(x: Float[Array, "B T N H"], kv_heads: int) -> Float[Array, "M K GS H"]:
  """Blocks of all rows; in each, for each head of keys and values, the G heads that share it one below the other."""
  rows, length, heads, size = x.shape
  x = x.reshape(rows, length // BLOCK, BLOCK, kv_heads, heads // kv_heads, size)
  return x.transpose(0, 1, 3, 4, 2, 5).reshape(-1, kv_heads, heads // kv_heads * BLOCK, size)


def _join(x: Float[Array, "M K GS H"], rows: int) -> Float[Array, "B T N H"]:
  blocks, kv_heads, _, size = x.shape
  x = x.reshape(rows, blocks // rows, kv_heads, -1, BLOCK, size)
  return x.transpose(0, 1, 4, 2, 3, 5).reshape(rows, blocks // rows * BLOCK, -1, size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mix(
  rule: _Rule,
  queries: Float[Array, "M K GS H"],
  keys: Float[Array, "M K S H"],
  values: Float[Array, "M K S H"],
  blocks: _Blocks,
) -> Float[Array, "M K GS H"]:
  return _forward(rule, queries, keys, values, blocks)[0]


def _forward(rule: _Rule, *operands: Any) -> tuple[jax.Array, Any]:
  queries, keys, values, blocks = operands

  def mix_block(i: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The softmax over one block of keys after the other: what was there is scaled to the largest score so far."""

    def add(n: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
      largest, total, mixed = carry
      j = blocks.keys[i, n]
      scores = _scores(rule, queries[i], keys[j], _sees(blocks, i, j))[0]
      new = jnp.maximum(largest, jnp.max(scores, axis=-1))
      weights, kept = jnp.exp(scores - new[..., None]), jnp.exp(largest - new)
      part = jnp.matmul(weights.astype(values.dtype), values[j], preferred_element_type=jnp.float32)
      return new, total * kept + jnp.sum(weights, axis=-1), mixed * kept[..., None] + part

    shape = queries.shape[1:]
    start = jnp.full(shape[:2], jnp.finfo(jnp.float32).min), jnp.zeros(shape[:2], jnp.float32)
    largest, total, mixed = jax.lax.fori_loop(0, blocks.counts[i], add, (*start, jnp.zeros(shape, jnp.float32)))
    return (mixed / total[..., None]).astype(queries.dtype), largest + jnp.log(total)

  found = jax.lax.map(mix_block, jnp.arange(len(queries)))
  mixed, logsums = (checkpoint_name(x, RESIDUALS) for x in found)
  return mixed, (*operands, mixed, logsums)


def _backward(rule: _Rule, residuals: Any, gradient: jax.Array) -> tuple[Any, ...]:
  queries, keys, values, blocks, mixed, logsums = residuals

  def of_block(carry: tuple[jax.Array, jax.Array], i: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    wide = gradient[i].astype(jnp.float32)
    mean = jnp.sum(wide * mixed[i].astype(jnp.float32), axis=-1)  # of the weights' gradient

    def add(n: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
      of_queries, of_keys, of_values = carry
      j = blocks.keys[i, n]
      scores, slope = _scores(rule, queries[i], keys[j], _sees(blocks, i, j))
      weights = jnp.exp(scores - logsums[i][..., None])
      of_weights = jnp.einsum("kqh,ksh->kqs", gradient[i], values[j], preferred_element_type=jnp.float32)
      of_scores = (weights * (of_weights - mean[..., None]) * slope).astype(queries.dtype)
      of_queries += jnp.matmul(of_scores, keys[j], preferred_element_type=jnp.float32)
      return (
        of_queries,
        of_keys.at[j].add(_sum_queries(of_scores, queries[i])),
        of_values.at[j].add(_sum_queries(weights.astype(gradient.dtype), gradient[i])),
      )

    start = jnp.zeros(queries.shape[1:], jnp.float32)
    of_queries, *rest = jax.lax.fori_loop(0, blocks.counts[i], add, (start, *carry))
    return (rest[0], rest[1]), of_queries

  zeros = jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32)
  (of_keys, of_values), of_queries = jax.lax.scan(of_block, zeros, jnp.arange(len(queries)))
  return of_queries.astype(queries.dtype), of_keys.astype(keys.dtype), of_values.astype(values.dtype), None


_mix.defvjp(_forward, _backward)


def _scores(
  rule: _Rule, queries: Float[Array, "K GS H"], keys: Float[Array, "K S H"], sees: Bool[Array, "S S"]
) -> tuple[Float[Array, "K GS S"], Float[Array, "K GS S"] | float]:
  """Scores of a block of queries and one of keys, and their slope over the products of both."""
  scores = jnp.einsum("kqh,ksh->kqs", queries, keys, preferred_element_type=jnp.float32) * rule.scale
  slope: jax.Array | float = rule.scale
  if rule.softcap is not None:
    bent = jnp.tanh(scores / rule.softcap)
    scores, slope = rule.softcap * bent, rule.scale * (1 - bent**2)
  heads, _, size = scores.shape
  scores = jnp.where(sees, scores.reshape(heads, -1, size, size), jnp.finfo(jnp.float32).min)
  return scores.reshape(heads, -1, size), slope


def _sees(blocks: _Blocks, i: jax.Array, j: jax.Array) -> Bool[Array, "S S"]:
  """Whether each query of block i sees each key of block j, of the same row."""
  query, key = (blocks.starts[block] + jnp.arange(BLOCK) for block in (i, j))
  seen = (key <= query[:, None]) & (key >= blocks.first[i][:, None])
  return seen & (query[:, None] < blocks.until[j])


def _sum_queries(of_keys: Float[Array, "K GS S"], queries: Float[Array, "K GS H"]) -> Float[Array, "K S H"]:
  return jnp.einsum("kqs,kqh->ksh", of_keys, queries, preferred_element_type=jnp.float32)
