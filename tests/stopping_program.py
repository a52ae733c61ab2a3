"""A program that runs until it is told to stop, and then takes SAVING seconds to save. It needs no JAX.

It says on stderr what it does, if somebody reads it, and leaves its process id in DIRECTORY, as the name of a file.
"""

import contextlib
import os
import pathlib
import time

from rlpr_jax.errors import exit_with_one_line
from rlpr_jax.runs.interrupt import StopRequest, watch_launcher


def say(word: str) -> None:
  with contextlib.suppress(BrokenPipeError):
    os.write(2, f"{word}\n".encode())


def main() -> None:
  with exit_with_one_line():
    with StopRequest() as stop:
      watch_launcher()
      if "DIRECTORY" in os.environ:
        (pathlib.Path(os.environ["DIRECTORY"]) / str(os.getpid())).touch()
      say("ready")
      while not stop:
        time.sleep(0.02)
      say("saving")
      time.sleep(float(os.environ.get("SAVING", "0.5")))
    say("saved")


if __name__ == "__main__":
  main()
