"""Group-relative advantages and the clipped policy loss. Imports nothing but jax.

Shapes: P prompts, G responses a prompt, B sequences, T tokens.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

NORMALIZATIONS = ("std", "none", "leave_one_out")
AGGREGATES = ("token_mean", "seq_mean_token_sum", "seq_mean_token_mean")
STD_FLOOR = 1e-6  # a group that spreads less has advantage 0


def group_advantages(rewards: ArrayLike, normalize: str = "std") -> tuple[jax.Array, jax.Array]:
  """How much better each response is than its group.

  Args:
    rewards: [P, G].
    normalize: `std`: (r - mean) / (std + 1e-6), GRPO; `none`: r - mean, Dr. GRPO; `leave_one_out`: r - mean of the
      others, RLOO. A group of one has mean 0 and std 1.

  Returns:
    (advantages [P, G], stds [P]), float32; stds are unbiased (n - 1). Under `std` a group whose std is below 1e-6 has
    advantage 0. A non-finite reward makes its own group non-finite and no other.
  """
  rewards = jnp.asarray(rewards, jnp.float32)
  size = rewards.shape[-1]
  if size == 1:
    centred, stds = rewards, jnp.where(jnp.isfinite(rewards[..., 0]), 1.0, jnp.nan)
  else:
    centred = rewards - jnp.mean(rewards, axis=-1, keepdims=True)
    stds = jnp.sqrt(jnp.sum(centred**2, axis=-1) / (size - 1))
  if normalize == "std":
    scaled = centred / (stds[..., None] + STD_FLOOR)
    return jnp.where(stds[..., None] < STD_FLOOR, 0.0, scaled), stds
  if normalize == "none":
    return centred, stds
  if normalize == "leave_one_out":
    return centred * (size / max(size - 1, 1)), stds
  raise ValueError(f"normalize {normalize!r}: expected one of {', '.join(NORMALIZATIONS)}")


def token_weights(mask: ArrayLike, aggregate: str = "token_mean", length: int | None = None) -> jax.Array:
  """Weights w[B, T] that turn per-token losses into the minibatch's loss: loss = sum(w * token_loss).

  Writing the mean as weights lets micro-batches simply add up, whatever the lengths of their rows.

  Args:
    mask: [B, T] True on response tokens, EOS included.
    aggregate: `token_mean`: 1 / tokens of the minibatch; `seq_mean_token_sum`: 1 / (sequences * length);
      `seq_mean_token_mean`: 1 / (sequences * tokens of the sequence). Sequences without tokens do not count.
    length: the constant of `seq_mean_token_sum`, T if None.
  """
  mask = jnp.asarray(mask, jnp.float32)
  tokens = jnp.sum(mask, axis=-1, keepdims=True)
  sequences = jnp.maximum(jnp.sum(tokens > 0), 1)
  if aggregate == "token_mean":
    return mask / jnp.maximum(jnp.sum(mask), 1)
  if aggregate == "seq_mean_token_sum":
    return mask / (sequences * (length or mask.shape[-1]))
  if aggregate == "seq_mean_token_mean":
    return mask / (sequences * jnp.maximum(tokens, 1))
  raise ValueError(f"aggregate {aggregate!r}: expected one of {', '.join(AGGREGATES)}")


def clipped_loss(
  logps: ArrayLike, old_logps: ArrayLike, advantages: ArrayLike, clip_low: float = 0.2, clip_high: float = 0.27
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """-min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A) for each token.

  Args:
    logps, old_logps: [...] log-probabilities under the policy and under the one that sampled, same temperature.
    advantages: broadcastable to [...].

  Returns:
    (loss [...], ratio [...], clipped [...] True where the clip decides and the gradient is therefore zero).
  """
  ratio = jnp.exp(jnp.asarray(logps) - jnp.asarray(old_logps))
  plain = ratio * advantages
  bounded = jnp.clip(ratio, 1 - clip_low, 1 + clip_high) * advantages
  return -jnp.minimum(plain, bounded), ratio, bounded < plain


def kl_k3(logps: ArrayLike, reference_logps: ArrayLike) -> jax.Array:
  """Schulman's k3 estimate of KL(policy || reference) for each token: exp(d) - d - 1 with d = reference - policy."""
  difference = jnp.asarray(reference_logps) - jnp.asarray(logps)
  return jnp.exp(difference) - difference - 1


def policy_loss(
  logps: ArrayLike,
  old_logps: ArrayLike,
  advantages: ArrayLike,
  mask: ArrayLike,
  clip_low: float = 0.2,
  clip_high: float = 0.27,
  aggregate: str = "token_mean",
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The clipped loss of one minibatch of padded sequences.

  Args:
    logps, old_logps: [B, T]; what stands outside the mask never matters.
    advantages: [B], one for each sequence.
    mask: [B, T] True on response tokens up to and including EOS, built from lengths.

  Returns:
    (loss, {"ratio_mean", "ratio_worst", "clip_fraction"}), scalars; `ratio_worst` is the largest |ratio - 1|.
  """
  mask = jnp.asarray(mask, bool)
  # Both are replaced before the exponential: a gradient through an unused inf would be NaN.
  logps, old_logps = jnp.where(mask, logps, 0.0), jnp.where(mask, old_logps, 0.0)
  loss, ratio, clipped = clipped_loss(logps, old_logps, jnp.asarray(advantages)[:, None], clip_low, clip_high)
  weights = token_weights(mask, aggregate)
  tokens = jnp.maximum(jnp.sum(mask), 1)
  metrics = {
    "ratio_mean": jnp.sum(ratio * mask) / tokens,
    "ratio_worst": jnp.max(jnp.abs(ratio - 1) * mask),
    "clip_fraction": jnp.sum(clipped & mask) / tokens,
  }
  return jnp.sum(jnp.where(mask, weights * loss, 0.0)), metrics
