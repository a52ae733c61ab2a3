"""Reference answers scored by another model than the one that sampled: a frozen or lagged copy of the policy.

The rollout's cache holds the sampling policy's keys and values, so this takes a whole pass over each spliced text.
"""

from collections.abc import Sequence

import numpy as np

from rlpr_jax.training.logprobs import TextScorer
from rlpr_jax.training.packing import Branch, Tree
from rlpr_jax.types import Prompt, Rollouts


def score_again(scorer: TextScorer, prompts: Sequence[Prompt], rollouts: Rollouts) -> Rollouts:
  """Replaces the rollouts' `reference_logps` by those of another policy.

  Args:
    scorer: with room in a row for a prompt, a response and a reference answer.
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
  logps = np.zeros_like(rollouts.reference_logps)
  for tree, places, of_tree in zip(trees, scored, scorer.logprobs(trees), strict=True):
    for branch, i, of_branch in zip(tree.branches, places, of_tree, strict=True):
      assert of_branch is not None
      logps[i][rollouts.reference_mask[i]] = of_branch[branch.mask]
  return rollouts._replace(reference_logps=logps)
