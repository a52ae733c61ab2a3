"""How long the slots take for a step's responses, and how many of them are busy meanwhile: the scheduler by counting.

Nothing is compiled or sampled. Responses take a slot in the order in which they come, and leave it a call after the one
in which they ended, as in `sampling.scheduler`; lengths are drawn.
"""

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from ml_collections import ConfigDict

from rlpr_jax.training.carrying import mix, most_new

Item = TypeVar("Item")
DRAWS = 6  # that are simulated where groups go on
_FIRST = 2  # of them, in which a run settles


class Queue(NamedTuple):
  """What the slots of a process do in a training step."""

  steps: float  # of decoding
  tokens: float  # that are drawn
  read_again: float  # tokens of responses that are read because these go on
  texts_again: float  # those responses

  def occupancy(self, slots: int) -> float:
    """Share of the slots with a response that went on, on average over the steps."""
    return self.tokens / (self.steps * slots) if self.steps else 0.0


def decode_calls(lengths: Sequence[int], slots: int, tokens: int) -> int:
  """Calls of the decoding program, of so many tokens each, until responses of such lengths have ended.

  >>> decode_calls([8, 2, 2, 2], slots=2, tokens=2)  # the slot of a response of two is free in the next call but one
  5
  """
  free, last = [0] * slots, 0
  for length in lengths:
    end = heapq.heappop(free) + max(math.ceil(length / tokens), 1)
    last = max(last, end)
    heapq.heappush(free, end + 1)
  return last


def simulate(config: ConfigDict, groups: Sequence[Sequence[int]], slots: int, processes: int, draws: float) -> Queue:
  """A training step's decoding by each of so many processes, of which all wait for the slowest.

  Args:
    groups: tokens of each response of each group of `DRAWS` draws.
    slots: of a process.
    draws: that a step takes, on average.
  """
  tokens, each = config.rollout.decode_steps, config.rollout.prompts_per_draw
  if not draws:
    return Queue(0.0, 0.0, 0.0, 0.0)
  if config.rollout.carry == "none":
    most = min(math.ceil(draws), DRAWS)  # the next draw begins in the slots that one leaves free
    shares = [_shares(groups[draw * each : (draw + 1) * each], processes) for draw in range(most)]
    of_each = [
      [n for share in of_process for group in share for n in group] for of_process in zip(*shares, strict=True)
    ]
    calls = max(decode_calls(lengths, slots, tokens) for lengths in of_each)
    return Queue(calls * tokens * draws / most, sum(map(sum, of_each)) * draws / (most * processes), 0.0, 0.0)
  waiting: list[_Begun] = []
  calls, drawn, again, texts = 0, 0, 0, 0
  for draw in range(DRAWS):
    numbers = range(draw * each, (draw + 1) * each)
    every = mix(waiting, [_Begun(i, 0, list(groups[i]), [0] * len(groups[i])) for i in numbers])
    if draw >= _FIRST:
      in_order = [sorted(share, key=lambda group: -max(group.limits(config))) for share in _shares(every, processes)]
      work = [[n for group in of_process for n in group.work(config) if n] for of_process in in_order]
      calls += max(decode_calls(lengths, slots, tokens) for lengths in work)
      drawn += sum(sum(group.work(config)) for group in every)
      again += sum(done for group in waiting for left, done in zip(group.left, group.done, strict=True) if left)
      texts += sum(left > 0 for group in waiting for left in group.left)
    waiting = [group for group in (group.after(config) for group in every) if any(group.left)]
  each_step = draws / (DRAWS - _FIRST)
  each_process = each_step / processes
  return Queue(calls * tokens * each_step, drawn * each_process, again * each_process, texts * each_process)


class _Begun(NamedTuple):
  """A group in a draw; tokens of each of its responses."""

  number: int
  parts: int  # draws that it was in
  left: list[int]
  done: list[int]

  def limits(self, config: ConfigDict) -> list[int]:
    """New tokens that responses may get in this draw."""
    most, new = config.rollout.max_response_length, most_new(config, self.number, self.parts)
    return [min(most - done, new) if left else 0 for left, done in zip(self.left, self.done, strict=True)]

  def work(self, config: ConfigDict) -> list[int]:
    """Those that they get; 0 where nothing is left."""
    return [min(left, limit) for left, limit in zip(self.left, self.limits(config), strict=True)]

  def after(self, config: ConfigDict) -> "_Begun":
    """The group after this draw."""
    drawn = self.work(config)
    left = [n - more for n, more in zip(self.left, drawn, strict=True)]
    done = [n + more for n, more in zip(self.done, drawn, strict=True)]
    return _Begun(self.number, self.parts + 1, left, done)


def _shares(groups: Sequence[Item], processes: int) -> list[Sequence[Item]]:
  """The groups of each process."""
  size = -(-len(groups) // processes)
  return [groups[first : first + size] for first in range(0, len(groups), size)]
