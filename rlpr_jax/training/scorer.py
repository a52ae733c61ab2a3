"""Reference answers scored by another model than the one that sampled: a frozen or lagged copy of the policy.

The rollout's cache holds the sampling policy's keys and values, so this takes a whole pass over each spliced text.
"""

from collections.abc import Sequence

import numpy as np

from rlpr_jax.training.logprobs import TextScorer
from rlpr_jax.training.packing import Segment
from rlpr_jax.types import Prompt, Rollouts


def score_again(scorer: TextScorer, prompts: Sequence[Prompt], rollouts: Rollouts) -> Rollouts:
  """Replaces the rollouts' `reference_logps` by those of another policy.

  Args:
    scorer: with room in a row for a prompt, a response and a reference answer.
  """
  samples = len(rollouts.lengths) // max(len(prompts), 1)
  scored = [tuple(i) for i in np.argwhere(rollouts.reference_mask.any(axis=-1))]  # rows, or rows and references
  segments, places = [], []
  for i in scored:
    prompt, answer = prompts[i[0] // samples].ids, np.flatnonzero(rollouts.reference_mask[i])
    kept, suffix = rollouts.tokens[i[0], : rollouts.reference_starts[i[0]]], rollouts.reference_tokens[i]
    segments.append(Segment.of_tokens(np.concatenate([prompt, kept, suffix[: answer[-1] + 1]])))
    places.append(len(prompt) + len(kept) + answer)
  logps = np.zeros_like(rollouts.reference_logps)
  for i, place, text_logps in zip(scored, places, scorer.logprobs(segments), strict=True):
    logps[i][rollouts.reference_mask[i]] = text_logps[place]
  return rollouts._replace(reference_logps=logps)
