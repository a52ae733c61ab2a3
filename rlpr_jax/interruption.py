"""Ctrl-C while a program imports, which takes seconds.

Code that is imported may swallow a KeyboardInterrupt, or make an ImportError of it, and a traceback of it says nothing.
So until a program has begun, Ctrl-C ends it at once. In a process that merely imports this package nothing changes.
"""

import os
import pathlib
import signal
import sys
import threading
from types import FrameType

_LAUNCH = pathlib.Path(__file__).parents[1] / "launch"
STATUS = 130  # 128 + SIGINT, as of a program that a shell saw interrupted


def is_program(command: list[str], argv: list[str]) -> bool:
  """Whether Python is about to run a module of this package or a script of launch/, and imports the package for that.

  Args:
    command: `sys.orig_argv`.
    argv: `sys.argv`, which begins with -m as long as the module is looked for, or with the script.

  >>> is_program(["python", "-m", "rlpr_jax.train", "--workdir=a"], ["-m", "--workdir=a"])
  True
  >>> is_program(["python", "-m", "theirs"], ["-m"]), is_program(["python", "notebook.py"], ["notebook.py"])
  (False, False)
  """
  package = __name__.partition(".")[0]
  modules = [word.removeprefix("-m") for word in command]
  if argv and pathlib.Path(argv[0]).absolute().parent == _LAUNCH:
    return True
  return argv[:1] == ["-m"] and any(word.partition(".")[0] == package for word in modules)


def end_at_once() -> None:
  """From now on Ctrl-C ends this process with one line, where nobody else has said what it does."""
  is_python_s_own = signal.getsignal(signal.SIGINT) is signal.default_int_handler
  if is_python_s_own and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, _end)


def end_as_usual() -> None:
  """Undoes `end_at_once`: Ctrl-C raises KeyboardInterrupt again, by which a program tidies up."""
  if signal.getsignal(signal.SIGINT) is _end:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
  del number, frame
  try:
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"interrupted\n")
  finally:
    os._exit(STATUS)
