"""Which earlier tokens each token sees."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from rlpr_jax.types import AnyArray

UNSEEN = int(np.iinfo(np.int32).max)  # position of a cache slot that holds nothing


class Places(NamedTuple):
  """Where the tokens of packed rows stand."""

  segment_ids: Int[AnyArray, "B T"]  # a token sees those before it in its segment, and itself; segments are contiguous
  windowed: Bool[Array, ""] | None = None  # whether this layer has the window; None for no
  positions: Int[AnyArray, "B T"] | None = None  # in the text; needed for cached tokens alone

  def first_visible(self, window: int | None) -> Int[Array, "B T"]:
    """The first place that each token sees."""
    return first_visible(self.segment_ids, window, self.windowed)

  def sees(self, window: int | None) -> Bool[Array, "B T T"]:
    """Whether each token sees each of them."""
    places = jnp.arange(self.segment_ids.shape[1])
    return (places <= places[:, None]) & (places >= self.first_visible(window)[:, :, None])

  def sees_cached(self, cached: Int[Array, "B S"], window: int | None) -> Bool[Array, "B T S"]:
    """Whether each token sees each cached one: what stands before its segment begins, and nothing that stands later."""
    if self.positions is None:
      raise ValueError("positions: expected those of the tokens, where others are cached")
    places = jnp.arange(self.segment_ids.shape[1])
    begins = self.positions - (places - first_visible(self.segment_ids, None, None))  # of the segment, in the text
    mask = cached[:, None] < begins[:, :, None]
    if self.windowed is not None and window is not None:
      mask &= (cached[:, None] > self.positions[:, :, None] - window) | ~self.windowed
    return mask


def first_visible(
  segment_ids: Int[AnyArray, "B T"], window: int | None, windowed: Bool[Array, ""] | None
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

  >>> first_visible(jnp.array([[1, 1, 2, 2, 2, 0]]), 2, jnp.array(True)).tolist()
  [[0, 0, 2, 2, 3, 5]]
  """
  places = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
  begins = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
  first = jax.lax.cummax(jnp.where(begins, places, 0), axis=1)
  if windowed is None or window is None:
    return first
  return jnp.where(windowed, jnp.maximum(first, places + 1 - window), first)
