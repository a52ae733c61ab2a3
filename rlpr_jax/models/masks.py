"""Which earlier tokens each token sees."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from rlpr_jax.types import AnyArray

UNSEEN = int(np.iinfo(np.int32).max)  # position of a cache slot that holds nothing


class Seen(NamedTuple):
  """Which tokens of a row's cached text each new token sees: from `begins` to before `ends`."""

  begins: Int[Array, "B T"]
  ends: Int[Array, "B T"]


class Places(NamedTuple):
  """Where the tokens of packed rows stand. A token sees those before it in its segment, and itself.

  Segments are contiguous, and so are groups of them. The first segment of a group is a stem, the others are branches,
  each of which goes on from the stem's end and sees it too; a segment alone in its group is a plain sequence.
  """

  segment_ids: Int[AnyArray, "B T"]
  windowed: Bool[Array, ""] | None = None  # whether this layer has the window; None for no
  positions: Int[AnyArray, "B T"] | None = None  # in the text; needed for cached tokens alone
  group_ids: Int[AnyArray, "B T"] | None = None  # None where each segment is a group

  def first_visible(self, window: int | None) -> Int[Array, "B T"]:
    """The first place that each token sees."""
    return first_visible(self.segment_ids, window, self.windowed, self.group_ids)

  def visible_until(self) -> Int[Array, "B T"] | None:
    """The place from which on no token sees this one; None where `first_visible` says it all."""
    return None if self.group_ids is None else visible_until(self.segment_ids, self.group_ids)

  def sees(self, window: int | None) -> Bool[Array, "B T T"]:
    """Whether each token sees each of them."""
    places = jnp.arange(self.segment_ids.shape[1])
    mask = (places <= places[:, None]) & (places >= self.first_visible(window)[:, :, None])
    until = self.visible_until()
    return mask if until is None else mask & (places[:, None] < until[:, None])

  def sees_cached(self, cached: Int[Array, "B S"], window: int | None) -> Bool[Array, "B T S"]:
    """Whether each token sees each cached one: what stands before its segment begins, and nothing that stands later."""
    seen = self.seen_of_text(window)
    return (cached[:, None] >= seen.begins[:, :, None]) & (cached[:, None] < seen.ends[:, :, None])

  def seen_of_text(self, window: int | None) -> Seen:
    """The positions of a cached text that each token sees: those before its segment begins, and nothing later.

    Two answers behind a text of nine tokens, each begun with the text's last token; window 4:

    >>> places = Places(jnp.array([[1, 1, 1, 2, 2]]), jnp.array(True), positions=jnp.array([[8, 9, 10, 8, 9]]))
    >>> [x[0].tolist() for x in places.seen_of_text(4)]
    [[5, 6, 7, 5, 6], [8, 8, 8, 8, 8]]
    """
    if self.positions is None:
      raise ValueError("positions: expected those of the tokens, where others are cached")
    places = jnp.arange(self.segment_ids.shape[1])
    positions = jnp.asarray(self.positions)
    ends = positions - (places - first_visible(self.segment_ids, None, None))  # the segment begins there
    begins = jnp.zeros_like(ends)
    if self.windowed is not None and window is not None:
      begins = jnp.where(self.windowed, jnp.maximum(positions - window + 1, 0), 0)
    return Seen(begins, ends)


class Spans(NamedTuple):
  """Where the text of each token begins and goes on in its row."""

  group: Int[Array, "B T"]  # where its group begins
  stem_end: Int[Array, "B T"]  # of a branch's tokens: where its group's stem ends; 0 in a stem
  branch: Int[Array, "B T"]  # of a branch's tokens: where the branch begins; 0 in a stem

  @classmethod
  def of(cls, segment_ids: Int[AnyArray, "B T"], group_ids: Int[AnyArray, "B T"] | None) -> "Spans":
    """Finds them by the ids.

    A group of a stem and two branches; then a plain sequence:

    >>> spans = Spans.of(jnp.array([[1, 1, 2, 2, 3, 4, 4]]), jnp.array([[1, 1, 1, 1, 1, 2, 2]]))
    >>> spans.group[0].tolist(), spans.stem_end[0].tolist(), spans.branch[0].tolist()
    ([0, 0, 0, 0, 0, 5, 5], [0, 0, 2, 2, 2, 0, 0], [0, 0, 2, 2, 4, 0, 0])
    """
    segment = _begins(segment_ids)
    group = segment if group_ids is None else _begins(group_ids)
    in_branch = segment > group
    first_branch = in_branch & ~jnp.pad(in_branch[:, :-1], ((0, 0), (1, 0)))
    stem_end = jax.lax.cummax(jnp.where(first_branch, _places(segment_ids), 0), axis=1)
    return cls(group, jnp.where(in_branch, stem_end, 0), jnp.where(in_branch, segment, 0))


def predecessors(segment_ids: Int[AnyArray, "B T"], group_ids: Int[AnyArray, "B T"] | None) -> Int[Array, "B T"]:
  """The place of the token before each in its text, where it is predicted; of the first of all -1.

  The first token of a branch follows the last of the stem:

  >>> predecessors(jnp.array([[1, 1, 2, 2, 3]]), jnp.array([[1, 1, 1, 1, 1]])).tolist()
  [[-1, 0, 1, 2, 1]]
  """
  spans, places = Spans.of(segment_ids, group_ids), _places(segment_ids)
  begins = (spans.branch > 0) & (places == spans.branch)
  return jnp.where(begins, spans.stem_end, places) - 1


def alignment(length: int) -> int:
  """Of what number the ends of stems, and the beginnings of branches, are multiples in rows of this length.

  Splash is told of both, and of a query's place, in one number of 32 bits.

  >>> alignment(1024), alignment(4096), alignment(8192)
  (1, 4, 16)
  """
  bits = (length - 1).bit_length()
  return int(2 ** max(0, math.ceil((3 * bits - 32) / 2)))


def first_visible(
  segment_ids: Int[AnyArray, "B T"],
  window: int | None,
  windowed: Bool[Array, ""] | None,
  group_ids: Int[AnyArray, "B T"] | None = None,
) -> Int[Array, "B T"]:
  """The first place that each token of a packed row sees; it sees all from there to itself that `visible_until` allows.

  segment_ids 1 1 2 2 2 0 (0 is padding), window 2:

    sees     first_visible    with the window
    1 . . . . .    0                0
    1 1 . . . .    0                0
    . . 1 . . .    2                2
    . . 1 1 . .    2                2
    . . 1 1 1 .    2                3
    . . . . . 1    5                5

  >>> first_visible(jnp.array([[1, 1, 2, 2, 2, 0]]), 2, jnp.array(True)).tolist()
  [[0, 0, 2, 2, 3, 5]]

  The same with 1 as a stem and 2 and 3 as its branches: a window reaches over the branches between.

    sees           first_visible   with the window   visible_until
    1 . . . . .          0                0                6
    1 1 . . . .          0                0                6
    1 1 2 . . .          0                1                4
    1 1 2 2 . .          0                2                4
    1 1 . . 3 .          0                1                6
    1 1 . . 3 3          0                4                6

  >>> first_visible(jnp.array([[1, 1, 2, 2, 3, 3]]), 2, jnp.array(True), jnp.ones((1, 6), int)).tolist()
  [[0, 0, 1, 2, 1, 4]]
  """
  spans = Spans.of(segment_ids, group_ids)
  if windowed is None or window is None:
    return spans.group
  oldest = _places(segment_ids) - window + 1
  hole = spans.branch - spans.stem_end  # what lies between a stem and the branch
  oldest = jnp.where(oldest < spans.branch, oldest - hole, oldest)
  return jnp.where(windowed, jnp.maximum(spans.group, oldest), spans.group)


def visible_until(segment_ids: Int[AnyArray, "B T"], group_ids: Int[AnyArray, "B T"]) -> Int[Array, "B T"]:
  """The place from which on no token sees this one: the end of a stem's group, or of the branch.

  >>> visible_until(jnp.array([[1, 1, 2, 2, 3, 3]]), jnp.ones((1, 6), int)).tolist()
  [[6, 6, 4, 4, 6, 6]]
  """
  in_stem = Spans.of(segment_ids, group_ids).branch == 0
  return jnp.where(in_stem, _ends(group_ids), _ends(segment_ids))


def visible_blocks(spans: Spans, window: int | None, block: int) -> Bool[Array, "A A"]:
  """Whether some token of each block sees one of each other; what `Places.sees` says, by blocks.

  Args:
    spans: of the places of one row, [S].

  >>> ids = jnp.array([[1, 1, 2, 2, 3, 3]])  # a stem and two branches
  >>> spans = jax.tree.map(lambda x: x[0], Spans.of(ids, jnp.ones_like(ids)))
  >>> visible_blocks(spans, None, block=2).astype(int).tolist()
  [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
  """
  places = jnp.arange(len(spans.group))
  blocks = jnp.arange(0, len(places), block)  # first places

  def hits(first: Int[Array, "S"], end: Int[Array, "S"]) -> Bool[Array, "S A"]:
    """Whether what lies from `first` to before `end` reaches into each block."""
    return (first < end)[:, None] & (first[:, None] < blocks + block) & (end[:, None] > blocks)

  own = jnp.where(spans.branch > 0, spans.branch, spans.group)
  in_stem = spans.group  # of a branch's tokens: the first that they see there
  if window is not None:
    oldest = places - window + 1
    own = jnp.maximum(own, oldest)
    in_stem = jnp.maximum(in_stem, oldest - (spans.branch - spans.stem_end))
  seen = hits(own, places + 1) | hits(in_stem, spans.stem_end)
  return jnp.any(seen.reshape(len(blocks), block, -1), axis=1)


def _places(ids: Int[AnyArray, "B T"]) -> Int[Array, "B T"]:
  return jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)


def _begins(ids: Int[AnyArray, "B T"]) -> Int[Array, "B T"]:
  """Where the run of equal ids begins in which each place lies."""
  changes = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)))
  return jax.lax.cummax(jnp.where(changes, _places(ids), 0), axis=1)


def _ends(ids: Int[AnyArray, "B T"]) -> Int[Array, "B T"]:
  """Where that run ends."""
  length = ids.shape[1]
  return length - jnp.flip(_begins(jnp.flip(jnp.asarray(ids), axis=1)), axis=1)
