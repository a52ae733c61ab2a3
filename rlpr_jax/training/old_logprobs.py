"""Whose log-probabilities an update starts from: the sampler's, or the trainer's where the two differ too much.

Both run the same model code, so the sampler's usually serve, and a pass over all tokens is saved. Another kernel, a
cache of eight bits or rounding in bfloat16 can set them apart. The ratios of the update would then begin away from 1.
"""

import functools
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from rlpr_jax.models import Params
from rlpr_jax.training import packing
from rlpr_jax.training.update import UpdateSettings, row_logprobs
from rlpr_jax.types import Groups, PackedRows

EDGES = (1e-4, 1e-3, 1e-2, 1e-1)  # of |ratio - 1|, for the histogram


class Trainer(NamedTuple):
  """What computes log-probabilities in training."""

  model: nnx.GraphDef
  params: Params  # all of them
  settings: UpdateSettings
  row_length: int


def resolve_old_logprobs(
  groups: Groups, trainer: Trainer, choice: str, limit: float
) -> tuple[Groups, dict[str, float]]:
  """Groups that the trainer's policy has just sampled, with the log-probabilities that an update is to start from.

  Args:
    choice: `sampler`: those of the groups; `trainer`: computed anew; `auto`: the sampler's as long as the mean of
      |ratio - 1| is at most `limit`, ratio = p(trainer) / p(sampler), looked at in one micro-batch.

  Returns:
    the groups, and metrics: `mean` and `worst` of |ratio - 1|, `over_X` for the share of tokens where it is above X,
    and `recomputed`, 1 if the trainer's are taken.
  """
  if not groups.num_groups:
    return groups, {}
  found = trainer_logprobs(groups, trainer, everything=choice == "trainer")
  metrics = gap(groups.logprobs, found)
  if not metrics:  # a policy that is not finite; the update will say so
    return groups, {}
  recomputed = choice == "trainer" or (choice == "auto" and not metrics["mean"] <= limit)
  if recomputed:
    if choice == "auto":
      found = trainer_logprobs(groups, trainer, everything=True)
    groups = groups._replace(logprobs=np.nan_to_num(found))
  return groups, metrics | {"recomputed": int(recomputed)}


def gap(sampler: np.ndarray, trainer: np.ndarray) -> dict[str, float]:
  """How far two sets of log-probabilities are apart, where the second is known (not NaN); nothing if it never is."""
  known = ~np.isnan(trainer)
  if not known.any():
    return {}
  apart = np.abs(np.expm1(trainer[known].astype(np.float64) - sampler[known]))
  return {
    "mean": float(apart.mean()),
    "worst": float(apart.max()),
    **{f"over_{edge:g}": float(np.mean(apart > edge)) for edge in EDGES},
  }


def trainer_logprobs(groups: Groups, trainer: Trainer, everything: bool) -> np.ndarray:
  """float32[K, G, T] of the sampled tokens; NaN beyond the lengths, and beyond one micro-batch unless `everything`."""
  size, length = trainer.settings.micro_batch_rows, trainer.row_length
  segments = packing.to_segments(groups._replace(answers=None), np.zeros(groups.lengths.size))
  places = packing.first_fit([segment.tokens.size for segment in segments], length)
  count = -(-(places[:, 0].max() + 1) // size) if everything else 1
  out = np.full(groups.logprobs.shape, np.nan, np.float32)
  for first in range(0, count * size, size):
    inside = np.flatnonzero((places[:, 0] >= first) & (places[:, 0] < first + size))
    rows = packing.lay([segments[i] for i in inside], places[inside] - [first, 0], size, length)
    logps = np.asarray(_logprobs(trainer.model, trainer.params, rows, trainer.settings))
    for i in inside:
      k, g = divmod(int(i), groups.lengths.shape[1])
      row, start = places[i] - [first, 0]
      start, tokens = start + groups.prompt_lengths[k], groups.lengths[k, g]
      out[k, g, :tokens] = logps[row, start : start + tokens]
  return out


@functools.partial(jax.jit, static_argnames=("model", "settings"))
def _logprobs(model: nnx.GraphDef, params: Params, rows: PackedRows, settings: UpdateSettings) -> jax.Array:
  rows = jax.tree.map(lambda x: settings.sharding.constrain(x, "batch", None), rows)
  return settings.sharding.constrain(row_logprobs(model, params, rows, settings.temperature)[0], None, None)
