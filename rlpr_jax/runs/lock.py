"""One run a directory: a lock that refuses the second program, on one machine and over network disks.

WORKDIR/run.lock is there while a run writes, and says in one line of JSON whose it is. On one machine the kernel
decides: a `flock` ends with its process, however that ends. Other machines may see no flock, so the holder renews the
file's mtime as a sign of life. Who finds the file of another machine watches it for a while by its own clock: a change
means alive, none that it was left behind. The clocks of two machines are never compared.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import platform
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from rlpr_jax.errors import USAGE, InputError, trouble

NAME = "run.lock"
PERIOD = 5.0  # seconds between two signs of life
STALE = 4 * PERIOD  # seconds without one, after which another machine's lock counts as left behind
_DYING = 3.0  # seconds that a process which was just killed may take to end
_SAVING = 60.0  # seconds that a run which was told to stop is waited for
_LEASE = 120.0  # seconds after which a server of network disks has forgotten the locks of a machine that is gone
_LOOK = 0.2  # seconds between two looks


class _Holder(NamedTuple):
  """Who holds a lock, as its file says it."""

  host: str
  pid: int
  started: str  # what `_started` says of the process
  kernel: str  # of the machine, since it was booted
  numbering: str  # of processes: containers of one machine have one each
  token: str  # of this holding, to be told from an earlier or later one
  stopping: bool = False  # told to stop, and saving


def is_alive(pid: int) -> bool:
  """Whether a process of this machine runs; one that has ended may keep its number until somebody asks for its status.

  >>> is_alive(os.getpid())
  True
  """
  return _started(pid) != ""


@contextlib.contextmanager
def hold(workdir: pathlib.Path, stopping: Callable[[], bool] = lambda: False) -> Iterator[None]:
  """Around a run: no other one is in its directory meanwhile.

  A lock whose holder is gone is taken, on the same machine at once, on another when there was no sign of life for
  `STALE` seconds. A holder that was told to stop is waited for.

  Args:
    workdir: a directory that is there.
    stopping: whether this run was told to stop; then it does not wait for others, and others wait for it.

  Raises:
    InputError: another run is there; names its process and machine. Or the file cannot be written.
    MachineError: the disk is full or gone.

  >>> import tempfile
  >>> with tempfile.TemporaryDirectory() as directory, hold(pathlib.Path(directory)):
  ...   os.listdir(directory)
  ['run.lock']
  """
  path, ours = workdir / NAME, _ourselves()
  try:
    file = _acquire(path, ours, stopping)
  except OSError as error:
    raise trouble(error, f"{path}: cannot be written ({error.strerror})") from None
  ended = threading.Event()
  beat = threading.Thread(target=_show_life, args=(path, file, ours, stopping, ended), name="lock", daemon=True)
  beat.start()
  try:
    yield
  finally:
    ended.set()
    beat.join()
    with contextlib.suppress(OSError):
      if _is_ours(_read(path), ours):
        path.unlink()
    os.close(file)


def _acquire(path: pathlib.Path, ours: _Holder, stopping: Callable[[], bool]) -> int:
  """Takes the lock, when it is free or was left behind; returns its file, which stays open."""
  began, patience, told = time.monotonic(), _DYING, False
  first: object = None  # what was seen of another machine's lock, and since when
  since = 0.0
  while True:
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # opened anew each time: only then do network disks look again
    try:
      flocked, found, now = _flock(file), _read(path), time.monotonic()
      if flocked is not False and not _is_at(file, path):
        flocked, found = False, None  # its holder ended just now and took the file away
      is_free = _is_free(flocked, found, ours)
      if found and found.stopping:
        patience = max(patience, _SAVING)
      if found and is_free is None:
        patience, seen = _LEASE, (os.fstat(file).st_mtime_ns, found)
        if first and seen != first and not found.stopping:
          raise _in_use(path, found)
        if seen != first:
          first, since = seen, now
        is_free = now - since >= STALE and flocked is not False
      if is_free:
        _write(file, ours)
        return os.dup(file)  # which keeps its flock
      if now - began >= patience or stopping():
        raise _in_use(path, found)
      if found and patience > _DYING and not told:
        what = "has saved and ended" if found.stopping else f"shows that it is alive, or does not for {STALE:.0f}s"
        print(f"--workdir: {path.parent}: waiting until {_name(found)} {what}", flush=True)
        told = True
    finally:
      os.close(file)
    time.sleep(_LOOK)


def _is_free(flocked: bool | None, found: _Holder | None, ours: _Holder) -> bool | None:
  """Whether the lock can be taken; None where only its holder's signs of life can tell, by and by."""
  if found is None:
    return flocked is not False  # False: its holder has not written yet, or no more
  if found.kernel != ours.kernel:
    return None
  if flocked is not None:
    return flocked
  if found.numbering != ours.numbering:
    return None
  return _started(found.pid) != found.started


def _in_use(path: pathlib.Path, found: _Holder | None) -> InputError:
  return InputError(f"--workdir: {path.parent} is in use by {_name(found)}, expected one run at a time in a directory")


def _name(found: _Holder | None) -> str:
  return f"process {found.pid} on {found.host}" if found else "another process"


def _show_life(
  path: pathlib.Path, file: int, ours: _Holder, stopping: Callable[[], bool], ended: threading.Event
) -> None:
  """Renews the sign of life until the end. A run that was taken for dead, so that the directory is another's, ends."""
  renewed = time.monotonic()
  while not ended.wait(min(PERIOD, 1.0)):
    told = stopping() and not ours.stopping
    if not told and time.monotonic() - renewed < PERIOD:
      continue
    renewed = time.monotonic()
    with contextlib.suppress(OSError):  # trouble with the disk is for those who write to it
      found = _read(path)
      if found and not _is_ours(found, ours):
        _end(
          f"error: --workdir: {path.parent}: no sign of life of this run was seen, {_name(found)} has taken it over\n"
        )
      if found and told:
        ours = ours._replace(stopping=True)
        _write(file, ours)
      elif found:
        os.utime(path)


def _end(line: str) -> None:
  """Ends this process: whatever more it wrote would be in another's run."""
  with contextlib.suppress(Exception):
    os.write(sys.stderr.fileno(), line.encode())
  os._exit(USAGE)


# ---- the file ----


def _ourselves() -> _Holder:
  return _Holder(
    host=platform.node(),
    pid=os.getpid(),
    started=_started(os.getpid()),
    kernel=_content("/proc/sys/kernel/random/boot_id") or platform.node(),
    numbering=os.readlink("/proc/self/ns/pid") if os.path.lexists("/proc/self/ns/pid") else "",
    token=secrets.token_hex(8),
  )


def _is_ours(found: _Holder | None, ours: _Holder) -> bool:
  return found is not None and found.token == ours.token


def _read(path: pathlib.Path) -> _Holder | None:
  """Whose lock it is; None where it is nobody's, or not written yet."""
  try:
    return _Holder(**json.loads(path.read_text().partition("\n")[0]))
  except (FileNotFoundError, ValueError, TypeError, RecursionError):
    return None


def _write(file: int, ours: _Holder) -> None:
  """In place, and never empty in between: who reads takes the first line."""
  content = json.dumps(ours._asdict()).encode() + b"\n"
  os.pwrite(file, content, 0)
  os.ftruncate(file, len(content))
  os.fsync(file)


def _flock(file: int) -> bool | None:
  """Whether the file is locked for this process now; None where the disk knows no such locks."""
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError:
    return None
  return True


def _is_at(file: int, path: pathlib.Path) -> bool:
  try:
    return os.path.samestat(os.fstat(file), path.stat())
  except FileNotFoundError:
    return False


def _started(pid: int) -> str:
  """When a process began, which tells it from a later one of the same number; "" if it is gone."""
  if not os.path.exists("/proc/self/stat"):
    try:
      os.kill(pid, 0)
    except ProcessLookupError:
      return ""
    except PermissionError:
      pass
    return "running"
  fields = _content(f"/proc/{pid}/stat").rpartition(")")[2].split()
  return fields[19] if fields and fields[0] not in "ZX" else ""


def _content(path: str) -> str:
  try:
    return pathlib.Path(path).read_text().strip()
  except OSError:
    return ""
