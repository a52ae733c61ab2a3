"""Responses that go on in the next draw or step: which do, from where, and how old their tokens are (partial rollouts).

In a draw a response gets so many new tokens (`budget`). What has not ended then waits, and goes on in the next draw
beside the prompts of that, read again by its parameters. A response is scored when it ends, by the policy that ended
it, and a group is rewarded once all of its responses have. All this follows from counted tokens, never from a clock,
from slots or from processes: a run that carries is the same run however often it is repeated or killed.
"""

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from ml_collections import ConfigDict

from rlpr_jax.sampling.engine import Draws
from rlpr_jax.sampling.scheduler import Beginning
from rlpr_jax.types import Prompt, Rollouts, Unfinished

Item = TypeVar("Item")
NOBODY = Prompt(ids=np.zeros(0, np.int32), row=-1)  # is refused by all samplers
_SCORED = "scorable", "overlong", "reference_starts", "reference_tokens", "reference_logps", "reference_mask"
_GOLDEN = (math.sqrt(5) - 1) / 2  # whose multiples fill [0, 1) evenly, any stretch of them
_LEAST = 1 / 32  # of the tokens of a draw


def budget(draw: int, tokens: int) -> int:
  """New tokens of the responses of a group in a draw, at most `tokens`: with the longest first, all end together.

  Slots are taken one after the other, so of those that begin late as little is wanted as there is time left. Groups
  are spread evenly over what is wanted, whatever part of them a process has.

  Args:
    draw: the number of the group's prompt.

  >>> [budget(draw, 100) for draw in range(6)]
  [100, 39, 77, 15, 53, 91]
  """
  return max(math.ceil(tokens * (1 - draw * _GOLDEN % 1)), math.ceil(tokens * _LEAST))


def most_new(config: ConfigDict, draw: int, parts: int) -> int:
  """New tokens of a response in a draw, at most, wherever it stands; its own limit aside.

  Args:
    draw: the number of its group's prompt.
    parts: draws that its group was in. In the last that it may be in, it runs to its end.
  """
  if parts >= config.rollout.max_staleness:
    return int(config.rollout.max_response_length)
  return budget(draw, config.rollout.carry_tokens)


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

  So programs always see one shape. The three are mixed evenly, for each process to get as much of each.

  Args:
    prompts: of the data set.
  """
  begun = [(int(draw), prompts[row]) for draw, row in zip(unfinished.draws, unfinished.rows, strict=True)]
  nobody = [(0, NOBODY)] * (most_groups(config) - len(begun) - len(new))
  return mix(begun, new, nobody)


def mix(*parts: Sequence[Item]) -> list[Item]:
  """One sequence of all, of which any stretch has about as much of each part as any other.

  >>> "".join(mix("aaaa", "bb", "c"))
  'abacaba'
  """
  keys = np.concatenate([(np.arange(len(part)) + 0.5) / max(len(part), 1) for part in parts])
  every = [item for part in parts for item in part]
  return [every[i] for i in np.argsort(keys, kind="stable")]


def places(unfinished: Unfinished, numbered: Draws) -> np.ndarray:
  """int32[P] which of the unfinished groups each of a draw's prompts is; -1: it begins."""
  begun = {int(draw): k for k, draw in enumerate(unfinished.draws)}
  return np.array([-1 if prompt is NOBODY else begun.get(draw, -1) for draw, prompt in numbered], np.int32)


def beginnings(unfinished: Unfinished, numbered: Draws) -> list[list[Beginning | None]]:
  """What there is already of each response to a draw's prompts; None: nothing."""

  def of_group(k: int) -> list[Beginning | None]:
    return [
      Beginning(
        tokens=unfinished.tokens[k, g, :length],
        logprobs=unfinished.logprobs[k, g, :length],
        finished=bool(unfinished.finished[k, g]),
        parts=int(unfinished.parts[k]),
      )
      for g, length in enumerate(unfinished.lengths[k])
    ]

  samples = unfinished.lengths.shape[1]
  return [of_group(int(k)) if k >= 0 else [None] * samples for k in places(unfinished, numbered)]


def limits(config: ConfigDict, unfinished: Unfinished, numbered: Draws) -> np.ndarray:
  """int32[P, G] new tokens that each response to a draw's prompts may get.

  >>> from rlpr_jax.config import default
  >>> config, prompt = default(), Prompt(ids=np.array([5]))
  >>> config.samples_per_prompt, config.rollout.max_response_length, config.rollout.carry_tokens = 2, 9, 4
  >>> begun = Unfinished(*(np.zeros((1, *x.shape[1:]), x.dtype) for x in Unfinished.empty(2, 9)))
  >>> begun = begun._replace(lengths=np.array([[4, 2]]), finished=np.array([[False, True]]))
  >>> limits(config, begun, [(1, prompt), (0, prompt)]).tolist()
  [[2, 2], [4, 0]]
  >>> limits(config, begun._replace(parts=np.array([1])), [(0, prompt)]).tolist()  # the last draw that it may be in
  [[5, 0]]
  """
  most, which = config.rollout.max_response_length, places(unfinished, numbered)
  left = np.full((len(numbered), config.samples_per_prompt), most, np.int32)
  begun, its = which >= 0, which[which >= 0]
  left[begun] = np.where(unfinished.finished[its], 0, most - unfinished.lengths[its])
  parts = np.zeros(len(numbered), np.int32)
  parts[begun] = unfinished.parts[its]
  new = [most_new(config, draw, int(n)) for (draw, _), n in zip(numbered, parts, strict=True)]
  return np.minimum(left, np.array(new, np.int32)[:, None])


def with_scores(rollouts: Rollouts, unfinished: Unfinished, numbered: Draws) -> Rollouts:
  """Rollouts with the scores of responses that had ended before.

  Args:
    numbered: the prompts of these rollouts.
  """
  which = places(unfinished, numbered)
  begun, its = np.flatnonzero(which >= 0), which[which >= 0]
  groups, samples = np.nonzero(unfinished.finished[its])
  rows = begun[groups] * unfinished.finished.shape[1] + samples
  found = {}
  for name in _SCORED:
    found[name] = getattr(rollouts, name).copy()
    found[name][rows] = getattr(unfinished, name)[its[groups], samples]
  return rollouts._replace(**found)


def part(
  config: ConfigDict, unfinished: Unfinished, numbered: Draws, rollouts: Rollouts, step: int
) -> tuple[np.ndarray, Unfinished, np.ndarray]:
  """Tells which groups of a draw have ended, and which go on.

  Args:
    unfinished: those of the draw before.
    numbered: all prompts of this one, as of `with_begun`.
    rollouts: of all processes.
    step: training steps finished.

  Returns:
    ended: bool[P], nobody's not among them.
    unfinished: the others of somebody.
    ages: int32[P, G, T] steps since each token was sampled.
  """
  most, shape = config.rollout.max_response_length, (len(numbered), config.samples_per_prompt)
  tokens, logprobs = (x.reshape(*shape, most) for x in (rollouts.tokens, rollouts.logprobs))
  lengths, finished, refused = (x.reshape(shape) for x in (rollouts.lengths, rollouts.finished, rollouts.refused))
  which = places(unfinished, numbered)
  begun, its = which >= 0, which[which >= 0]
  steps = np.full(tokens.shape, step, np.int32)
  old = np.arange(most) < unfinished.lengths[its, :, None]
  steps[begun] = np.where(old, unfinished.steps[its], step)
  parts = np.ones(len(numbered), np.int32)
  parts[begun] += unfinished.parts[its]
  somebody = np.array([prompt is not NOBODY for _, prompt in numbered], bool)
  ended = somebody & (finished | refused | (lengths >= most)).all(axis=1)
  every = Unfinished(
    draws=np.array([draw for draw, _ in numbered], np.uint32),
    rows=np.array([prompt.row for _, prompt in numbered], np.int32),
    parts=parts,
    tokens=tokens,
    lengths=lengths,
    logprobs=logprobs,
    steps=steps,
    finished=finished,
    **{name: x.reshape(*shape, *x.shape[1:]) for name in _SCORED for x in [getattr(rollouts, name)]},
  )
  return ended, every.take(somebody & ~ended), step - steps
