"""Attention with grouped queries, and the rotary embedding."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def attend(
  queries: Float[Array, "B T N H"],
  keys: Float[Array, "B K S H"],
  values: Float[Array, "B K S H"],
  mask: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
  """Softmax attention; N query heads share K key/value heads, N / K to each. The softmax is float32.

  A row of the mask with no True (padding) averages over everything, which is finite and read by nobody.
  """
  batch, length, heads, head_dim = queries.shape
  kv_heads = keys.shape[1]
  grouped = queries.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
  scores = jnp.einsum("btkgh,bksh->bkgts", grouped, keys, preferred_element_type=jnp.float32)
  scores = jnp.where(mask[:, None, None], scores * head_dim**-0.5, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
  mixed = jnp.einsum("bkgts,bksh->btkgh", weights, values)
  return mixed.reshape(batch, length, heads, head_dim)


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
