"""Log-probabilities of the tokens of packed rows: with a gradient in the update, without one for everything else.

Without one they are asked for three times: where an update's ratios start from (`old_logprobs`), by the KL term, and by
a scorer that is not the policy which samples. All three go through `compute_logprobs`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from rlpr_jax.models import ModelGraph, Params
from rlpr_jax.models.masks import predecessors
from rlpr_jax.sharding import Sharding
from rlpr_jax.training import packing
from rlpr_jax.training.packing import Tree
from rlpr_jax.types import PackedRows

Carry = TypeVar("Carry")


def row_logprobs(
  model: ModelGraph, params: Params, rows: PackedRows, temperature: float
) -> tuple[Float[Array, "R L"], Float[Array, "R L"]]:
  """Log-probability of each counted token, at its place, given those before it in its text, and the entropy there.

  Both are 0 elsewhere: only hidden states at the places before counted tokens meet the head. The first token of a text
  has no prediction; its value means nothing.
  """
  decoder = nnx.merge(model, params)
  tokens, counted = jnp.asarray(rows.tokens), jnp.asarray(rows.counted)
  hidden = decoder(tokens, rows.positions, rows.segment_ids, rows.group_ids)

  def take(x: jax.Array, places: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, places.reshape(*places.shape, *[1] * (x.ndim - 2)), axis=1)

  order = jnp.argsort(~counted, axis=1, stable=True)  # counted tokens come first
  before = take(predecessors(rows.segment_ids, rows.group_ids), order)
  found = decoder.logprobs(take(hidden, jnp.maximum(before, 0)), take(tokens, order), temperature, take(counted, order))
  places = jnp.argsort(order, axis=1)
  logps, entropy = (jnp.where(counted, take(x, places), 0.0) for x in found)
  return logps, entropy


def fold_micro_batches(
  step: Callable[[PackedRows, Carry, jax.Array], Carry],
  start: Carry,
  rows: PackedRows,
  micro_batch_rows: int,
  sharding: Sharding,
) -> Carry:
  """Folds `step(micro_batch, carry, number)` over the micro-batches in use: packed rows come first, padding last.

  How many there are depends on the data, what is compiled does not.
  """
  size, constrain = micro_batch_rows, sharding.constrain
  used = jnp.sum(jnp.any(rows.positions >= 0, axis=1))
  stacked = jax.tree.map(lambda x: constrain(x.reshape(-1, size, *x.shape[1:]), None, "batch", None), rows)
  return jax.lax.fori_loop(
    0, (used + size - 1) // size, lambda i, carry: step(jax.tree.map(lambda x: x[i], stacked), carry, i), start
  )


class LogprobProgram(NamedTuple):
  """All that `compute_logprobs` is compiled for, beside its shapes."""

  model: ModelGraph
  temperature: float  # of the distribution
  micro_batch_rows: int  # rows that are computed at once
  sharding: Sharding


@functools.partial(jax.jit, static_argnames=("program",))
def compute_logprobs(program: LogprobProgram, params: Params, rows: PackedRows) -> Float[Array, "R L"]:
  """Computes the log-probabilities of the rows' counted tokens, as `row_logprobs` does, a micro-batch at a time."""

  def step(micro_batch: PackedRows, logps: jax.Array, i: jax.Array) -> jax.Array:
    return logps.at[i].set(row_logprobs(program.model, params, micro_batch, program.temperature)[0])

  length = rows.tokens.shape[1]
  logps = jnp.zeros((rows.tokens.shape[0] // program.micro_batch_rows, program.micro_batch_rows, length))
  logps = fold_micro_batches(step, logps, rows, program.micro_batch_rows, program.sharding)
  return program.sharding.constrain(logps.reshape(-1, length), None, None)  # every process reads them all


class TextScorer(NamedTuple):
  """A policy that says how probable texts are."""

  program: LogprobProgram
  params: Params  # all of the policy's
  row_length: int  # tokens of a row; the longest text fits

  def logprobs(self, trees: Sequence[Tree], one_micro_batch: bool = False) -> list[list[np.ndarray | None]]:
    """Computes the log-probability of each counted token of each branch, given those before it.

    Args:
      one_micro_batch: only of as many branches as are packed into the first one.

    Returns:
      of each tree, for each branch float32[N], 0 where a token does not count; None for a branch that was left out.
    """
    size, pieces = self.program.micro_batch_rows, packing.arrange(trees, self.row_length)
    out: list[list[np.ndarray | None]] = [[None] * len(tree.branches) for tree in trees]
    used = size if one_micro_batch else max((piece.row for piece in pieces), default=-1) + 1
    for first in range(0, used, size):
      inside = [piece._replace(row=piece.row - first) for piece in pieces if 0 <= piece.row - first < size]
      rows = packing.lay(trees, inside, size, self.row_length)
      logps = np.asarray(compute_logprobs(self.program, self.params, rows))
      for piece in inside:
        for number, start in piece.branches:
          end = start + trees[piece.tree].branches[number].tokens.size
          out[piece.tree][number] = logps[piece.row, start:end]
    return out
