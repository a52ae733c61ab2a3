"""From groups of responses to the rows an update trains on."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from rlpr_jax import grpo
from rlpr_jax.models.masks import alignment
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
  """Packs the responses of one minibatch behind their prompts into rows.

  With a gradient through the reference answer, the answer stands in the place of what the response wrote from
  `<answer>` on, and the advantage reaches the tokens before it.
  """
  return pack_trees(to_trees(groups, sequence_weights(groups, aggregate, rows)), rows, row_length)


class Branch(NamedTuple):
  """What follows a stem; fields as in `PackedRows`."""

  tokens: np.ndarray  # int32[N]
  mask: np.ndarray  # bool[N]
  old_logprobs: np.ndarray  # float32[N]
  advantages: np.ndarray | float  # float32[N] of sampled tokens, or of all of them, as they are
  weight: float
  answer_weights: np.ndarray | None = None  # float32[N]

  @classmethod
  def of_tokens(
    cls, tokens: np.ndarray, mask: np.ndarray | None = None, answer_weights: np.ndarray | None = None
  ) -> "Branch":
    """A text that is read and not trained on by its reward.

    Args:
      mask: which of its tokens' log-probabilities are asked for; None for none.

    >>> Branch.of_tokens(np.array([5, 6])).mask.tolist()
    [False, False]
    """
    return cls(
      tokens=tokens.astype(np.int32),
      mask=np.zeros(tokens.size, bool) if mask is None else mask,
      old_logprobs=np.zeros(tokens.size, np.float32),
      advantages=0.0,
      weight=0.0,
      answer_weights=answer_weights,
    )


class Tree(NamedTuple):
  """A stem and its branches: a prompt and texts that go on from it, each of which sees the stem and itself."""

  stem: np.ndarray  # int32[N], N > 0
  branches: list[Branch]


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


def to_trees(groups: Groups, weights: np.ndarray) -> list[Tree]:
  """The K prompts of groups, each with its G responses as branches; `weights` are those of the sequences, [K * G]."""
  weights = weights.reshape(groups.lengths.shape)
  trees = []
  for k, length in enumerate(groups.prompt_lengths):
    branches = [_to_branch(groups, (k, g), float(weights[k, g])) for g in range(groups.lengths.shape[1])]
    trees.append(Tree(groups.prompt_tokens[k, :length], branches))
  return trees


def _to_branch(groups: Groups, which: tuple[int, int], weight: float) -> Branch:
  """A response; up to the answer, and the reference in its place, where a gradient goes through that."""
  answers, end = groups.answers, groups.lengths[which]
  places = np.flatnonzero(answers.mask[which]) if answers else np.zeros(0, int)
  suffix = np.zeros(0, np.int32)
  if answers and places.size:
    end, suffix = answers.starts[which], answers.tokens[which][: places[-1] + 1]
  tokens = np.concatenate([groups.tokens[which][:end], suffix])
  mask, old_logprobs = np.zeros(tokens.size, bool), np.zeros(tokens.size, np.float32)
  mask[:end], old_logprobs[:end] = True, groups.logprobs[which][:end]
  advantages: np.ndarray | float = float(groups.advantages[which])
  if groups.credit is not None:
    of_answer = np.arange(tokens.size) >= groups.credit.starts[which]
    advantages = np.where(of_answer, groups.credit.advantages[which], advantages).astype(np.float32)
  if groups.importance is not None:
    importance = np.ones(tokens.size, np.float32)
    importance[:end] = groups.importance[which][:end]
    advantages = advantages * importance
  branch = Branch(tokens=tokens, mask=mask, old_logprobs=old_logprobs, advantages=advantages, weight=weight)
  if answers is None:
    return branch
  answer_weights = np.zeros(tokens.size, np.float32)
  answer_weights[end + places] = answers.weights[which][places] * weight
  return branch._replace(answer_weights=answer_weights)


class Piece(NamedTuple):
  """A tree in a row, with all of its branches or some."""

  tree: int  # its number
  row: int
  start: int  # place of the stem
  branches: list[tuple[int, int]]  # number and place of each


def pack_trees(trees: Sequence[Tree], rows: int, row_length: int) -> PackedRows:
  """Packs trees into rows; what is left of these is padding.

  >>> texts = [Branch.of_tokens(np.array(ids)) for ids in ([7, 8, 9], [4])]
  >>> pack_trees([Tree(np.array([5, 6]), texts)], rows=1, row_length=8).tokens.tolist()
  [[5, 6, 7, 8, 9, 4, 0, 0]]
  """
  return lay(trees, arrange(trees, row_length), rows, row_length)


def shortest_row(longest: int) -> int:
  """Tokens of the shortest rows with room for every stem and branch of so many tokens together.

  >>> shortest_row(1024), shortest_row(5120)  # of long rows the ends of stems are multiples of some number
  (1024, 5135)
  """
  length = longest
  while length < longest + alignment(length) - 1:
    length = longest + alignment(length) - 1
  return length


def arrange(trees: Sequence[Tree], row_length: int) -> list[Piece]:
  """Finds places for trees: the longest first, each in the first row that has room (first-fit decreasing).

  A tree that is longer than a row is cut between its branches, and its stem stands in each piece; so are others, where
  that fills the ends of rows and saves some of them. Depends on nothing but the lengths; equal ones keep their order.

  Returns:
    pieces by row and place in it; none of a stem without branches.

  Raises:
    ValueError: a stem without tokens, or one that has a branch for which a row is too short.

  >>> stem, texts = np.arange(2), [Branch.of_tokens(np.arange(n)) for n in (3, 1, 4)]
  >>> arrange([Tree(stem, texts)], row_length=8)
  [Piece(tree=0, row=0, start=0, branches=[(2, 2), (1, 6)]), Piece(tree=0, row=1, start=0, branches=[(0, 2)])]
  """
  whole, cut = (_first_fit(trees, row_length, fill) for fill in (False, True))
  best = min(whole, cut, key=lambda pieces: (max((piece.row for piece in pieces), default=-1), len(pieces)))
  return sorted(best, key=lambda piece: (piece.row, piece.start))


def _first_fit(trees: Sequence[Tree], row_length: int, fill: bool) -> list[Piece]:
  """`fill`: cut what has room in no row to fill those that are there, and not only what is longer than a row."""
  step = alignment(row_length)  # of the ends of stems and the beginnings of branches
  pieces: list[Piece] = []
  filled: list[int] = []  # places of each row

  def fit(tree: int, left: Sequence[int], row: int) -> tuple[Piece, int]:
    """As many branches as there is room for, and how far the row is filled then."""
    stem, branches = trees[tree]
    begin = filled[row] if row < len(filled) else 0
    place = _round_up(begin + stem.size, step)
    piece = Piece(tree, row, place - stem.size, [])
    for number in left:
      if place + branches[number].tokens.size <= row_length:
        piece.branches.append((number, place))
        place = _round_up(place + branches[number].tokens.size, step)
    return piece, place

  def take(piece: Piece, end: int) -> None:
    filled[piece.row : piece.row + 1] = [end]  # a new row, where it is the next
    pieces.append(piece)

  sizes = [tree.stem.size + sum(branch.tokens.size for branch in tree.branches) for tree in trees]
  for tree in np.argsort(-np.array(sizes, int), kind="stable").tolist():
    stem, branches = trees[tree]
    if not branches:
      continue
    left = sorted(range(len(branches)), key=lambda number: -branches[number].tokens.size)
    if not stem.size or _round_up(stem.size, step) + branches[left[0]].tokens.size > row_length:
      raise ValueError(f"tree {tree}: expected a stem with room for each branch behind it in {row_length} tokens")
    for row in range(len(filled)):
      piece, end = fit(tree, left, row)
      if len(piece.branches) == len(left):
        take(piece, end)
        break
    else:
      # No row has room for all of it.
      rows = sorted(range(len(filled)), key=lambda row: filled[row]) if fill else []
      while left:
        row = rows.pop(0) if rows else len(filled)
        piece, end = fit(tree, left, row)
        added = sum(branches[number].tokens.size for number, _ in piece.branches)
        if row == len(filled) or added > stem.size:
          take(piece, end)
          placed = {number for number, _ in piece.branches}
          left = [number for number in left if number not in placed]
  return pieces


def _round_up(place: int, step: int) -> int:
  return place + -place % step


def lay(trees: Sequence[Tree], pieces: Sequence[Piece], rows: int, row_length: int) -> PackedRows:
  """Lays trees at their places in rows; segments and groups are numbered as they stand there.

  Args:
    pieces: by row and place.

  >>> trees = [Tree(np.array([5]), [Branch.of_tokens(np.array([6]))])]
  >>> lay(trees, [Piece(tree=0, row=0, start=0, branches=[(0, 2)])], rows=1, row_length=4).segment_ids.tolist()
  [[1, 1, 2, 0]]
  """
  out = PackedRows.empty(rows, row_length)
  group_ids = np.zeros_like(out.segment_ids)
  out = out._replace(group_ids=group_ids)
  if any(branch.answer_weights is not None for tree in trees for branch in tree.branches):
    out = out._replace(answer_weights=np.zeros_like(out.weights))
  segments, groups = np.zeros((2, rows), np.int32)
  filled = np.zeros(rows, np.int32)

  def lay_segment(row: int, start: int, tokens: np.ndarray, position: int) -> slice:
    """The places of a segment. Those between it and the one before are as that one's: it ends before all of them."""
    here = slice(start, start + tokens.size)
    out.segment_ids[row, filled[row] : start], group_ids[row, filled[row] : start] = segments[row], groups[row]
    segments[row] += 1
    groups[row] += position == 0  # a stem
    out.segment_ids[row, here], group_ids[row, here] = segments[row], groups[row]
    out.tokens[row, here], out.positions[row, here] = tokens, position + np.arange(tokens.size)
    filled[row] = here.stop
    return here

  for piece in pieces:
    row, (stem, branches) = piece.row, trees[piece.tree]
    lay_segment(row, piece.start, stem, 0)
    for number, start in piece.branches:
      branch = branches[number]
      here = lay_segment(row, start, branch.tokens, stem.size)
      out.mask[row, here] = branch.mask
      out.old_logprobs[row, here] = branch.old_logprobs
      out.advantages[row, here] = branch.mask * branch.advantages
      out.weights[row, here] = branch.mask * branch.weight
      if out.answer_weights is not None and branch.answer_weights is not None:
        out.answer_weights[row, here] = branch.answer_weights
  return out
