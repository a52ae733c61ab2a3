"""Attention with grouped queries, and the rotary embedding."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def attend(
  queries: Float[Array, "B T N H"],
  keys: Float[Array, "B T K H"],
  values: Float[Array, "B T K H"],
  mask: Bool[Array, "#B T T"],
  cached: tuple[Float[Array, "B K S H"], Float[Array, "B K S H"], Bool[Array, "B S"]] | None = None,
) -> Float[Array, "B T N H"]:
  """Softmax attention of some tokens to each other and, if given, to cached keys and values before them.

  N query heads share K key/value heads, N / K to each. The softmax runs over both parts at once, in float32.

  Args:
    mask: True where a query may see a key.
    cached: keys and values of earlier tokens, and which slots of a row hold one; every query sees those.
  """
  batch, length, heads, head_dim = queries.shape
  kv_heads = keys.shape[2]
  grouped = queries.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
  scores = jnp.einsum("btkgh,bskh->bkgts", grouped, keys, preferred_element_type=jnp.float32)
  scores = _masked(scores, mask[:, None, None], head_dim)
  if cached is None:
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    mixed = jnp.einsum("bkgts,bskh->btkgh", weights, values)
  else:
    cached_keys, cached_values, filled = cached
    earlier = jnp.einsum("btkgh,bksh->bkgts", grouped, cached_keys, preferred_element_type=jnp.float32)
    earlier = _masked(earlier, filled[:, None, None, None], head_dim)
    weights = jax.nn.softmax(jnp.concatenate([earlier, scores], axis=-1), axis=-1).astype(values.dtype)
    before, among = jnp.split(weights, [cached_keys.shape[2]], axis=-1)
    mixed = jnp.einsum("bkgts,bksh->btkgh", before, cached_values)
    mixed += jnp.einsum("bkgts,bskh->btkgh", among, values)
  return mixed.reshape(batch, length, heads, head_dim)


def _masked(scores: Float[Array, "B K G T S"], mask: Bool[Array, "..."], head_dim: int) -> Float[Array, "B K G T S"]:
  # A finite minimum: a row that sees nothing (padding) averages instead of giving NaN.
  return jnp.where(mask, scores * head_dim**-0.5, jnp.finfo(jnp.float32).min)


def segment_mask(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
  """Causal within each segment of a packed row.

  segment_ids 1 1 2 2 0 (0 is padding):
    1 . . . .
    1 1 . . .
    . . 1 . .
    . . 1 1 .
    . . . . 1
  """
  causal = jnp.tril(jnp.ones((segment_ids.shape[1],) * 2, bool))
  return causal & (segment_ids[:, :, None] == segment_ids[:, None, :])


def rotate(x: Float[Array, "B T N H"], positions: Int[Array, "B T"], theta: float) -> Float[Array, "B T N H"]:
  """Rotary position embedding, halves layout (the first half of the head is paired with the second), in float32."""
  half = x.shape[-1] // 2
  frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
  sin, cos = jnp.sin(angles), jnp.cos(angles)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
