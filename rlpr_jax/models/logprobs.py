"""Log-probabilities of tokens without ever holding [tokens, vocabulary]."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlpr_jax.models.attention import softcap
from rlpr_jax.sharding import Sharding
from rlpr_jax.types import AnyArray

CHUNK = 1024  # tokens a device whose logits exist at once


def token_logprobs(
  head: Float[Array, "V D"],
  hidden: Float[Array, "B T D"],
  targets: Int[AnyArray, "B T"],
  temperature: float = 1.0,
  cap: float | None = None,
  sharding: Sharding = Sharding(),
  known_tokens: int | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
  """Log-probability of each target and entropy of its distribution softmax(logits / temperature), float32, in nats.

  Works through chunks of places and computes their logits again in the backward pass, so temporary memory is about
  CHUNK * V a device, whatever the number of tokens; not under one place of each of a device's rows, though.

  Args:
    cap: soft cap of the logits (Gemma 2).
    known_tokens: as for `drop_unknown`.

  >>> head = jnp.log(jnp.array([[0.2], [0.5], [0.3]]))
  >>> logprob, entropy = token_logprobs(head, jnp.ones((1, 1, 1)), jnp.array([[1]]))
  >>> float(jnp.exp(logprob[0, 0])), float(entropy[0, 0])
  (0.500, 1.030)
  """
  rows, length = targets.shape
  chunk = min(length, max(1, CHUNK * sharding.num_shards("batch") // rows))
  chunks = -(-length // chunk)
  padding = chunks * chunk - length
  # Chunks of places, not of rows: rows are spread over devices, and every device is to work on every chunk.
  hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0))).reshape(rows, chunks, chunk, -1).swapaxes(0, 1)
  targets = jnp.pad(targets, ((0, 0), (0, padding))).reshape(rows, chunks, chunk).swapaxes(0, 1)
  hidden = sharding.constrain(hidden, None, "batch", None, None)
  head = head.astype(hidden.dtype)

  @jax.checkpoint
  def one_chunk(scanned: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    hidden, targets = scanned
    logits = jnp.einsum("btd,vd->btv", hidden, head, preferred_element_type=jnp.float32)
    logits = drop_unknown(softcap(logits, cap) / temperature, known_tokens)
    logits = sharding.constrain(logits, "batch", None, "vocab")
    logps = jax.nn.log_softmax(logits)
    entropy = -jnp.sum(jnp.exp(logps) * logps, axis=-1)
    # Not a gather: each device has its part of the vocabulary.
    chosen = jnp.arange(logits.shape[-1]) == targets[..., None]
    return jnp.sum(jnp.where(chosen, logps, 0.0), axis=-1), entropy

  logps, entropy = jax.lax.map(one_chunk, (hidden, targets))
  logps, entropy = (x.swapaxes(0, 1).reshape(rows, -1)[:, :length] for x in (logps, entropy))
  return logps, entropy


def drop_unknown(logits: Float[Array, "*B V"], known_tokens: int | None) -> Float[Array, "*B V"]:
  """Gives no probability to rows of the embedding that are no token's; `known_tokens`: where they begin, None: nowhere.

  >>> jax.nn.softmax(drop_unknown(jnp.zeros(4), 2)).tolist()
  [0.5, 0.5, 0.0, 0.0]
  """
  if known_tokens is None:
    return logits
  # The least number, not -inf: p log p of it is 0 and not NaN.
  return jnp.where(jnp.arange(logits.shape[-1]) < known_tokens, logits, jnp.finfo(logits.dtype).min)
