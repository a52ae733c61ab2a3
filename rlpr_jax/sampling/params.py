"""One token of each row, drawn from its logits."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

_COLDEST = 1e-4


@dataclasses.dataclass(frozen=True)
class SamplingParams:
  """How tokens are drawn. Training wants the defaults beyond the temperature: truncation biases its ratios."""

  temperature: float = 1.0  # 0, or so little that logits would overflow, is greedy
  top_k: int = 0  # only the k most probable tokens; 0 for all
  top_p: float = 1.0  # only the most probable tokens that together reach p (nucleus)
  min_p: float = 0.0  # only tokens at least min_p times as probable as the most probable one


class RowParams(NamedTuple):
  """A `SamplingParams` of each row. numpy or jax."""

  temperature: Float[Array, "B"]
  top_k: Int[Array, "B"]
  top_p: Float[Array, "B"]
  min_p: Float[Array, "B"]


def stack(params: Sequence[SamplingParams]) -> RowParams:
  """The params of rows, side by side. numpy."""
  columns = zip(*map(dataclasses.astuple, params), strict=True)
  dtypes = np.float32, np.int32, np.float32, np.float32
  return RowParams(*(np.array(column, dtype) for column, dtype in zip(columns, dtypes, strict=True)))


def sample_token(
  logits: Float[Array, "B V"], keys: Key[Array, "B"], params: RowParams
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
  """A token a row and its log-probability, in nats.

  The log-probability is that of softmax(logits / temperature), whole: not of the truncated distribution, and not of the
  greedy one, where it is that of temperature 1. It is what a trainer computes for the same token.
  """
  greedy = params.temperature < _COLDEST
  logits = logits / jnp.where(greedy, 1, params.temperature)[:, None]
  truncates = (params.top_k > 0) | (params.top_p < 1) | (params.min_p > 0)
  # To sort the vocabulary is dear beside the rest: only where a row asks for it.
  left = jax.lax.cond(jnp.any(truncates & ~greedy), truncate, lambda logits, _: logits, logits, params)
  noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)  # as in jax.random.categorical
  tokens = _argmax(jnp.where(greedy[:, None], logits, left + noise))
  chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
  return tokens, chosen - jax.nn.logsumexp(logits, axis=-1)


def truncate(logits: Float[Array, "B V"], params: RowParams) -> Float[Array, "B V"]:
  """-inf for tokens that top-k, then top-p of what it left, then min-p shut out; the most probable one always stays.

  top-p keeps a token if the more probable ones together are under p (Holtzman et al. 2020); ties stay together.
  """
  # Computed once: rounded otherwise in another place, the smallest that is to stay, even the best, would not be found.
  logits = jax.lax.optimization_barrier(logits)
  size = logits.shape[-1]
  top_k, top_p, min_p = params.top_k[:, None], params.top_p[:, None], params.min_p[:, None]
  descending = -jnp.sort(-logits, axis=-1)
  last = jnp.where(top_k > 0, jnp.minimum(top_k, size), size) - 1
  kth = jnp.take_along_axis(descending, last, axis=-1)
  descending = jnp.where(descending >= kth, descending, -jnp.inf)
  shares = jax.nn.softmax(descending, axis=-1)
  before = jnp.cumsum(shares, axis=-1) - shares
  in_nucleus = (before < top_p) | (top_p >= 1)
  nucleus = jnp.min(jnp.where(in_nucleus, descending, descending[:, :1]), axis=-1, keepdims=True)
  smallest = jnp.maximum(kth, nucleus)
  smallest = jnp.maximum(smallest, jnp.where(min_p > 0, descending[:, :1] + jnp.log(min_p), -jnp.inf))
  return jnp.where(logits >= smallest, logits, -jnp.inf)


def _argmax(x: Float[Array, "B V"]) -> Int[Array, "B"]:
  """The first of the largest. As two plain reductions, which XLA vectorises on a CPU; argmax it does not."""
  size = x.shape[-1]
  first = jnp.min(jnp.where(x == jnp.max(x, axis=-1, keepdims=True), jnp.arange(size), size), axis=-1)
  return jnp.minimum(first, size - 1).astype(jnp.int32)  # NaN is nowhere the largest
