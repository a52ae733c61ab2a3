"""Follows a file of JSON lines that somebody else writes: appends to, replaces, begins anew, deletes."""

import os
import pathlib
import zlib
from typing import BinaryIO, NamedTuple

from rlpr_jax.report.records import Json, parse


class Line(NamedTuple):
  """A whole line, and where it lies."""

  offset: int  # bytes
  size: int  # bytes, the newline left out
  content: Json


class News(NamedTuple):
  """What a look at a file found."""

  anew: bool  # everything read before is void: the file is another one, was cut or is gone
  lines: list[Line]
  damaged: int  # lines that are no JSON objects
  more: bool  # there is more to read at once


class Tail:
  """Reads a file of lines as it grows, each line once.

  A last line that is half written is left until it is whole. A file that was replaced, cut, or no longer has the line
  that was read last is read anew from its beginning.
  """

  def __init__(self, path: pathlib.Path):
    self.path = path
    self.read_bytes = 0  # so far, by all looks
    self._reset()

  def _reset(self) -> None:
    self._end = 0  # of what was read
    self._last = (0, 0, 0)  # offset, size and checksum of the last line that was read
    self._seen: tuple[int, ...] = ()  # of the file when all of it was read

  def has_read(self, state: os.stat_result) -> bool:
    """Whether all of the file was read, by what the file system says of it: then there is no need to open it."""
    return _sign(state) == self._seen

  def look(self, most: int) -> News:
    """Reads what is new, at most about `most` bytes of it, and at least one line."""
    try:
      with self.path.open("rb") as file:
        return self._look(file, most)
    except OSError:  # deleted, or not to be had for a moment
      had = self._end > 0
      self._reset()
      return News(had, [], 0, False)

  def _look(self, file: BinaryIO, most: int) -> News:
    state = os.fstat(file.fileno())
    seen = _sign(state)
    if seen == self._seen:
      return News(False, [], 0, False)
    anew = self._end > 0 and not self._goes_on(file, seen)
    if anew:
      self._reset()
    file.seek(self._end)
    lines, damaged, left = [], 0, most
    while left > 0 and (line := file.readline()):
      content = parse(line) if line.strip() else None
      if content is None and not line.endswith(b"\n"):
        break  # half written; what is whole is read though its newline has not come
      if content is not None:
        lines.append(Line(self._end, len(line.rstrip(b"\n")), content))
      damaged += content is None and bool(line.strip())
      self._last = (self._end, len(line), zlib.crc32(line))
      self._end += len(line)
      left -= len(line)
    self.read_bytes += most - left
    more = left <= 0 and self._end < state.st_size
    self._seen = () if more else seen
    return News(anew, lines, damaged, more)

  def _goes_on(self, file: BinaryIO, seen: tuple[int, ...]) -> bool:
    """Whether the file is the one that was read, with more behind it."""
    if self._seen and (seen[0] != self._seen[0] or seen[1] == self._seen[1]):
      return False
    offset, size, checksum = self._last
    file.seek(offset)
    return zlib.crc32(file.read(size)) == checksum


def _sign(state: os.stat_result) -> tuple[int, ...]:
  """What of a file is another when it was written."""
  return state.st_ino, state.st_size, state.st_mtime_ns
