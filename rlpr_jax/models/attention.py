"""Attention with grouped queries, and the rotary embedding.

`attend` is the one function; behind it stand plain XLA, which runs anywhere and alone reads a cache, and the kernels of
TPUs and GPUs for whole sequences.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlpr_jax.models import kernels
from rlpr_jax.sharding import Sharding


@dataclasses.dataclass(frozen=True)
class AttentionSettings:
  """What is the same in every layer."""

  backend: str  # xla | splash | tokamax
  scale: float  # of the scores
  softcap: float | None = None  # scores become cap * tanh(scores / cap)
  window: int | None = None  # tokens that a layer with a window sees, the newest one included
  sharding: Sharding = Sharding()


def attend(
  queries: Float[Array, "B T N H"],
  keys: Float[Array, "B T K H"],
  values: Float[Array, "B T K H"],
  segment_ids: Int[Array, "B T"],
  settings: AttentionSettings,
  windowed: Bool[Array, ""] | None = None,
  cached: tuple[Float[Array, "B K S H"], Float[Array, "B K S H"], Int[Array, "B"]] | None = None,
) -> Float[Array, "B T N H"]:
  """Softmax attention of some tokens to each other and, if given, to cached keys and values before them.

  N query heads share K key/value heads, N / K to each. The softmax runs over both parts at once, in float32.

  Args:
    segment_ids: a token sees those before it in its segment, and itself. Segments are contiguous.
    windowed: whether this layer has the window; None for no.
    cached: keys and values of earlier tokens, and how many of them a row has; one segment then, which follows them.
  """
  sharding = settings.sharding
  keys, values = _spread(keys, sharding, axis=2), _spread(values, sharding, axis=2)
  if cached is not None:
    cached = (_spread(cached[0], sharding, axis=1), _spread(cached[1], sharding, axis=1), cached[2])
    return _attend_xla(queries, keys, values, segment_ids, settings, windowed, cached)
  match settings.backend:
    case "splash":
      return kernels.splash_attention(queries, keys, values, segment_ids, settings, windowed)
    case "tokamax":
      first = first_visible(segment_ids, settings.window, windowed)
      return kernels.tokamax_attention(queries, keys, values, first, settings)
    case "xla":
      return _attend_xla(queries, keys, values, segment_ids, settings, windowed)


def _attend_xla(queries, keys, values, segment_ids, settings, windowed, cached=None) -> Float[Array, "B T N H"]:
  batch, length, heads, head_dim = queries.shape
  kv_heads = keys.shape[2]
  grouped = queries.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)

  def masked(scores: Float[Array, "B K G T S"], mask: Bool[Array, "#B T S"]) -> Float[Array, "B K G T S"]:
    scores = softcap(scores * settings.scale, settings.softcap)
    # A finite minimum: a row that sees nothing (padding) averages instead of giving NaN.
    return jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)

  places = jnp.arange(length)
  first = first_visible(segment_ids, settings.window, windowed)
  mask = (places <= places[:, None]) & (places >= first[:, :, None])
  scores = masked(jnp.einsum("btkgh,bskh->bkgts", grouped, keys, preferred_element_type=jnp.float32), mask)
  if cached is None:
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    mixed = jnp.einsum("bkgts,bskh->btkgh", weights, values)
  else:
    cached_keys, cached_values, filled = cached
    slots = jnp.arange(cached_keys.shape[2])
    mask = jnp.broadcast_to((slots < filled[:, None])[:, None], (batch, 1, slots.size))
    if windowed is not None:
      first = filled[:, None] + places + 1 - settings.window
      mask &= (slots >= first[:, :, None]) | ~windowed
    earlier = jnp.einsum("btkgh,bksh->bkgts", grouped, cached_keys, preferred_element_type=jnp.float32)
    earlier = masked(earlier, mask)
    weights = jax.nn.softmax(jnp.concatenate([earlier, scores], axis=-1), axis=-1).astype(values.dtype)
    before, among = jnp.split(weights, [cached_keys.shape[2]], axis=-1)
    mixed = jnp.einsum("bkgts,bksh->btkgh", before, cached_values)
    mixed += jnp.einsum("bkgts,bskh->btkgh", among, values)
  return mixed.reshape(batch, length, heads, head_dim)


def first_visible(
  segment_ids: Int[Array, "B T"], window: int | None, windowed: Bool[Array, ""] | None
) -> Int[Array, "B T"]:
  """The first place that each token of a packed row sees; it sees all from there to itself.

  segment_ids 1 1 2 2 2 0 (0 is padding), window 2:

    sees     first_visible    with the window
    1 . . . . .    0                0
    1 1 . . . .    0                0
    . . 1 . . .    2                2
    . . 1 1 . .    2                2
    . . 1 1 1 .    2                3
    . . . . . 1    5                5
  """
  places = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
  begins = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
  first = jax.lax.cummax(jnp.where(begins, places, 0), axis=1)
  if windowed is None:
    return first
  return jnp.where(windowed, jnp.maximum(first, places + 1 - window), first)


def softcap(x: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
  """cap * tanh(x / cap): never beyond the cap (Gemma 2)."""
  return x if cap is None else cap * jnp.tanh(x / cap)


def _spread(x: Float[Array, "..."], sharding: Sharding, axis: int) -> Float[Array, "..."]:
  """Key/value heads that every device holds, repeated so that each device reads its own queries' alone."""
  ways = sharding.ways("heads")
  if ways == sharding.ways("kv_heads"):
    return x
  times = math.lcm(x.shape[axis], ways) // x.shape[axis]
  names: list[str | None] = ["batch", None, None, None]
  names[axis] = "heads"
  return sharding.constrain(jnp.repeat(x, times, axis=axis), *names)


def rotate(
  x: Float[Array, "B T N H"], positions: Int[Array, "B T"], frequencies: Float[Array, "H/2"]
) -> Float[Array, "B T N H"]:
  """Rotary position embedding, halves layout (the first half of the head is paired with the second), in float32."""
  angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
  sin, cos = jnp.sin(angles), jnp.cos(angles)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
