"""Attention with grouped queries, and the rotary embedding.

`attend` is the one function; behind it stand plain XLA, which runs anywhere and alone reads a cache, and for whole
sequences blocks on the CPU and the kernels of TPUs and GPUs.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rlpr_jax.models import blockwise, kernels
from rlpr_jax.models.kernels import AttentionSettings
from rlpr_jax.models.masks import Places
from rlpr_jax.models.ragged import Mixed
from rlpr_jax.sharding import Sharding
from rlpr_jax.types import AnyArray

ALL_AT_ONCE = 128  # tokens of a row up to which the CPU takes all scores at once: blocks gain nothing there


class Cached(NamedTuple):
  """Keys and values of earlier tokens, in any order."""

  keys: Float[Array, "B K H S"]
  values: Float[Array, "B K S H"]
  positions: Int[Array, "B S"]  # of the token in each slot; masks.UNSEEN where none is


def attend(
  queries: Float[Array, "B T N H"],
  keys: Float[Array, "B T K H"],
  values: Float[Array, "B T K H"],
  places: Places,
  settings: AttentionSettings,
  cached: Sequence[Cached] = (),
  mixed: Mixed | None = None,
) -> Float[Array, "B T N H"]:
  """Softmax attention of some tokens to each other and, if given, to cached keys and values of tokens before them.

  N query heads share K key/value heads, N / K to each. One softmax runs over all parts, in float32.

  Args:
    cached: a segment sees what stands there before the position of its first token, and nothing that stands later.
    mixed: what a kernel made of more of them, as `ragged.ragged_attention` returns it.

  >>> x = jnp.array([[[[1.0, 0.0]], [[0.0, 2.0]]]])  # one row of two tokens, one head
  >>> settings = AttentionSettings(backend="xla", scale=0.0)  # each sees itself and what is before it, all alike
  >>> attend(x, x, x, Places(jnp.ones((1, 2), int)), settings)[0, :, 0].tolist()
  [[1.0, 0.0], [0.5, 1.0]]
  """
  sharding = settings.sharding
  keys, values = _spread(keys, sharding, axis=2), _spread(values, sharding, axis=2)
  if cached or mixed is not None:
    cached = [
      Cached(_spread(part.keys, sharding, axis=1), _spread(part.values, sharding, axis=1), part.positions)
      for part in cached
    ]
    return _attend_xla(queries, keys, values, places, settings, cached, mixed)
  match settings.backend:
    case "blockwise" if queries.shape[1] > ALL_AT_ONCE:
      return blockwise.blockwise_attention(queries, keys, values, places, settings)
    case "splash":
      return kernels.splash_attention(queries, keys, values, places, settings)
    case "tokamax" | "tokamax_or_xla":
      y = kernels.tokamax_attention(queries, keys, values, places, settings)
      if y is not None:
        return y
  return _attend_xla(queries, keys, values, places, settings)


def _attend_xla(
  queries: Float[Array, "B T N H"],
  keys: Float[Array, "B T K H"],
  values: Float[Array, "B T K H"],
  places: Places,
  settings: AttentionSettings,
  cached: Sequence[Cached] = (),
  mixed: Mixed | None = None,
) -> Float[Array, "B T N H"]:
  batch, length, heads, head_dim = queries.shape
  kv_heads = keys.shape[2]
  # One matrix a key/value head: the queries of its group, one below the other.
  grouped = queries.reshape(batch, length, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
  grouped = grouped.reshape(batch, kv_heads, -1, head_dim)

  def score(keys: Float[Array, "B K H S"], mask: Bool[Array, "B T S"]) -> Float[Array, "B K GT S"]:
    scores = jnp.matmul(grouped, keys, preferred_element_type=jnp.float32) * settings.scale
    scores = softcap(scores, settings.softcap).reshape(batch, kv_heads, -1, length, keys.shape[3])
    # A finite minimum: a row that sees nothing (padding) averages instead of giving NaN.
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    return scores.reshape(batch, kv_heads, -1, keys.shape[3])

  scores = [score(keys.transpose(0, 2, 3, 1), places.sees(settings.window))]
  scores += [score(part.keys, places.sees_cached(part.positions, settings.window)) for part in cached]
  if mixed is not None:  # one more token, so to say: its score is the log-sum-exp, its value what was mixed
    scores.append(mixed.lse[..., None])
  ends = np.cumsum([part.shape[3] for part in scores])
  weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(values.dtype)
  shares = jnp.split(weights, ends[:-1], axis=-1)
  y = jnp.matmul(shares[0], values.swapaxes(1, 2))
  for share, part in zip(shares[1:], cached, strict=False):
    y += jnp.matmul(share, part.values)
  if mixed is not None:
    y += shares[-1] * mixed.values.astype(values.dtype)
  y = y.reshape(batch, kv_heads, -1, length, head_dim).transpose(0, 3, 1, 2, 4)
  return y.reshape(batch, length, heads, head_dim)


def softcap(x: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
  """cap * tanh(x / cap): never beyond the cap (Gemma 2).

  >>> softcap(jnp.array([1.0, 1000.0]), 30.0).tolist()
  [1.0, 30.0]
  """
  return x if cap is None else cap * jnp.tanh(x / cap)


def _spread(x: Float[Array, "..."], sharding: Sharding, axis: int) -> Float[Array, "..."]:
  """Key/value heads that every device holds, repeated so that each device reads its own queries' alone."""
  num_shards = sharding.num_shards("heads")
  if num_shards == sharding.num_shards("kv_heads"):
    return x
  times = math.lcm(x.shape[axis], num_shards) // x.shape[axis]
  names: list[str | None] = ["batch", None, None, None]
  names[axis] = "heads"
  return sharding.constrain(jnp.repeat(x, times, axis=axis), *names)


def rotate(
  x: Float[Array, "B T N H"],
  positions: Int[AnyArray, "B T"],
  frequencies: Float[Array, "..."],
  factor: Float[Array, ""] | float = 1.0,
) -> Float[Array, "B T N H"]:
  """Rotary position embedding, halves layout (the first half of the head is paired with the second), in float32.

  Args:
    frequencies: of H / 2 pairs; with fewer, the last dimensions of a head stay as they are.
    factor: by which what is rotated is multiplied too.

  >>> quarter = jnp.array([jnp.pi / 2])  # a quarter turn a position
  >>> rotate(jnp.array([[[[1.0, 0.0]], [[1.0, 0.0]]]]), jnp.array([[0, 1]]), quarter).round(3)[0, :, 0].tolist()
  [[1.0, 0.0], [0.0, 1.0]]
  """
  angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
  sin, cos = jnp.sin(angles) * factor, jnp.cos(angles) * factor
  rotated, rest = x[..., : 2 * frequencies.size], x[..., 2 * frequencies.size :]
  first, second = jnp.split(rotated.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
  return jnp.concatenate([rotated, rest], axis=-1) if rest.size else rotated
