"""One token of each row, drawn from its logits."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


@dataclasses.dataclass(frozen=True)
class Choice:
  """How tokens are drawn. Training wants the defaults beyond the temperature: truncation biases its ratios."""

  temperature: float = 1.0  # 0 is greedy
  top_k: int = 0  # only the k most probable tokens; 0 for all
  top_p: float = 1.0  # only the most probable tokens that together reach p (nucleus)
  min_p: float = 0.0  # only tokens at least min_p times as probable as the most probable one

  @property
  def truncates(self) -> bool:
    return bool(self.top_k) or self.top_p < 1 or self.min_p > 0


def choose(
  logits: Float[Array, "B V"], keys: Key[Array, "B"], choice: Choice
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
  """A token a row and its log-probability, in nats.

  The log-probability is that of softmax(logits / temperature), whole: not of the truncated distribution, and not of the
  greedy one, where it is that of temperature 1. It is what a trainer computes for the same token.
  """
  logits = logits / (choice.temperature or 1.0)
  if choice.temperature:  # the Gumbel trick, as in jax.random.categorical
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    tokens = _argmax((truncate(logits, choice) if choice.truncates else logits) + noise)
  else:
    tokens = _argmax(logits)
  chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
  return tokens, chosen - jax.nn.logsumexp(logits, axis=-1)


def truncate(logits: Float[Array, "B V"], choice: Choice) -> Float[Array, "B V"]:
  """-inf for tokens that top-k, then top-p of what it left, then min-p shut out; the most probable one always stays.

  top-p keeps a token if the more probable ones together are under p (Holtzman et al. 2020); ties stay together.
  """
  # Computed once: rounded otherwise in another place, the smallest that is to stay, even the best, would not be found.
  logits = jax.lax.optimization_barrier(logits)
  if choice.top_k:
    logits = _at_least(logits, jax.lax.top_k(logits, min(choice.top_k, logits.shape[-1]))[0][:, -1:])
  if choice.top_p < 1:
    descending = -jnp.sort(-logits, axis=-1)
    shares = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(shares, axis=-1) - shares
    smallest = jnp.min(jnp.where(before < choice.top_p, descending, descending[:, :1]), axis=-1, keepdims=True)
    logits = _at_least(logits, smallest)
  if choice.min_p > 0:
    logits = _at_least(logits, jnp.max(logits, axis=-1, keepdims=True) + jnp.log(choice.min_p))
  return logits


def _at_least(logits: Float[Array, "B V"], smallest: Float[Array, "B 1"]) -> Float[Array, "B V"]:
  return jnp.where(logits >= smallest, logits, -jnp.inf)


def _argmax(x: Float[Array, "B V"]) -> Int[Array, "B"]:
  """The first of the largest. As two plain reductions, which XLA vectorises on a CPU; argmax it does not."""
  size = x.shape[-1]
  first = jnp.min(jnp.where(x == jnp.max(x, axis=-1, keepdims=True), jnp.arange(size), size), axis=-1)
  return jnp.minimum(first, size - 1).astype(jnp.int32)  # NaN is nowhere the largest
