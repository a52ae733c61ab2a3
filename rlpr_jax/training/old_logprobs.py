"""Log-probabilities that an update starts from, the sampler's or the trainer's; and how far it went from there.

Both run the same model code, so the sampler's usually serve, and a pass over all tokens is saved. Another kernel, a
cache of eight bits or rounding in bfloat16 can set them apart. The ratios of the update would then begin away from 1.
"""

import numpy as np

from rlpr_jax.training import packing
from rlpr_jax.training.logprobs import TextScorer
from rlpr_jax.types import Groups

EDGES = (1e-4, 1e-3, 1e-2, 1e-1)  # of |ratio - 1|, for the histogram


def resolve_old_logprobs(
  groups: Groups,
  trainer: TextScorer,
  source: str,
  limit: float,
  clip: tuple[float, float],
  cap: float = 0.0,
) -> tuple[Groups, dict[str, float]]:
  """Gives groups that the trainer's policy has just sampled the log-probabilities that an update is to start from.

  Args:
    source: `sampler`: those of the groups; `trainer`: computed anew; `auto`: the sampler's as long as the share of
      tokens whose ratio = p(trainer) / p(sampler) is outside the clip range is at most `limit`, looked at in one
      micro-batch. Of the others a ratio that is not 1 is the right one, for the sampler drew them; of those outside the
      loss may see nothing.
    clip: how far ratios may be under and over 1, as for `grpo.clipped_loss`.
    cap: with the trainer's, each token's advantage counts min(ratio, cap) times (truncated importance weights, arXiv
      1802.01561): what the sampler did not draw as often as the trainer would counts more. 0: once, as it is.

  Returns:
    the groups, and metrics: `mean` and `worst` of |ratio - 1|, `over_X` for the share of tokens where it is above X,
    `outside` for that outside the clip range, `recomputed`, 1 if the trainer's are taken, and with weights their mean,
    `importance`, and the share that was cut, `truncated`.
  """
  if not groups.num_groups:
    return groups, {}
  logprobs = trainer_logprobs(groups, trainer, everything=source == "trainer")
  metrics = sampler_gap(groups.logprobs, logprobs, clip)
  if not metrics:  # a policy that is not finite; the update will say so
    return groups, {}
  recomputed = source == "trainer" or (source == "auto" and not metrics["outside"] <= limit)
  if recomputed:
    if source == "auto":
      logprobs = trainer_logprobs(groups, trainer, everything=True)
    if cap:
      importance, of_weights = importance_weights(groups.logprobs, logprobs, cap)
      groups, metrics = groups._replace(importance=importance), metrics | of_weights
    groups = groups._replace(logprobs=np.nan_to_num(logprobs))
  return groups, metrics | {"recomputed": int(recomputed)}


def importance_weights(sampler: np.ndarray, trainer: np.ndarray, cap: float) -> tuple[np.ndarray, dict[str, float]]:
  """min(p(trainer) / p(sampler), cap) of each token, 1 where the trainer's is not known; and what it comes to.

  >>> weights, metrics = importance_weights(np.log([0.5, 0.2]), np.log([0.25, 0.8]), cap=2.0)
  >>> weights.tolist(), metrics
  ([0.5, 2.0], {'importance': 1.25, 'truncated': 0.5})
  """
  known = ~np.isnan(trainer)
  ratios = np.exp(np.where(known, trainer.astype(np.float64) - sampler, 0.0))
  weights = np.minimum(ratios, cap).astype(np.float32)
  found = weights[known]
  return np.where(known, weights, np.float32(1)), {
    "importance": float(found.mean()) if found.size else 1.0,
    "truncated": float(np.mean(ratios[known] > cap)) if found.size else 0.0,
  }


def sampler_gap(sampler: np.ndarray, trainer: np.ndarray, clip: tuple[float, float]) -> dict[str, float]:
  """Measures how far two sets of log-probabilities are apart, where the second is known; {} if it is nowhere.

  >>> sampler_gap(np.log([0.5, 0.25, 0.9]), np.log([0.5, 0.5, np.nan]), clip=(0.2, 0.27))["worst"]
  1.0
  """
  known = ~np.isnan(trainer)
  if not known.any():
    return {}
  over = np.expm1(trainer[known].astype(np.float64) - sampler[known])
  apart, (low, high) = np.abs(over), clip
  return {
    "mean": float(apart.mean()),
    "worst": float(apart.max()),
    "outside": float(np.mean(~((over >= -low) & (over <= high)))),  # what is not a number is
    **{f"over_{edge:g}": float(np.mean(apart > edge)) for edge in EDGES},
  }


def step_divergence(groups: Groups, trainer: TextScorer) -> float | None:
  """KL divergence of the policy that the groups' log-probabilities are of to the trainer's, in nats a token.

  By the k3 estimate, on one micro-batch of tokens that the former drew. Of the policies before and after a step it says
  whether the learning rate suits the model, which a loss does not, nor ratios where all of them start at 1.

  Returns:
    None where there is nothing to compare, or a policy is not finite.
  """
  if not groups.num_groups:
    return None
  logprobs = trainer_logprobs(groups, trainer, everything=False)
  known = ~np.isnan(logprobs)
  moved = logprobs[known].astype(np.float64) - groups.logprobs[known]
  return float(np.mean(np.expm1(moved) - moved)) if moved.size and np.isfinite(moved).all() else None


def trainer_logprobs(groups: Groups, trainer: TextScorer, everything: bool) -> np.ndarray:
  """float32[K, G, T] of the sampled tokens; NaN beyond the lengths, and beyond one micro-batch unless `everything`."""
  trees = packing.to_trees(groups._replace(answers=None), np.zeros(groups.lengths.size))
  logprobs = np.full(groups.logprobs.shape, np.nan, np.float32)
  for k, of_group in enumerate(trainer.logprobs(trees, one_micro_batch=not everything)):
    for g, logps in enumerate(of_group):
      if logps is not None:
        logprobs[k, g, : logps.size] = logps
  return logprobs
