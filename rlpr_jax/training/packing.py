"""From groups of responses to the rows an update trains on."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from rlpr_jax import grpo
from rlpr_jax.types import Groups, PackedRows


def concatenate(groups: Sequence[Groups]) -> Groups:
  """Joins groups in their order.

  >>> empty = Groups.empty(prompt_limit=4, samples=2, response_limit=3)
  >>> concatenate([empty, empty]).tokens.shape
  (0, 2, 3)
  """
  return jax.tree.map(lambda *fields: np.concatenate(fields), *groups)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackingSettings:
  """How a step's groups become minibatches of packed rows."""

  prompts_per_step: int  # most groups of a step
  minibatches: int  # into which they are split
  aggregate: str  # of token losses, as in `grpo.sequence_weights`
  row_length: int  # tokens of a row; the longest sequence fits
  micro_batch_rows: int  # the number of rows is a multiple of it


def pack_minibatches(groups: Groups, settings: PackingSettings) -> list[PackedRows]:
  """Splits the groups of a step into minibatches of prompts_per_step / minibatches groups, each packed into rows.

  Groups are dealt in turn, so that when fewer were kept than a step wants every minibatch is short by the same; rows
  are padded to one number for all. A minibatch without any group is left out.
  """
  count = settings.minibatches
  sequences = settings.prompts_per_step // count * groups.lengths.shape[1]
  rows = -(-sequences // settings.micro_batch_rows) * settings.micro_batch_rows
  dealt = [groups.take(slice(first, None, count)) for first in range(count)]
  return [pack(part, settings.aggregate, rows, settings.row_length) for part in dealt if part.num_groups]


def pack(groups: Groups, aggregate: str, rows: int, row_length: int) -> PackedRows:
  """Packs the responses of one minibatch, each behind its prompt, into rows.

  With a gradient through the reference answer, the answer stands in the place of what the response wrote from
  `<answer>` on, and the advantage reaches the tokens before it.
  """
  segments = to_segments(groups, sequence_weights(groups, aggregate, rows))
  return pack_segments(segments, rows, row_length)


class Segment(NamedTuple):
  """A prompt and what follows it; fields as in `PackedRows`."""

  tokens: np.ndarray  # int32[N]
  mask: np.ndarray  # bool[N]
  old_logprobs: np.ndarray  # float32[N]
  advantage: float  # of each sampled token, as is
  weight: float
  answer_weights: np.ndarray | None = None  # float32[N]

  @classmethod
  def of_tokens(cls, tokens: np.ndarray, answer_weights: np.ndarray | None = None) -> "Segment":
    """A text of which no token was sampled.

    >>> Segment.of_tokens(np.array([5, 6])).mask.tolist()
    [False, False]
    """
    zeros = np.zeros(tokens.size, np.float32)
    return cls(
      tokens=tokens.astype(np.int32),
      mask=np.zeros(tokens.size, bool),
      old_logprobs=zeros,
      advantage=0.0,
      weight=0.0,
      answer_weights=answer_weights,
    )


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
  """Splits groups into their K * G sequences, group after group, with the weights [K * G]."""
  answers, sampled = groups.answers, sampled_lengths(groups)
  segments = []
  for (k, g), weight in zip(np.ndindex(sampled.shape), weights, strict=True):
    start, end = groups.prompt_lengths[k], groups.prompt_lengths[k] + sampled[k, g]
    parts = [groups.prompt_tokens[k, :start], groups.tokens[k, g, : end - start]]
    places = np.flatnonzero(answers.mask[k, g]) if answers else np.zeros(0, int)
    if answers and places.size:
      parts.append(answers.tokens[k, g, : places[-1] + 1])
    tokens = np.concatenate(parts)
    mask, old_logprobs = np.zeros(tokens.size, bool), np.zeros(tokens.size, np.float32)
    mask[start:end], old_logprobs[start:end] = True, groups.logprobs[k, g, : end - start]
    segment = Segment(
      tokens=tokens, mask=mask, old_logprobs=old_logprobs, advantage=float(groups.advantages[k, g]), weight=weight
    )
    if answers:
      answer_weights = np.zeros(tokens.size, np.float32)
      answer_weights[end + places] = answers.weights[k, g] * weight
      segment = segment._replace(answer_weights=answer_weights)
    segments.append(segment)
  return segments


def pack_segments(segments: Sequence[Segment], rows: int, row_length: int) -> PackedRows:
  """Packs sequences first-fit into rows; what is left of them is padding.

  >>> texts = [Segment.of_tokens(np.array(ids)) for ids in ([5, 6], [7, 8, 9], [4])]
  >>> pack_segments(texts, rows=2, row_length=4).tokens.tolist()
  [[7, 8, 9, 4], [5, 6, 0, 0]]
  """
  places = first_fit([segment.tokens.size for segment in segments], row_length)
  return pack_rows(segments, places, rows, row_length)


def first_fit(lengths: Sequence[int] | np.ndarray, row_length: int) -> np.ndarray:
  """Finds places for sequences: the longest first, each in the first row that has room (first-fit decreasing).

  Depends on nothing but the lengths; equal ones keep their order.

  Returns:
    int32[N, 2]: row and first place in it of each sequence, in the order given.

  >>> first_fit([3, 7, 4], row_length=10).tolist()
  [[0, 7], [0, 0], [1, 0]]
  """
  lengths = np.asarray(lengths, np.int32).reshape(-1)
  places, filled = np.zeros((lengths.size, 2), np.int32), np.zeros(lengths.size, np.int32)
  for i in np.argsort(-lengths, kind="stable"):
    row = np.argmax(filled + lengths[i] <= row_length)
    places[i] = row, filled[row]
    filled[row] += lengths[i]
  return places


def pack_rows(segments: Sequence[Segment], places: np.ndarray, rows: int, row_length: int) -> PackedRows:
  """Lays each segment at its place in rows; those of a row are numbered as they stand in it.

  >>> texts = [Segment.of_tokens(np.array(ids)) for ids in ([5, 6], [7])]
  >>> pack_rows(texts, places=np.array([[0, 0], [0, 2]]), rows=1, row_length=4).segment_ids.tolist()
  [[1, 1, 2, 0]]
  """
  out, count = PackedRows.empty(rows, row_length), np.zeros(rows, np.int32)
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
