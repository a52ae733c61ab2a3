"""From groups of responses to the rows an update trains on."""

from collections.abc import Iterable, Sequence
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


def minibatches(
  groups: Groups, prompts_per_step: int, count: int, aggregate: str, row_length: int, micro_batch_rows: int
) -> list[PackedRows]:
  """Splits the groups of a step into `count` minibatches of prompts_per_step / count groups.

  Groups are dealt in turn, so that when fewer were kept than a step wants every minibatch is short by the same; rows
  are padded to one number for all. A minibatch without any group is left out.
  """
  sequences = prompts_per_step // count * groups.lengths.shape[1]
  rows = -(-sequences // micro_batch_rows) * micro_batch_rows
  dealt = [groups.take(slice(first, None, count)) for first in range(count)]
  return [pack(part, aggregate, rows, row_length) for part in dealt if part.count]


def pack(groups: Groups, aggregate: str, rows: int, row_length: int) -> PackedRows:
  """The responses of one minibatch, each behind its prompt, first-fit into rows; what is left of them is padding.

  With a gradient through the reference answer, the answer stands in the place of what the response wrote from
  `<answer>` on, and the advantage reaches the tokens before it.
  """
  segments = to_segments(groups, sequence_weights(groups, aggregate, rows))
  return lay(segments, first_fit([segment.tokens.size for segment in segments], row_length), rows, row_length)


class Segment(NamedTuple):
  """A prompt and what follows it; fields as in `PackedRows`."""

  tokens: np.ndarray  # int32[N]
  mask: np.ndarray  # bool[N]
  old_logprobs: np.ndarray  # float32[N]
  advantage: float  # of each sampled token, as is
  weight: float
  answer_weights: np.ndarray | None = None  # float32[N]


def sampled_lengths(groups: Groups) -> np.ndarray:
  """int32[K, G] sampled tokens that are trained on: those before the reference answer where that takes their place."""
  if groups.answers is None:
    return groups.lengths
  return np.where(groups.answers.mask.any(axis=2), groups.answers.starts, groups.lengths)


def sequence_weights(groups: Groups, aggregate: str, most: int) -> np.ndarray:
  """float32[K * G] weight of each trained token of a sequence, in a minibatch that could hold `most` sequences."""
  tokens = sampled_lengths(groups)
  if groups.answers is not None:
    tokens = tokens + groups.answers.mask.sum(axis=2)
  padded = np.zeros(most, np.int32)  # one shape whatever was kept, so that nothing compiles again
  padded[: tokens.size] = tokens.reshape(-1)
  return np.asarray(grpo.sequence_weights(padded, aggregate, groups.tokens.shape[2]))[: tokens.size]


def to_segments(groups: Groups, weights: np.ndarray) -> list[Segment]:
  """The K * G sequences, group after group, with their weights [K * G]."""
  answers, sampled = groups.answers, sampled_lengths(groups)
  out = []
  for (k, g), weight in zip(np.ndindex(sampled.shape), weights, strict=True):
    start, end = groups.prompt_lengths[k], groups.prompt_lengths[k] + sampled[k, g]
    parts = [groups.prompt_tokens[k, :start], groups.tokens[k, g, : end - start]]
    places = np.flatnonzero(answers.mask[k, g]) if answers else np.zeros(0, int)
    if places.size:
      parts.append(answers.tokens[k, g, : places[-1] + 1])
    tokens = np.concatenate(parts)
    mask, old_logprobs = np.zeros(tokens.size, bool), np.zeros(tokens.size, np.float32)
    mask[start:end], old_logprobs[start:end] = True, groups.logprobs[k, g, : end - start]
    segment = Segment(tokens, mask, old_logprobs, groups.advantages[k, g], weight)
    if answers:
      answer_weights = np.zeros(tokens.size, np.float32)
      answer_weights[end + places] = answers.weights[k, g] * weight
      segment = segment._replace(answer_weights=answer_weights)
    out.append(segment)
  return out


def first_fit(lengths: Iterable[int], row_length: int) -> np.ndarray:
  """Places for sequences: the longest first, each in the first row that has room (first-fit decreasing).

  Depends on nothing but the lengths; equal ones keep their order.

  Returns:
    int32[N, 2]: row and first place in it of each sequence, in the order given.
  """
  lengths = np.asarray(lengths, np.int32).reshape(-1)
  places, filled = np.zeros((lengths.size, 2), np.int32), np.zeros(lengths.size, np.int32)
  for i in np.argsort(-lengths, kind="stable"):
    row = np.argmax(filled + lengths[i] <= row_length)
    places[i] = row, filled[row]
    filled[row] += lengths[i]
  return places


def lay(segments: Sequence[Segment], places: np.ndarray, rows: int, row_length: int) -> PackedRows:
  """Rows with each segment at its place; those of a row are numbered as they stand in it."""
  out, count = empty_rows(rows, row_length), np.zeros(rows, np.int32)
  if segments[0].answer_weights is not None:
    out = out._replace(answer_weights=np.zeros_like(out.weights))
  for i in np.lexsort(places.T[::-1]):
    segment, (row, start) = segments[i], places[i]
    here = row, slice(start, start + segment.tokens.size)
    count[row] += 1
    out.segment_ids[here] = count[row]
    out.tokens[here] = segment.tokens
    out.positions[here] = np.arange(segment.tokens.size)
    out.mask[here] = segment.mask
    out.old_logprobs[here] = segment.old_logprobs
    out.advantages[here] = segment.mask * segment.advantage
    out.weights[here] = segment.mask * segment.weight
    if out.answer_weights is not None:
      out.answer_weights[here] = segment.answer_weights
  return out
