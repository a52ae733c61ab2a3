"""Long work before and between the steps, kept as it goes in WORKDIR/unfinished: a stop or a kill loses a minute of it.

What is computed for each of many prompts is kept as rows of numbers by the prompt's place. A warm start has checkpoints
of its own there.
"""

import hashlib
import pathlib
import shutil
import struct
import sys
import time
import zlib

import jax
import numpy as np

from rlpr_jax import processes
from rlpr_jax.runs.storage import reason

EVERY = 60  # seconds between two times that work under way is kept
_HEAD = struct.Struct("<III")  # of a record: rows, numbers in each, checksum of what follows


def directory(workdir: pathlib.Path) -> pathlib.Path:
  return workdir / "unfinished"


def clear(workdir: pathlib.Path) -> None:
  """Forgets what was kept, since a checkpoint holds what came of it. All processes have to be done with it."""
  if processes.is_first():
    shutil.rmtree(directory(workdir), ignore_errors=True)


class KeptRows:
  """Rows of float32 numbers that were computed so far, on disk. Each process writes a file, and all read all of them.

  >>> import tempfile
  >>> with tempfile.TemporaryDirectory() as name:
  ...   KeptRows(pathlib.Path(name), "r", of="model A").add({7: np.ones(2, np.float32)})
  ...   sorted(KeptRows(pathlib.Path(name), "r", of="model A").rows)  # the next time
  [7]
  """

  def __init__(self, workdir: pathlib.Path, name: str, of: str):
    """Reads what is there.

    Args:
      name: of the work.
      of: all that it depends on, as text; rows of anything else are not read.
    """
    self._stem = f"{name}-{hashlib.sha256(of.encode()).hexdigest()[:16]}"
    self._directory = directory(workdir)
    self._path = self._directory / f"{self._stem}-{jax.process_index()}.rows"
    self._new: dict[int, np.ndarray] = {}
    self._kept_at = time.monotonic()
    self._lost = False  # trouble with the storage was said
    self.rows: dict[int, np.ndarray] = {}  # float32[width] by place
    for path in sorted(self._directory.glob(f"{self._stem}-*.rows")):
      self.rows |= _read(path)
    processes.any_of(False)  # all have read before one writes

  def add(self, rows: dict[int, np.ndarray], seconds: float = 0) -> None:
    """Takes more rows; writes them once so many seconds have passed since the last time."""
    self._new |= rows
    if self._new and time.monotonic() - self._kept_at >= seconds:
      self.write()

  def write(self) -> None:
    """Appends the new rows. Without them more would have to be computed again, and nothing else: no error is raised."""
    self._kept_at, new = time.monotonic(), self._new
    if not new:
      return
    values = np.stack(list(new.values())).astype("<f4")
    body = np.array(list(new), "<u4").tobytes() + values.tobytes()
    try:
      self._directory.mkdir(exist_ok=True)
      with self._path.open("ab") as file:
        file.write(_HEAD.pack(*values.shape, zlib.crc32(body)) + body)
    except OSError as error:
      if not self._lost:
        print(f"{self._path}: {reason(error)}, going on without it", file=sys.stderr, flush=True)
      self._lost = True
    else:
      self.rows |= new
      self._new = {}


def _read(path: pathlib.Path) -> dict[int, np.ndarray]:
  """The rows of a file, up to a record that was broken off."""
  try:
    content = path.read_bytes()
  except OSError:
    return {}
  rows: dict[int, np.ndarray] = {}
  while len(content) >= _HEAD.size:
    count, width, checksum = _HEAD.unpack_from(content)
    end = _HEAD.size + 4 * count * (1 + width)
    body, content = content[_HEAD.size : end], content[end:]
    if zlib.crc32(body) != checksum or len(body) != 4 * count * (1 + width):
      break
    places = np.frombuffer(body, "<u4", count)
    values = np.frombuffer(body, "<f4", count * width, 4 * count).reshape(count, width)
    rows |= dict(zip(places.tolist(), values.astype(np.float32), strict=True))
  return rows
