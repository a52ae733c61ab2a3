"""A page of a run's curves and rollouts that follows it while it trains: `rlpr view --workdir=RUN`.

On this machine's own address alone; from another machine through a tunnel: `ssh -L 8008:127.0.0.1:8008 HOST`.
"""

import pathlib
import signal
import threading
import webbrowser
from collections.abc import Sequence

from absl import flags

from rlpr_jax import command_line
from rlpr_jax.errors import InputError, exit_with_one_line
from rlpr_jax.runs.storage import reason
from rlpr_jax.viewer.server import Server, Viewer


def main(argv: Sequence[str] | None = None) -> None:
  """The program: `argv` is its name and its arguments, those of this process if None."""
  with exit_with_one_line():
    view(command_line.parse(define_flags(), argv, __doc__))


def view(given: flags.FlagValues) -> None:
  """Serves the page until a signal says to stop.

  Raises:
    InputError: no run, or a port that cannot be had.
  """
  if not given.workdir:
    raise InputError("--workdir: missing, expected the run's directory")
  workdir = pathlib.Path(given.workdir)
  if not any((workdir / name).exists() for name in ("config.json", "metrics.jsonl", "rollouts")):
    raise InputError(f"--workdir: {workdir} holds no run, expected the directory of one that has begun")
  try:
    server = Server(given.port, Viewer(workdir))
  except (OSError, OverflowError) as error:
    raise InputError(f"--port {given.port}: cannot be listened on ({reason(error)})") from None
  stop = threading.Event()
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: stop.set())
  with server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"{workdir}: {server.address} (Ctrl-C ends it)", flush=True)
    if given.browser:
      webbrowser.open(server.address)
    stop.wait()
    server.shutdown()


def define_flags() -> flags.FlagValues:
  given = flags.FlagValues()
  flags.DEFINE_string("workdir", None, "Directory of the run.", flag_values=given)
  flags.DEFINE_integer("port", 0, "Port on 127.0.0.1; 0 for any that is free.", flag_values=given)
  flags.DEFINE_bool("browser", False, "Opens the page in this machine's browser.", flag_values=given)
  return given


if __name__ == "__main__":
  main()
