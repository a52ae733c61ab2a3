"""Several processes of one run on this machine, as on as many machines: what a pod does, tried at home.

    python launch/local.py --processes=2 [--dry-run] [--] --config=configs/quickstart.py --workdir=runs/two \
      [--config.field=value ...]

Ctrl-C, SIGTERM and SIGHUP are passed on: the run saves and stops; what has not after `--grace` seconds is killed. Where
this script is killed, the run saves and stops as well. Once a process ends with an error the others are stopped, and
its exit status is given back. `--dry-run` prints what would be run.
"""

import shlex
import socket
import subprocess
import sys
import time

from absl import app, flags

from rlpr_jax import command_line
from rlpr_jax.errors import USAGE, InputError, exit_with_one_line
from rlpr_jax.runs.children import Children

_PROCESSES = flags.DEFINE_integer("processes", 2, "How many.", lower_bound=1)
_MODULE = flags.DEFINE_string("module", "rlpr_jax.train", "What each of them runs.")
_GRACE = flags.DEFINE_float("grace", 300, "Seconds to save in, when told to stop.", lower_bound=0)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the commands alone.")
flags.DEFINE_alias("dry-run", "dry_run")
_PATIENCE = 10  # seconds between the end of one process and the killing of those that go on


def main(argv: list[str]) -> None:
  check(argv[1:])
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  count = _PROCESSES.value
  common = [sys.executable, "-m", _MODULE.value, f"--coordinator=localhost:{port}", f"--processes={count}"]
  commands = [[*common, f"--process={index}", *argv[1:]] for index in range(count)]
  if _DRY_RUN.value:
    print(*(shlex.join(command) + " &" for command in commands), "wait", sep="\n")
    return
  with exit_with_one_line(), Children(_GRACE.value) as children:
    status = watch([children.start(command) for command in commands])
  sys.exit(status)


def check(arguments: list[str]) -> None:
  """Says what no process could start with in one line, not in one a process."""
  for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
    name, equals, recipe = argument.lstrip("-").partition("=")
    if argument.startswith("-") and name == "config":
      try:
        command_line.find_recipe(recipe if equals else following)
      except InputError as error:
        print(f"launch/local.py: {error}", file=sys.stderr)
        sys.exit(USAGE)


def parse_flags(argv: list[str]) -> list[str]:
  """The launcher's own flags; what it does not know is the program's, as is all that stands behind `--`."""
  try:
    program, *rest = flags.FLAGS(argv, known_only=True)
  except flags.Error as error:
    print(f"launch/local.py: {error}", file=sys.stderr)
    sys.exit(USAGE)
  if "--" in rest:
    rest.remove("--")
  return [program, *rest]


def watch(started: list[subprocess.Popen]) -> int:
  """Waits for all; the exit status of the first that ended with an error, else 0."""
  while not any(process.poll() for process in started):
    if all(process.poll() == 0 for process in started):
      return 0
    time.sleep(0.1)
  index, status = next((i, process.returncode) for i, process in enumerate(started) if process.poll())
  print(
    f"process {index} of {len(started)} ended with status {status}: stopping the others", file=sys.stderr, flush=True
  )
  deadline = time.monotonic() + _PATIENCE
  for process in started:
    process.terminate()
  for process in started:
    try:
      process.wait(max(deadline - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()  # or the next launch would find it there
  return status if status > 0 else 128 - status


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
