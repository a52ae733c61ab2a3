"""Log-probabilities of tokens without ever holding [tokens, vocabulary]."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

CHUNK = 1024  # tokens whose logits exist at once


def token_logprobs(
  head: Float[Array, "V D"],
  hidden: Float[Array, "*B D"],
  targets: Int[Array, "*B"],
  temperature: float = 1.0,
) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
  """Log-probability of each target and entropy of its distribution softmax(logits / temperature), float32, in nats.

  Works through chunks of tokens and computes their logits again in the backward pass, so temporary memory is
  CHUNK * V whatever the number of tokens.
  """
  shape = targets.shape
  hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
  tokens = targets.shape[0]
  chunk = min(CHUNK, tokens)
  chunks = -(-tokens // chunk)
  padding = chunks * chunk - tokens
  hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(chunks, chunk, -1)
  targets = jnp.pad(targets, (0, padding)).reshape(chunks, chunk)
  head = head.astype(hidden.dtype)

  @jax.checkpoint
  def one_chunk(scanned):
    hidden, targets = scanned
    logits = jnp.einsum("td,vd->tv", hidden, head, preferred_element_type=jnp.float32) / temperature
    logps = jax.nn.log_softmax(logits)
    entropy = -jnp.sum(jnp.exp(logps) * logps, axis=-1)
    return jnp.take_along_axis(logps, targets[:, None], axis=-1)[:, 0], entropy

  logps, entropy = jax.lax.map(one_chunk, (hidden, targets))
  return logps.reshape(-1)[:tokens].reshape(shape), entropy.reshape(-1)[:tokens].reshape(shape)
