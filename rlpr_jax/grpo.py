"""Group-relative advantages, weights of the answer's own gradient, and the policy losses.

Imports nothing but jax and jaxtyping. Shapes: P prompts, G responses a prompt, B sequences, T tokens.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Real, Shaped

NORMALIZATIONS = ("std", "none", "leave_one_out")
AGGREGATES = ("token_mean", "seq_mean_token_sum", "seq_mean_token_mean")
STD_FLOOR = 1e-6  # a group that spreads less has advantage 0


def group_advantages(
  rewards: Real[ArrayLike, "*P G"], normalize: str = "std", part: Real[ArrayLike, "*P G"] | None = None
) -> tuple[Float[Array, "*P G"], Float[Array, "*P"]]:
  """Measure how much better each response is than its group.

  Args:
    part: a part of the rewards, of which alone the advantages are then: centred by itself, over the spread of the
      whole. Advantages of parts that add up to the rewards add up to theirs. None for all of them.
    normalize: `std`: (r - mean) / (std + 1e-6), GRPO; `none`: r - mean, Dr. GRPO; `leave_one_out`: r - mean of the
      others, RLOO. A group of one has mean 0 and std 1.

  Returns:
    (advantages, stds), float32; stds are unbiased (n - 1). Under `std` a group whose std is below 1e-6 has advantage 0.
    A non-finite reward makes its own group non-finite and no other.

  >>> advantages, stds = group_advantages(jnp.array([[0.64, 0.19], [0.5, 0.5]]))
  >>> advantages.tolist(), stds.tolist()
  ([[0.71, -0.71], [0.0, 0.0]], [0.32, 0.0])
  >>> group_advantages(jnp.array([[0.64, 0.19]]), part=jnp.array([[0.1, 0.1]]))[0].tolist()  # that of the format
  [[0.0, 0.0]]
  """
  rewards = jnp.asarray(rewards, jnp.float32)
  size = rewards.shape[-1]
  if size == 1:
    centred, stds = rewards, jnp.where(jnp.isfinite(rewards[..., 0]), 1.0, jnp.nan)
  else:
    centred = _centre(rewards)
    stds = jnp.sqrt(jnp.sum(centred**2, axis=-1) / (size - 1))
  if part is not None:
    part = jnp.asarray(part, jnp.float32)
    centred = part if size == 1 else _centre(part)
  if normalize == "std":
    scaled = centred / (stds[..., None] + STD_FLOOR)
    return jnp.where(stds[..., None] < STD_FLOOR, 0.0, scaled), stds
  if normalize == "none":
    return centred, stds
  if normalize == "leave_one_out":
    return centred * (size / max(size - 1, 1)), stds
  raise ValueError(f"normalize {normalize!r}: expected one of {', '.join(NORMALIZATIONS)}")


def _centre(values: Float[Array, "*P G"]) -> Float[Array, "*P G"]:
  """Twice, for equal values: the first mean may be an ulp off, which would be taken for a spread."""
  for _ in range(2):
    values -= jnp.mean(values, axis=-1, keepdims=True)
  return values


def separate_advantages(
  parts: Sequence[Real[ArrayLike, "*P G"]], weights: Sequence[Real[ArrayLike, ""]], normalize: str = "std"
) -> tuple[Float[Array, "*P G"], Float[Array, "*P"]]:
  """sum_k w_k * group_advantages(part_k): each part of the reward is normalised by itself, so none drowns another.

  The decoupled normalisation of GDPO (arXiv 2601.05242), without its last step over the whole batch. Under `none` and
  `leave_one_out` this is `group_advantages` of the weighted sum.

  Args:
    parts: K rewards.
    weights: K numbers; a part of weight 0 counts for nothing, unless it is not finite.
    normalize: as for `group_advantages`, of each part in each group.

  Returns:
    (advantages, stds), float32; stds are those of the weighted sum of the raw parts, by which a filter judges the
    group. A non-finite value in any part makes its own group non-finite and no other.

  >>> separate_advantages([jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 0.1]])], [1.0, 1.0])[0].tolist()
  [[0.0, 0.0]]
  """
  weighted = list(zip(weights, parts, strict=True))
  advantages = jnp.asarray(sum(weight * group_advantages(part, normalize)[0] for weight, part in weighted))
  total = jnp.asarray(sum(weight * jnp.asarray(part, jnp.float32) for weight, part in weighted))
  return advantages, group_advantages(total, normalize)[1]


def verifree_weights(rewards: Real[ArrayLike, "*P G"]) -> Float[Array, "*P G"]:
  """Weights of -log p(reference answer | reasoning) in the loss: the rewards, as constants (arXiv 2505.21493).

  The gradient of E[p(y*|z)] is E[p(y*|z) (grad log p(z) + grad log p(y*|z))]: `group_advantages` serves the first
  term, this the second. Both are means over the samples. A baseline belongs to the first alone.

  Args:
    rewards: probability of the reference answer, or what takes its place.

  >>> verifree_weights(jnp.array([[0.5, 0.25]])).tolist()
  [[0.5, 0.25]]
  """
  return jax.lax.stop_gradient(jnp.asarray(rewards, jnp.float32))


def group_bound(
  answer_logps: Real[ArrayLike, "*P G"], valid: Shaped[ArrayLike, "*P G"]
) -> tuple[Float[Array, "*P"], Float[Array, "*P G"], Float[Array, "*P G"]]:
  """JEPO's multi-sample Jensen bound on log p(reference answer), and what its gradient needs (arXiv 2503.19618).

  bound = log(1/n sum_i exp(l_i)) over the n valid samples. Its gradient is the expectation of

      sum_i advantage_i * grad log p(z_i) + weight_i * grad l_i

  summed over the group and not averaged: both shrink as 1/n by themselves.

  Args:
    answer_logps: l, log-probability of the reference answer after each reasoning z; finite where valid.
    valid: False where the answer could not be scored; what stands there never matters.

  Returns:
    bound: differentiable by l; -inf where no sample is valid.
    advantages: constants: bound - the bound of the group without sample i. For an invalid sample this is 0 by
      itself, since it was not in the bound: n counts valid samples, so failing to answer is not punished here. A lone
      valid sample has nothing to be compared with and gets 0 too. Never below log(1 - 1/n); as large as the range of l.
    weights: constants: exp(l_i) / sum_j exp(l_j) over the valid samples, the bound's gradient by l; 0 elsewhere.

  >>> bound, advantages, weights = group_bound(jnp.log(jnp.array([[0.6, 0.2]])), jnp.ones((1, 2), bool))
  >>> jnp.exp(bound).tolist(), advantages.tolist(), weights.tolist()
  ([0.4], [[0.69, -0.41]], [[0.75, 0.25]])
  """
  valid = jnp.asarray(valid, bool)
  logps = jnp.where(valid, jnp.asarray(answer_logps, jnp.float32), 0.0)
  count = jnp.sum(valid, axis=-1, keepdims=True)
  best = jax.lax.stop_gradient(jnp.max(logps, axis=-1, keepdims=True, where=valid, initial=-jnp.inf))
  best = jnp.where(count > 0, best, 0.0)
  logps = logps - best  # differences stay exact, however improbable all answers are
  bound = _log_mean_exp(logps, valid)
  others = valid[..., None, :] & ~jnp.eye(valid.shape[-1], dtype=bool)
  without = _log_mean_exp(logps[..., None, :], others)
  advantages = jnp.where(valid & (count > 1), bound[..., None] - without, 0.0)
  weights = jnp.where(valid, jnp.exp(logps - bound[..., None]) / jnp.maximum(count, 1), 0.0)
  return bound + best[..., 0], jax.lax.stop_gradient(advantages), jax.lax.stop_gradient(weights)


def _log_mean_exp(x: Float[Array, "..."], included: Bool[Array, "..."]) -> Float[Array, "..."]:
  """log(mean of exp(x) over the included) along the last axis; -inf, with gradient 0, where none is."""
  count = jnp.sum(included, axis=-1)
  top = jax.lax.stop_gradient(jnp.max(x, axis=-1, where=included, initial=-jnp.inf))
  top = jnp.where(count > 0, top, 0.0)
  total = jnp.sum(jnp.where(included, jnp.exp(jnp.where(included, x - top[..., None], 0.0)), 0.0), axis=-1)
  return jnp.where(count > 0, top + jnp.log(jnp.where(count > 0, total / jnp.maximum(count, 1), 1.0)), -jnp.inf)


def loss_weights(
  mask: Shaped[ArrayLike, "B T"], aggregate: str = "token_mean", length: int | None = None
) -> Float[Array, "B T"]:
  """Weights w that turn per-token losses into the minibatch's loss: loss = sum(w * token_loss).

  Args:
    mask: True on response tokens, EOS included.
    aggregate: as for `sequence_weights`.
    length: the constant of `seq_mean_token_sum`, T if None.

  >>> loss_weights(jnp.array([[True, True, True], [True, False, False]]), "token_mean").tolist()
  [[0.25, 0.25, 0.25], [0.25, 0.0, 0.0]]
  """
  mask = jnp.asarray(mask, jnp.float32)
  return mask * sequence_weights(jnp.sum(mask, axis=-1), aggregate, length or mask.shape[-1])[:, None]


def sequence_weights(tokens: Real[ArrayLike, "B"], aggregate: str, length: int) -> Float[Array, "B"]:
  """Weight w of each token of a sequence, such that loss = sum(w * token_loss) is the minibatch's mean.

  Writing the mean as weights lets micro-batches simply add up, whatever the lengths of their rows.

  Args:
    tokens: number of response tokens of each sequence.
    aggregate: `token_mean`: 1 / tokens of the minibatch; `seq_mean_token_sum`: 1 / (sequences * length);
      `seq_mean_token_mean`: 1 / (sequences * tokens of the sequence). Sequences without tokens do not count.
    length: the constant of `seq_mean_token_sum`.

  >>> sequence_weights(jnp.array([4, 1]), "seq_mean_token_mean", length=4).tolist()
  [0.125, 0.5]
  """
  tokens = jnp.asarray(tokens, jnp.float32)
  sequences = jnp.maximum(jnp.sum(tokens > 0), 1)
  if aggregate == "token_mean":
    return jnp.full(tokens.shape, 1 / jnp.maximum(jnp.sum(tokens), 1))
  if aggregate == "seq_mean_token_sum":
    return jnp.full(tokens.shape, 1 / (sequences * length))
  if aggregate == "seq_mean_token_mean":
    return 1 / (sequences * jnp.maximum(tokens, 1))
  raise ValueError(f"aggregate {aggregate!r}: expected one of {', '.join(AGGREGATES)}")


def clipped_loss(
  logps: Float[ArrayLike, "*B"],
  old_logps: Float[ArrayLike, "*B"],
  advantages: Real[ArrayLike, "*#B"],
  clip_low: float = 0.2,
  clip_high: float = 0.27,
  dual_clip: float | None = None,
) -> tuple[Float[Array, "*B"], Float[Array, "*B"], Bool[Array, "*B"]]:
  """-min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A) for each token.

  Args:
    logps, old_logps: log-probabilities under the policy and under the one that sampled, same temperature.
    dual_clip: c > 1, a Python number: where A < 0 the loss is at most -c * A, so that a bad token that became much
      likelier does not rule the step (Ye et al. 2020, arXiv 1912.09729; 3 there). None for no such limit.

  Returns:
    (loss, ratio, clipped), the last True where a clip decides and the gradient is therefore zero.

  >>> loss, ratio, clipped = clipped_loss(jnp.log(jnp.array([0.5, 0.8])), jnp.log(jnp.array([0.5, 0.4])), 1.0)
  >>> loss.tolist(), ratio.tolist(), clipped.tolist()
  ([-1.0, -1.27], [1.0, 2.0], [False, True])
  """
  if dual_clip is not None and dual_clip <= 1:
    raise ValueError(f"dual_clip {dual_clip}: expected a number above 1")
  difference, advantages = jnp.asarray(logps) - jnp.asarray(old_logps), jnp.asarray(advantages)
  ratio = jnp.exp(difference)
  cap = jnp.inf if dual_clip is None else dual_clip
  too_good = (advantages > 0) & (ratio > 1 + clip_high)
  clipped = jnp.where(advantages < 0, (ratio < 1 - clip_low) | (ratio > cap), too_good)
  limit = jnp.where(advantages > 0, 1 + clip_high, jnp.where(ratio > cap, cap, 1 - clip_low))
  # Replaced before the exponential: where that overflows, zero times its gradient would be NaN.
  plain = jnp.exp(jnp.where(clipped, 0.0, difference))
  return -jnp.where(clipped, limit, plain) * advantages, ratio, clipped


def truncated_loss(
  logps: Float[ArrayLike, "*B"], old_logps: Float[ArrayLike, "*B"], advantages: Real[ArrayLike, "*#B"], cap: float
) -> tuple[Float[Array, "*B"], Float[Array, "*B"], Bool[Array, "*B"]]:
  """-stop_gradient(min(ratio, cap)) * A * logp for each token: REINFORCE with truncated importance weights.

  The truncation of IMPALA (arXiv 1802.01561) on each token, as in CISPO (MiniMax-M1, arXiv 2506.13585): unlike a clip,
  it leaves no token without a gradient. The value of the loss means little, its gradient -min(ratio, cap) * A is meant.

  Args:
    logps, old_logps, advantages: as for `clipped_loss`.
    cap: largest weight.

  Returns:
    (loss, ratio, truncated): the ratio is a constant, the last True where it is above the cap.

  >>> jax.grad(lambda x: truncated_loss(x, jnp.log(0.2), 1.0, cap=2.0)[0])(jnp.log(0.8)).item()
  -2.0
  """
  logps = jnp.asarray(logps)
  ratio = jnp.exp(jax.lax.stop_gradient(logps - jnp.asarray(old_logps)))
  return -jnp.minimum(ratio, cap) * advantages * logps, ratio, ratio > cap


def with_sequence_ratios(
  logps: Float[ArrayLike, "B T"],
  old_logps: Float[ArrayLike, "B T"],
  mask: Shaped[ArrayLike, "B T"],
  sequence_ids: Int[ArrayLike, "B T"] | None = None,
) -> Float[Array, "B T"]:
  """Log-probabilities whose ratio to the old ones is that of the whole sequence, exp(mean(logps - old_logps)).

  GSPO's ratio, in its form for tokens (arXiv 2507.18071): every loss that compares with the old log-probabilities
  clips whole sequences then, and its gradient reaches each token as ever. With `seq_mean_token_mean` this is GSPO's
  loss; there clips are 3e-4 and 4e-4.

  Args:
    mask: True on the tokens of which the mean is, and which are changed.
    sequence_ids: those of one id in a row are a sequence, from 0 to T; None: a row is one.

  >>> new, old = jnp.log(jnp.array([[0.8, 0.5]])), jnp.log(jnp.array([[0.2, 0.5]]))
  >>> jnp.exp(with_sequence_ratios(new, old, jnp.ones((1, 2))) - old).tolist()  # the geometric mean of 4 and 1
  [[2.0, 2.0]]
  """
  logps, old_logps, mask = jnp.asarray(logps), jnp.asarray(old_logps), jnp.asarray(mask, bool)
  ids = jnp.zeros(mask.shape, jnp.int32) if sequence_ids is None else jnp.asarray(sequence_ids)

  def means(values: jax.Array, mask: jax.Array, ids: jax.Array) -> jax.Array:  # of a row
    sums, counts = (jax.ops.segment_sum(x, ids, mask.size + 1) for x in (values, mask.astype(values.dtype)))
    return (sums / jnp.maximum(counts, 1))[ids]

  difference = jax.lax.stop_gradient(jnp.where(mask, logps - old_logps, 0.0))
  return logps + jnp.where(mask, jax.vmap(means)(difference, mask, ids) - difference, 0.0)


def kl_k3(logps: Float[ArrayLike, "*B"], reference_logps: Float[ArrayLike, "*B"]) -> Float[Array, "*B"]:
  """Schulman's k3 estimate of KL(policy || reference) for each token: exp(d) - d - 1 with d = reference - policy.

  >>> kl_k3(jnp.log(0.5), jnp.log(0.25)).item()
  0.193
  """
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
  dual_clip: float | None = None,
  *,
  ratio_cap: float | None = None,
  weights: ArrayLike | None = None,
  sequence_ids: ArrayLike | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The policy loss of a minibatch, or of a part of one: sum(weights * token loss).

  Args:
    logps, old_logps: [B, T] under the policy and under the one that sampled; what is outside the mask never matters.
    advantages: [B] one for each sequence, or [B, T] one for each token.
    mask: [B, T] True on response tokens up to and including EOS, built from lengths.
    clip_low, clip_high, dual_clip: as for `clipped_loss`.
    aggregate: as for `loss_weights`.
    ratio_cap: takes `truncated_loss` with this cap in the place of `clipped_loss`; None does not.
    weights: [B, T] in the place of what `aggregate` makes of the mask: of a whole minibatch, for its parts to add up.
    sequence_ids: [B, T] makes the ratio that of whole sequences, as in `with_sequence_ratios`; None: of each token.

  Returns:
    (loss, metrics), scalars: `ratio_mean`, `ratio_worst` (the largest |ratio - 1|) and `clip_fraction`; or, with
    `weights`, numbers that add up over the parts of a minibatch in the place of means: `tokens`, `ratio_sum`,
    `clipped_tokens`, and `ratio_worst`.

  One response of two tokens whose second has become twice as likely, where 1.27 times is all that counts:

  >>> loss, metrics = policy_loss(
  ...   jnp.log(jnp.array([[0.5, 0.8]])), jnp.log(jnp.array([[0.5, 0.4]])), jnp.ones(1), jnp.ones((1, 2))
  ... )
  >>> print(f"{loss:.3f} {metrics['clip_fraction']:.2f}")
  -1.135 0.50
  """
  mask = jnp.asarray(mask, bool)
  # Both are replaced before the exponential: a gradient through an unused inf would be NaN.
  logps, old_logps = jnp.where(mask, logps, 0.0), jnp.where(mask, old_logps, 0.0)
  if sequence_ids is not None:
    logps = with_sequence_ratios(logps, old_logps, mask, sequence_ids)
  advantages = jnp.asarray(advantages)
  advantages = advantages[:, None] if advantages.ndim == 1 else advantages
  if ratio_cap is None:
    loss, ratio, clipped = clipped_loss(logps, old_logps, advantages, clip_low, clip_high, dual_clip)
  else:
    loss, ratio, clipped = truncated_loss(logps, old_logps, advantages, ratio_cap)
  sums = {
    "tokens": jnp.sum(mask),
    "ratio_sum": jnp.sum(ratio * mask),
    "ratio_worst": jnp.max(jnp.abs(ratio - 1) * mask),
    "clipped_tokens": jnp.sum(clipped & mask),
  }
  if weights is not None:
    return jnp.sum(jnp.where(mask, weights * loss, 0.0)), sums
  tokens = jnp.maximum(sums["tokens"], 1)
  metrics = {
    "ratio_mean": sums["ratio_sum"] / tokens,
    "ratio_worst": sums["ratio_worst"],
    "clip_fraction": sums["clipped_tokens"] / tokens,
  }
  return jnp.sum(jnp.where(mask, loss_weights(mask, aggregate) * loss, 0.0)), metrics
