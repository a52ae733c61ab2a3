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
from rlpr_jax.sharding import Sharding
from rlpr_jax.training import packing
from rlpr_jax.training.packing import Segment
from rlpr_jax.types import PackedRows

Carry = TypeVar("Carry")


def row_logprobs(
  model: ModelGraph, params: Params, rows: PackedRows, temperature: float
) -> tuple[Float[Array, "R L"], Float[Array, "R L"]]:
  """Log-probability of the token at each place given those before it in its segment, and the entropy there.

  Place 0 and the first token of a segment have no prediction; their value means nothing and no mask covers them.
  """
  decoder = nnx.merge(model, params)
  tokens = jnp.asarray(rows.tokens)
  hidden = decoder(tokens, rows.positions, rows.segment_ids)
  logps, entropy = decoder.logprobs(hidden[:, :-1], tokens[:, 1:], temperature)
  shift = ((0, 0), (1, 0))  # what is predicted at place t - 1 is the token at place t
  return jnp.pad(logps, shift), jnp.pad(entropy, shift)


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
  used = jnp.sum(jnp.any(rows.segment_ids > 0, axis=1))
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
  """Computes the log-probabilities of the rows' tokens, as `row_logprobs` does, a micro-batch at a time."""

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

  def logprobs(self, segments: Sequence[Segment], one_micro_batch: bool = False) -> list[np.ndarray]:
    """Computes the log-probability of each token of each text, given those before it.

    Args:
      one_micro_batch: only as many texts as are packed into the first one; of the others nothing.

    Returns:
      float32[N] for each text, float32[0] for one that was left out; the first number of each means nothing.
    """
    size = self.program.micro_batch_rows
    places = packing.first_fit([segment.tokens.size for segment in segments], self.row_length)
    used = places[:, 0].max(initial=-1) + 1
    out = [np.zeros(0, np.float32)] * len(segments)
    for first in range(0, size if one_micro_batch else used, size):
      inside = np.flatnonzero((places[:, 0] >= first) & (places[:, 0] < first + size)).tolist()
      rows = packing.pack_rows([segments[i] for i in inside], places[inside] - [first, 0], size, self.row_length)
      logps = np.asarray(compute_logprobs(self.program, self.params, rows))
      for i in inside:
        row, start = places[i] - [first, 0]
        out[i] = logps[row, start : start + segments[i].tokens.size]
    return out
