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
  scorable = np.flatnonzero(rollouts.scorable).tolist()
  segments, places = [], []
  for i in scorable:
    prompt, answer = prompts[i // samples].ids, np.flatnonzero(rollouts.reference_mask[i])
    kept, suffix = rollouts.tokens[i, : rollouts.reference_starts[i]], rollouts.reference_tokens[i, : answer[-1] + 1]
    segments.append(Segment.of_tokens(np.concatenate([prompt, kept, suffix])))
    places.append(len(prompt) + len(kept) + answer)
  logps = np.zeros_like(rollouts.reference_logps)
  for i, place, text_logps in zip(scorable, places, scorer.logprobs(segments), strict=True):
    logps[i, rollouts.reference_mask[i]] = text_logps[place]
  return rollouts._replace(reference_logps=logps)
