"""Reference answers scored by another model than the one that sampled: a frozen or lagged copy of the policy.

The rollout's cache holds the sampling policy's keys and values, so this takes a whole pass over each spliced text.
"""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from rlpr_jax.models import Params
from rlpr_jax.training.run import Run
from rlpr_jax.training.update import row_logprobs
from rlpr_jax.types import PackedRows, Prompt, Rollouts


def score_again(run: Run, params: Params, prompts: Sequence[Prompt], rollouts: Rollouts) -> Rollouts:
  """The rollouts with `reference_logps` of the policy with these (trained) parameters."""
  config = run.config
  ready = run.policy.sampling_params(params)
  size, samples = config.rollout.score_rows, config.samples_per_prompt
  length = config.data.prompt_limit + config.rollout.max_response_length + config.data.max_reference_length
  logps = np.zeros_like(rollouts.reference_logps)
  todo = np.flatnonzero(rollouts.scorable)
  for first in range(0, len(todo), size):
    part, rows, places = todo[first : first + size], PackedRows.empty(size, length), []
    for i, row in enumerate(part):
      mask = rollouts.reference_mask[row]
      needed = np.flatnonzero(mask)[-1] + 1
      prompt, kept = prompts[row // samples].ids, rollouts.tokens[row, : rollouts.reference_starts[row]]
      text = np.concatenate([prompt, kept, rollouts.reference_tokens[row, :needed]])
      rows.tokens[i, : len(text)], rows.segment_ids[i, : len(text)] = text, 1
      rows.positions[i, : len(text)] = np.arange(len(text))
      places.append(len(prompt) + len(kept) + np.flatnonzero(mask))
    found = np.asarray(_logprobs(run.policy.sampler, ready, rows, config.reward.score_temperature))
    for i, row in enumerate(part):
      logps[row, rollouts.reference_mask[row]] = found[i, places[i]]
  return rollouts._replace(reference_logps=logps)


@functools.partial(jax.jit, static_argnames=("model", "temperature"))
def _logprobs(model: nnx.GraphDef, params: Params, rows: PackedRows, temperature: float) -> jax.Array:
  return row_logprobs(model, params, rows, temperature)[0]
