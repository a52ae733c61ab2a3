"""One token of each row, drawn from its logits."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from rlpr_jax.types import AnyArray

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

  temperature: Float[AnyArray, "B"]
  top_k: Int[AnyArray, "B"]
  top_p: Float[AnyArray, "B"]
  min_p: Float[AnyArray, "B"]


def stack(rows: Sequence[SamplingParams]) -> RowParams:
  """Each row's params, side by side. numpy.

  >>> stack([SamplingParams(), SamplingParams(top_k=5)]).top_k
  array([0, 5], dtype=int32)
  """
  columns = zip(*map(dataclasses.astuple, rows), strict=True)
  dtypes = np.float32, np.int32, np.float32, np.float32
  return RowParams(*(np.array(column, dtype) for column, dtype in zip(columns, dtypes, strict=True)))


def at_temperature(logits: Float[Array, "B V"], sampling: RowParams) -> tuple[Float[Array, "B V"], Bool[Array, "B"]]:
  """Divides logits by each row's temperature, and says which rows are greedy: theirs stay as they are."""
  greedy = jnp.asarray(sampling.temperature) < _COLDEST
  return logits / jnp.where(greedy, 1, sampling.temperature)[:, None], greedy


def sample_token(
  logits: Float[Array, "B V"], keys: Key[Array, "B"], sampling: RowParams
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
  """Draws a token a row; returns it and its log-probability, in nats.

  The log-probability is that of softmax(logits / temperature), whole: not of the truncated distribution, and not of the
  greedy one, where it is that of temperature 1. It is what a trainer computes for the same token.

  >>> key, greedy = jax.random.split(jax.random.key(0), 1), stack([SamplingParams(temperature=0)])
  >>> token, logprob = sample_token(jnp.log(jnp.array([[0.2, 0.5, 0.3]])), key, greedy)
  >>> token.item(), round(float(jnp.exp(logprob[0])), 3)
  (1, 0.5)
  """
  logits, greedy = at_temperature(logits, sampling)
  truncates = (sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0)
  # To sort the vocabulary is dear beside all else: only where a row asks for it.
  truncated = jax.lax.cond(jnp.any(truncates & ~greedy), truncate, lambda logits, _: logits, logits, sampling)
  noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)  # as in jax.random.categorical
  tokens = _argmax(jnp.where(greedy[:, None], logits, truncated + noise))
  chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
  return tokens, chosen - jax.nn.logsumexp(logits, axis=-1)


def truncate(logits: Float[Array, "B V"], sampling: RowParams) -> Float[Array, "B V"]:
  """Puts -inf where top-k, then top-p of what it left, then min-p shut out; the most probable token always stays.

  top-p keeps a token if the more probable ones together are under p (Holtzman et al. 2020); ties stay together.

  >>> jnp.isfinite(truncate(jnp.log(jnp.array([[0.2, 0.5, 0.3]])), stack([SamplingParams(top_p=0.6)]))).tolist()
  [[False, True, True]]
  """
  # Computed once: rounded otherwise in another place, the smallest that is to stay, even the best, would not be found.
  logits = jax.lax.optimization_barrier(logits)
  size = logits.shape[-1]
  top_k = sampling.top_k[:, None]
  top_p = sampling.top_p[:, None]
  min_p = sampling.min_p[:, None]
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
