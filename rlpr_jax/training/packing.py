"""From groups of responses to the rows an update trains on."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlpr_jax import grpo


class Groups(NamedTuple):
  """Kept prompts and their G responses each, with all that an update needs to know of them. numpy."""

  prompt_tokens: np.ndarray  # int32[K, S]
  prompt_lengths: np.ndarray  # int32[K]
  tokens: np.ndarray  # int32[K, G, T]
  lengths: np.ndarray  # int32[K, G]
  logprobs: np.ndarray  # float32[K, G, T] under the policy that sampled
  advantages: np.ndarray  # float32[K, G]

  @property
  def count(self) -> int:
    return len(self.prompt_lengths)

  def take(self, which: slice | np.ndarray) -> "Groups":
    """The groups that an index, a slice or a mask over K selects."""
    return Groups(*(field[which] for field in self))


class PackedRows(NamedTuple):
  """Token rows for the update. Segment ids count the sequences of a row from 1; 0 is padding."""

  tokens: np.ndarray  # int32[R, L]
  positions: np.ndarray  # int32[R, L] within the segment
  segment_ids: np.ndarray  # int32[R, L]
  mask: np.ndarray  # bool[R, L] True on response tokens, EOS included
  old_logprobs: np.ndarray  # float32[R, L] of the token at the same place
  advantages: np.ndarray  # float32[R, L]
  weights: np.ndarray  # float32[R, L] loss = sum(weights * token loss), over the whole minibatch


def concatenate(groups: Sequence[Groups]) -> Groups:
  return Groups(*(np.concatenate(fields) for fields in zip(*groups, strict=True)))


def minibatches(groups: Groups, prompts_per_step: int, count: int, aggregate: str) -> list[PackedRows]:
  """Splits the groups of a step into `count` minibatches of prompts_per_step / count groups.

  Groups are dealt in turn, so that when fewer were kept than a step wants every minibatch is short by the same; what is
  missing is rows of padding, which weigh nothing. A minibatch without any group is left out.
  """
  size = prompts_per_step // count
  dealt = [groups.take(slice(first, None, count)) for first in range(count)]
  return [pack(part, size, aggregate) for part in dealt if part.count]


def pack(groups: Groups, size: int, aggregate: str) -> PackedRows:
  """One row a response, prompt and response adjoining, for `size` groups; the rows of missing groups are padding."""
  samples, limit = groups.tokens.shape[1:]
  rows, length = size * samples, groups.prompt_tokens.shape[1] + limit
  out = PackedRows(
    tokens=np.zeros((rows, length), np.int32),
    positions=np.zeros((rows, length), np.int32),
    segment_ids=np.zeros((rows, length), np.int32),
    mask=np.zeros((rows, length), bool),
    old_logprobs=np.zeros((rows, length), np.float32),
    advantages=np.zeros((rows, length), np.float32),
    weights=np.zeros((rows, length), np.float32),
  )
  for row in range(groups.count * samples):
    k, g = divmod(row, samples)
    start, tokens = groups.prompt_lengths[k], groups.lengths[k, g]
    end = start + tokens
    out.tokens[row, :start] = groups.prompt_tokens[k, :start]
    out.tokens[row, start:end] = groups.tokens[k, g, :tokens]
    out.positions[row, :end] = np.arange(end)
    out.segment_ids[row, :end] = 1
    out.mask[row, start:end] = True
    out.old_logprobs[row, start:end] = groups.logprobs[k, g, :tokens]
    out.advantages[row, start:end] = groups.advantages[k, g]
  return out._replace(weights=np.asarray(grpo.token_weights(out.mask, aggregate, limit)))
