"""Responses that go on in the next draw or step: which do, from where, and how old their tokens are (partial rollouts).

In a draw each response gets at most `config.rollout.carry_tokens` new tokens. What has not ended then waits, and goes
on in the next draw beside the prompts of that, read again by its parameters. A group is scored and rewarded once all of
its responses have ended, all by one policy. All this follows from counted tokens, never from a clock, from slots or
from processes: a run that carries is the same run however often it is repeated or killed.
"""

from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from rlpr_jax.sampling.engine import Draws
from rlpr_jax.sampling.scheduler import Beginning
from rlpr_jax.types import Prompt, Rollouts, Unfinished

NOBODY = Prompt(ids=np.zeros(0, np.int32), row=-1)  # is refused by all samplers


def most_groups(config: ConfigDict) -> int:
  """Groups of a draw, at most: new ones, and those that go on.

  >>> from rlpr_jax.config import default
  >>> config = default()
  >>> config.rollout.prompts_per_draw = 8
  >>> most_groups(config)
  8
  >>> config.rollout.carry, config.rollout.max_staleness = "partial", 2
  >>> most_groups(config)
  24
  """
  carries = config.rollout.carry == "partial"
  return int(config.rollout.prompts_per_draw * (1 + carries * config.rollout.max_staleness))


def with_begun(config: ConfigDict, unfinished: Unfinished, prompts: Sequence[Prompt], new: Draws) -> Draws:
  """The prompts of unfinished groups, new ones, and as many of nobody as make up the most that a draw may have.

  So programs always see one shape.

  Args:
    prompts: of the data set.
  """
  begun = [(int(draw), prompts[row]) for draw, row in zip(unfinished.draws, unfinished.rows, strict=True)]
  missing = most_groups(config) - len(begun) - len(new)
  return [*begun, *new, *[(0, NOBODY)] * missing]


def beginnings(unfinished: Unfinished, groups: int) -> list[list[Beginning | None]]:
  """What there is of each response of so many groups, of which the unfinished ones are the first; None: nothing."""
  new, samples = groups - unfinished.num_groups, unfinished.lengths.shape[1]
  begun: list[list[Beginning | None]] = [
    [
      Beginning(
        tokens=unfinished.tokens[k, g, :length],
        logprobs=unfinished.logprobs[k, g, :length],
        finished=bool(unfinished.finished[k, g]),
        parts=int(unfinished.parts[k]),
      )
      for g, length in enumerate(unfinished.lengths[k])
    ]
    for k in range(unfinished.num_groups)
  ]
  begun.extend([None] * samples for _ in range(new))
  return begun


def limits(config: ConfigDict, unfinished: Unfinished, groups: int) -> np.ndarray:
  """int32[P, G] new tokens that each response of so many groups may get, the unfinished ones first.

  >>> from rlpr_jax.config import default
  >>> config = default()
  >>> config.samples_per_prompt, config.rollout.max_response_length, config.rollout.carry_tokens = 2, 9, 4
  >>> begun = Unfinished(*(np.zeros((1, *x.shape[1:]), x.dtype) for x in Unfinished.empty(2, 9)))
  >>> begun = begun._replace(lengths=np.array([[4, 2]]), finished=np.array([[False, True]]))
  >>> limits(config, begun, groups=2).tolist()
  [[4, 0], [4, 4]]
  >>> limits(config, begun._replace(parts=np.array([1])), groups=2).tolist()  # the last draw that it may be in
  [[5, 0], [4, 4]]
  """
  most, budget = config.rollout.max_response_length, config.rollout.carry_tokens
  left = np.full((groups, config.samples_per_prompt), min(budget, most), np.int32)
  last = (unfinished.parts >= config.rollout.max_staleness)[:, None]
  room = most - unfinished.lengths
  begun = np.where(last, room, np.minimum(room, budget))
  left[: unfinished.num_groups] = np.where(unfinished.finished, 0, begun)
  return left


def part(
  config: ConfigDict, unfinished: Unfinished, numbered: Draws, rollouts: Rollouts, step: int
) -> tuple[np.ndarray, Unfinished, np.ndarray]:
  """Tells which groups of a draw have ended, and which go on.

  Args:
    unfinished: those of the draw before, the first of this one.
    numbered: all prompts of the draw, as of `with_begun`.
    rollouts: of all processes.
    step: training steps finished.

  Returns:
    ended: bool[P], nobody's not among them.
    unfinished: the others of somebody.
    ages: int32[P, G, T] steps since each token was sampled.
  """
  most, samples, begun = config.rollout.max_response_length, config.samples_per_prompt, unfinished.num_groups
  shape = (len(numbered), samples)
  tokens, logprobs = (x.reshape(*shape, most) for x in (rollouts.tokens, rollouts.logprobs))
  lengths, finished, refused = (x.reshape(shape) for x in (rollouts.lengths, rollouts.finished, rollouts.refused))
  steps = np.full(tokens.shape, step, np.int32)
  old = np.arange(most) < unfinished.lengths[..., None]
  steps[:begun] = np.where(old, unfinished.steps, step)
  somebody = np.array([prompt is not NOBODY for _, prompt in numbered], bool)
  ended = somebody & (finished | refused | (lengths >= most)).all(axis=1)
  every = Unfinished(
    draws=np.array([draw for draw, _ in numbered], np.uint32),
    rows=np.array([prompt.row for _, prompt in numbered], np.int32),
    parts=np.concatenate([unfinished.parts + 1, np.ones(len(numbered) - begun, np.int32)]),
    tokens=tokens,
    lengths=lengths,
    logprobs=logprobs,
    steps=steps,
    finished=finished,
  )
  return ended, every.take(somebody & ~ended), step - steps
