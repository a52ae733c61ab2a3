"""Calls of `decode` until no row runs any more, and all that they drew."""

from typing import NamedTuple

import jax
import numpy as np

from rlpr_jax.sampling.decode import Slots, decode


class Responses(NamedTuple):
  """Of each of S slots, of at most T tokens; beyond their ends zeros."""

  tokens: np.ndarray  # int32[S, T]
  logprobs: np.ndarray  # float32[S, T]
  counts: np.ndarray  # int32[S]
  finished: np.ndarray  # bool[S]


def draw_all(model, params, slots, settings, kv_length, limit, before=None) -> tuple[Slots, Responses]:
  """Draws until every row has ended.

  Args:
    limit: T.
    before: what was drawn in slots whose responses have begun; None: nothing.
  """
  shape = slots.counts.size, limit
  empty = Responses(
    np.zeros(shape, np.int32), np.zeros(shape, np.float32), np.zeros(shape[0], np.int32), np.zeros(shape[0], bool)
  )
  begun = np.asarray(slots.counts) > 0
  tokens, logprobs, _, finished = jax.tree.map(
    lambda new, old: np.where(begun.reshape(-1, *[1] * (new.ndim - 1)), old, new), empty, before or empty
  )
  calls = 0
  while np.any(slots.active):
    running, places = np.flatnonzero(slots.active), np.array(slots.counts)
    slots, new = decode(model, params, slots, settings, slots.counts.size, kv_length)
    new = jax.device_get(new)
    for row in running:
      here, count = slice(places[row], places[row] + new.counts[row]), new.counts[row]
      tokens[row, here], logprobs[row, here] = new.tokens[row, :count], new.logprobs[row, :count]
      finished[row] = new.finished[row]
    np.testing.assert_array_equal(new.active, slots.active)
    np.testing.assert_array_equal(np.array(slots.counts) - places, new.counts)
    calls += 1
    assert calls <= limit
  return slots, Responses(tokens, logprobs, np.array(slots.counts), finished)
