"""Reference answers scored by another model than the one that sampled: a frozen or lagged copy of the policy.

The rollout's cache holds the sampling policy's keys and values, so this takes a whole pass over each spliced text.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from rlpr_jax.sampling.device import Suffix
from rlpr_jax.training.logprobs import TextScorer
from rlpr_jax.training.packing import Branch, Tree
from rlpr_jax.types import Prompt, Rollouts


def score_again(
  scorer: TextScorer,
  prompts: Sequence[Prompt],
  rollouts: Rollouts,
  baselines: Mapping[tuple[int, int], Suffix] | None = None,
) -> tuple[Rollouts, dict[tuple[int, int], np.ndarray]]:
  """Replaces the rollouts' `reference_logps` by those of another policy.

  Args:
    scorer: with room in a row for a prompt, a response and a reference answer.
    baselines: references straight after their prompts, whose r' that policy is to measure, as
      `Engine.baseline_suffixes` has them: more branches behind prompts that are read anyway.

  Returns:
    rollouts, and the log-probabilities of what is scored of each of `baselines`.
  """
  samples = len(rollouts.lengths) // max(len(prompts), 1)
  trees = [Tree(np.asarray(prompt.ids, np.int32), []) for prompt in prompts]
  scored: list[list[tuple[int, ...]]] = [[] for _ in prompts]  # rows, or rows and references, of each prompt
  for i in map(tuple, np.argwhere(rollouts.reference_mask.any(axis=-1)).tolist()):
    prompt, mask = i[0] // samples, rollouts.reference_mask[i]
    end = np.flatnonzero(mask)[-1] + 1
    kept, suffix = rollouts.tokens[i[0], : rollouts.reference_starts[i[0]]], rollouts.reference_tokens[i][:end]
    counted = np.concatenate([np.zeros(len(kept), bool), mask[:end]])
    trees[prompt].branches.append(Branch.of_tokens(np.concatenate([kept, suffix]), counted))
    scored[prompt].append(i)
  baselines = baselines or {}
  of_prompts: list[list[tuple[int, int]]] = [[] for _ in prompts]  # what of `baselines` stands behind each
  for at, suffix in baselines.items():
    trees[at[0]].branches.append(Branch.of_tokens(np.array(suffix.ids), np.array(suffix.mask)))
    of_prompts[at[0]].append(at)
  measured: dict[tuple[int, int], np.ndarray] = {}
  logps = np.zeros_like(rollouts.reference_logps)
  for tree, places, alone, of_tree in zip(trees, scored, of_prompts, scorer.logprobs(trees), strict=True):
    scores = [x[branch.mask] for branch, x in zip(tree.branches, of_tree, strict=True) if x is not None]
    for i, of_response in zip(places, scores[: len(places)], strict=True):
      logps[i][rollouts.reference_mask[i]] = of_response
    measured |= zip(alone, scores[len(places) :], strict=True)
  return rollouts._replace(reference_logps=logps), measured
