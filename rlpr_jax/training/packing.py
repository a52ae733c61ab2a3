"""From groups of responses to the rows an update trains on."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from rlpr_jax import grpo


class Answers(NamedTuple):
  """Reference answers in the place of the responses' own, for a gradient through them. numpy."""

  weights: np.ndarray  # float32[K, G] of -log p(answer)
  starts: np.ndarray  # int32[K, G] tokens of the response that stand before the suffix
  tokens: np.ndarray  # int32[K, G, E] the suffix
  mask: np.ndarray  # bool[K, G, E] True on the answer's own tokens; nowhere if the response has no place for it


class Groups(NamedTuple):
  """Kept prompts and their G responses each, with all that an update needs to know of them. numpy."""

  prompt_tokens: np.ndarray  # int32[K, S]
  prompt_lengths: np.ndarray  # int32[K]
  tokens: np.ndarray  # int32[K, G, T]
  lengths: np.ndarray  # int32[K, G]
  logprobs: np.ndarray  # float32[K, G, T] under the policy that sampled
  advantages: np.ndarray  # float32[K, G]
  answers: Answers | None = None  # None where no gradient goes through them

  @property
  def count(self) -> int:
    return len(self.prompt_lengths)

  def take(self, which: slice | np.ndarray) -> "Groups":
    """The groups that an index, a slice or a mask over K selects."""
    return jax.tree.map(lambda field: field[which], self)


class PackedRows(NamedTuple):
  """Token rows for the update. Segment ids count the sequences of a row from 1; 0 is padding."""

  tokens: np.ndarray  # int32[R, L]
  positions: np.ndarray  # int32[R, L] within the segment
  segment_ids: np.ndarray  # int32[R, L]
  mask: np.ndarray  # bool[R, L] True on sampled tokens, EOS included
  old_logprobs: np.ndarray  # float32[R, L] of the token at the same place
  advantages: np.ndarray  # float32[R, L]
  weights: np.ndarray  # float32[R, L] loss = sum(weights * token loss), over the whole minibatch
  answer_weights: np.ndarray | None = None  # float32[R, L] loss -= sum(answer_weights * log p); None for no such term
  reference_logprobs: np.ndarray | None = None  # float32[R, L] under the initial policy; None without a KL term


def empty_rows(rows: int, length: int) -> PackedRows:
  """Rows of padding."""
  shape = (rows, length)
  return PackedRows(
    tokens=np.zeros(shape, np.int32),
    positions=np.zeros(shape, np.int32),
    segment_ids=np.zeros(shape, np.int32),
    mask=np.zeros(shape, bool),
    old_logprobs=np.zeros(shape, np.float32),
    advantages=np.zeros(shape, np.float32),
    weights=np.zeros(shape, np.float32),
  )


def concatenate(groups: Sequence[Groups]) -> Groups:
  return jax.tree.map(lambda *fields: np.concatenate(fields), *groups)


def minibatches(groups: Groups, prompts_per_step: int, count: int, aggregate: str) -> list[PackedRows]:
  """Splits the groups of a step into `count` minibatches of prompts_per_step / count groups.

  Groups are dealt in turn, so that when fewer were kept than a step wants every minibatch is short by the same; what is
  missing is rows of padding, which weigh nothing. A minibatch without any group is left out.
  """
  size = prompts_per_step // count
  dealt = [groups.take(slice(first, None, count)) for first in range(count)]
  return [pack(part, size, aggregate) for part in dealt if part.count]


def pack(groups: Groups, size: int, aggregate: str) -> PackedRows:
  """One row a response, prompt and response adjoining, for `size` groups; the rows of missing groups are padding.

  With a gradient through the reference answer, the answer stands in the place of what the response wrote from
  `<answer>` on, and the advantage reaches the tokens before it.
  """
  (samples, limit), answers = groups.tokens.shape[1:], groups.answers
  width = 0 if answers is None else answers.tokens.shape[2]
  out = empty_rows(size * samples, groups.prompt_tokens.shape[1] + limit + width)
  answer_weights, on_answers = np.zeros_like(out.weights), np.zeros_like(out.mask)
  for row in range(groups.count * samples):
    k, g = divmod(row, samples)
    spliced = np.flatnonzero(answers.mask[k, g]) if answers else np.zeros(0, int)
    start, tokens = groups.prompt_lengths[k], answers.starts[k, g] if spliced.size else groups.lengths[k, g]
    end = start + tokens
    out.tokens[row, :start] = groups.prompt_tokens[k, :start]
    out.tokens[row, start:end] = groups.tokens[k, g, :tokens]
    out.mask[row, start:end] = True
    out.old_logprobs[row, start:end] = groups.logprobs[k, g, :tokens]
    out.advantages[row, start:end] = groups.advantages[k, g]
    if spliced.size:
      on_answers[row, end + spliced] = True
      answer_weights[row, end + spliced] = answers.weights[k, g]
      suffix = spliced[-1] + 1
      out.tokens[row, end : end + suffix] = answers.tokens[k, g, :suffix]
      end += suffix
    out.positions[row, :end] = np.arange(end)
    out.segment_ids[row, :end] = 1
  weights = np.asarray(grpo.token_weights(out.mask | on_answers, aggregate, limit))
  out = out._replace(weights=np.where(out.mask, weights, 0))
  return out if answers is None else out._replace(answer_weights=answer_weights * weights)
