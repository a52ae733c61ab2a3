"""What two benchmarks score: the end of each text after the rest of it."""

import numpy as np

from rlpr_jax.sampling.decode import Suffixes


def last_tokens(texts: np.ndarray, count: int) -> Suffixes:
  """The last `count` tokens of each text, int32[rows, length], as what follows the row of a cache that holds the rest.

  >>> last_tokens(np.array([[5, 6, 7, 8]], np.int32), count=2).tokens.tolist()
  [[6, 7]]
  """
  rows, length = texts.shape
  places = np.broadcast_to(np.arange(count, dtype=np.int32), (rows, count))
  return Suffixes(
    rows=np.arange(rows, dtype=np.int32),
    tokens=texts[:, length - count - 1 : -1],
    positions=length - count - 1 + places,
    segment_ids=np.ones_like(places),
    places=places,
    targets=texts[:, length - count :],
  )
