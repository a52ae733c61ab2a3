"""Log-probabilities of tokens without ever holding [tokens, vocabulary]."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from rlpr_jax.sharding import Sharding
from rlpr_jax.types import AnyArray

CHUNK = 1024  # tokens a device whose logits exist at once
CHUNKS = 4  # at least, where some are left out


def token_logprobs(
  head: Float[Array, "V D"],
  hidden: Float[Array, "B T D"],
  targets: Int[AnyArray, "B T"],
  temperature: float = 1.0,
  cap: float | None = None,
  sharding: Sharding = Sharding(),
  known_tokens: int | None = None,
  used: Bool[AnyArray, "B T"] | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
  """Log-probability of each target and entropy of its distribution softmax(logits / temperature), float32, in nats.

  Works through chunks of places and computes their logits again in the backward pass, so temporary memory is about
  CHUNK * V a device, whatever the number of tokens; not under one place of each of a device's rows, though.

  Args:
    cap: soft cap of the logits (Gemma 2).
    known_tokens: as for `drop_unknown`.
    used: where either is wanted, best in front: what comes behind the last such chunk is left out, and gives zeros.

  >>> head = jnp.log(jnp.array([[0.2], [0.5], [0.3]]))
  >>> logprob, entropy = token_logprobs(head, jnp.ones((1, 1, 1)), jnp.array([[1]]))
  >>> float(jnp.exp(logprob[0, 0])), float(entropy[0, 0])
  (0.500, 1.030)
  """
  rows, length = targets.shape
  chunk = chunk_length(length, rows, sharding.num_shards("batch"), partly=used is not None)
  chunks = -(-length // chunk)
  padding = chunks * chunk - length
  # Chunks of places, not of rows: rows are spread over devices, and every device is to work on every chunk.
  hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0))).reshape(rows, chunks, chunk, -1).swapaxes(0, 1)
  targets = jnp.pad(targets, ((0, 0), (0, padding))).reshape(rows, chunks, chunk).swapaxes(0, 1)
  hidden = sharding.constrain(hidden, None, "batch", None, None)
  count = None if used is None else jnp.max(jnp.where(used, jnp.arange(length) // chunk + 1, 0))
  logps, entropy = _first_chunks(_Distribution(cap, known_tokens, sharding), head, hidden, targets, temperature, count)
  logps, entropy = (x.swapaxes(0, 1).reshape(rows, -1)[:, :length] for x in (logps, entropy))
  return logps, entropy


def chunk_length(length: int, rows: int, num_shards: int, partly: bool) -> int:
  """Places of each row whose logits exist at once; fewer where not all are used, so that the last chunk is soon full.

  >>> chunk_length(4096, rows=8, num_shards=8, partly=False), chunk_length(374, rows=1, num_shards=1, partly=True)
  (1024, 94)
  """
  return min(-(-length // CHUNKS) if partly else length, max(1, CHUNK * num_shards // rows))


class _Distribution(NamedTuple):
  """What makes a distribution over the vocabulary of hidden states; arguments of `token_logprobs`."""

  cap: float | None
  known_tokens: int | None
  sharding: Sharding

  def logits(
    self, head: Float[Array, "V D"], hidden: Float[Array, "B C D"], temperature: Float[ArrayLike, ""]
  ) -> tuple[Float[Array, "B C V"], Float[Array, "B C V"] | Float[ArrayLike, ""]]:
    """The logits of one chunk, by the temperature, and their slope over the products of both."""
    logits = jnp.einsum("bcd,vd->bcv", hidden, head, preferred_element_type=jnp.float32)
    slope = 1 / temperature
    if self.cap is not None:
      bent = jnp.tanh(logits / self.cap)
      logits, slope = self.cap * bent, (1 - bent**2) / temperature
    logits = drop_unknown(logits / temperature, self.known_tokens)
    return self.sharding.constrain(logits, "batch", None, "vocab"), slope


class _Found(NamedTuple):
  """Of each place."""

  logps: Float[Array, "*N B C"]  # of the target
  entropy: Float[Array, "*N B C"]
  logsums: Float[Array, "*N B C"]  # log of the sum of exp(logits)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _first_chunks(
  distribution: _Distribution,
  head: Float[Array, "V D"],
  hidden: Float[Array, "N B C D"],
  targets: Int[Array, "N B C"],
  temperature: Float[ArrayLike, ""],
  count: Int[Array, ""] | None,
) -> tuple[Float[Array, "N B C"], Float[Array, "N B C"]]:
  """Log-probabilities and entropies of the first `count` of N chunks, zeros of the others, which cost nothing.

  `count`: None for all. Its own gradient is a loop of as many turns: one over all of them would hold several arrays of
  the head's size.
  """
  return _forward(distribution, head, hidden, targets, temperature, count)[0]


def _forward(distribution: _Distribution, *args: Any) -> tuple[tuple[jax.Array, jax.Array], Any]:
  head, hidden, targets, temperature, count = args
  cast = head.astype(hidden.dtype)

  def step(i: jax.Array, found: _Found) -> _Found:
    logits, _ = distribution.logits(cast, hidden[i], temperature)
    largest = jnp.max(logits, axis=-1, keepdims=True)
    below = logits - largest
    weights = jnp.exp(below)
    total = jnp.sum(weights, axis=-1)
    of_target = jnp.sum(jnp.where(_is_target(logits, targets[i]), below, 0.0), axis=-1)
    new = _Found(
      logps=of_target - jnp.log(total),
      entropy=jnp.log(total) - jnp.sum(jnp.where(weights > 0, weights * below, 0.0), axis=-1) / total,
      logsums=largest[..., 0] + jnp.log(total),
    )
    return jax.tree.map(lambda all_chunks, chunk: all_chunks.at[i].set(chunk), found, new)

  start = _Found(*(jnp.zeros(targets.shape, jnp.float32),) * len(_Found._fields))
  found: _Found = jax.lax.fori_loop(0, len(targets) if count is None else count, step, start)
  return (found.logps, found.entropy), (args, found)


def _backward(
  distribution: _Distribution, residuals: Any, gradients: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array | None, ...]:
  """With p = softmax(z): d log p[target] / dz = (1 at the target) - p, and d entropy / dz = -p (log p + entropy)."""
  (head, hidden, targets, temperature, count), found = residuals
  cast = head.astype(hidden.dtype)

  def step(i: jax.Array, total: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    of_head, of_hidden = total
    logits, slope = distribution.logits(cast, hidden[i], temperature)
    of_logps, of_entropy, entropy, logsums = (x[i][..., None] for x in (*gradients, found.entropy, found.logsums))
    logps = logits - logsums
    probs = jnp.exp(logps)
    through_all = of_logps + of_entropy * (jnp.where(probs > 0, logps, 0.0) + entropy)
    of_logits = (jnp.where(_is_target(logits, targets[i]), of_logps, 0.0) - probs * through_all) * slope
    of_logits = of_logits.astype(hidden.dtype)
    of_head += jnp.einsum("bcv,bcd->vd", of_logits, hidden[i], preferred_element_type=jnp.float32)
    return of_head, of_hidden.at[i].set(jnp.einsum("bcv,vd->bcd", of_logits, cast))

  start = jnp.zeros(head.shape, jnp.float32), jnp.zeros_like(hidden)
  most = len(targets) if count is None else count
  of_head, of_hidden = jax.lax.fori_loop(0, most, step, start)
  return of_head.astype(head.dtype), of_hidden, None, jnp.zeros_like(temperature), None


_first_chunks.defvjp(_forward, _backward)


def _is_target(logits: Float[Array, "B C V"], targets: Int[Array, "B C"]) -> Bool[Array, "B C V"]:
  """Not a gather: each device has its part of the vocabulary."""
  return jnp.arange(logits.shape[-1]) == targets[..., None]


def drop_unknown(logits: Float[Array, "*B V"], known_tokens: int | None) -> Float[Array, "*B V"]:
  """Gives no probability to rows of the embedding that are no token's; `known_tokens`: where they begin, None: nowhere.

  >>> jax.nn.softmax(drop_unknown(jnp.zeros(4), 2)).tolist()
  [0.5, 0.5, 0.0, 0.0]
  """
  if known_tokens is None:
    return logits
  # The least number, not -inf: p log p of it is 0 and not NaN.
  return jnp.where(jnp.arange(logits.shape[-1]) < known_tokens, logits, jnp.finfo(logits.dtype).min)
