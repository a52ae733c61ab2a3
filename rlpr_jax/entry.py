"""What the programs that work on a run's directory have in common: flags, processes, the directory, errors."""

import json
import pathlib
import re
from collections.abc import Callable, Sequence

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from rlpr_jax import config as configs
from rlpr_jax import processes
from rlpr_jax.compilation import keep_programs
from rlpr_jax.errors import InputError, exit_on_input_error, parse_flags
from rlpr_jax.storage import write_atomically

_RECIPES = pathlib.Path(__file__).parent.parent / "configs"
# No default here: a mistyped override would then be looked at, and fail, while this module is imported.
_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe, a Python file; one of configs/ if not given.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory for all that is written.")

_DISTRIBUTED = flags.DEFINE_bool(
  "distributed", False, "Many processes, as jax finds out: needed on Cloud TPU VMs, not under GKE, Slurm or Open MPI."
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where nothing else says it.")
_PROCESSES = flags.DEFINE_integer("processes", None, "How many processes there are.", lower_bound=1)
_PROCESS = flags.DEFINE_integer("process", None, "Which of them this one is, from 0.", lower_bound=0)


def run(program: Callable[[ConfigDict, pathlib.Path], None], recipe: str = "quickstart") -> None:
  """Runs a program on the config and directory that the command line names; to be called by the main module.

  Args:
    recipe: of configs/, where the command line names none.
  """

  def main(_: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # orbax and jax narrate at INFO
    with exit_on_input_error():
      if not _WORKDIR.value:
        raise InputError("--workdir: missing, expected the run's directory")
      if "://" in _WORKDIR.value:  # a path would be made of it, on this machine's disk
        raise InputError(
          f"--workdir: {_WORKDIR.value}, expected a directory: mount the bucket, for instance by gcsfuse"
        )
      config = _CONFIG.value
      try:
        config.keys()
      except OSError as error:  # a config file that cannot be read is only said at the first look into it
        raise InputError(" ".join(str(error).split())) from None
      processes.start(_DISTRIBUTED.value, _COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
      with processes.end_together():
        program(config, pathlib.Path(_WORKDIR.value))

  def parse_arguments(argv: Sequence[str]) -> list[str]:
    given = any(re.match(r"--?config(=|$)", argument) for argument in argv)
    return parse_flags(argv if given else [argv[0], f"--config={_RECIPES / recipe}.py", *argv[1:]])

  app.run(main, flags_parser=parse_arguments)


def begin(config: ConfigDict, workdir: pathlib.Path) -> None:
  """Checks the config and the directory, before anything is written or compiled.

  Raises:
    InputError: a config that cannot be, or a directory that cannot be written or holds another run.
  """
  configs.validate(config)
  open_workdir(workdir)
  check_same_run(workdir, config)
  keep_programs(config.compilation_cache)


def write_config(config: ConfigDict, workdir: pathlib.Path) -> None:
  """WORKDIR/config.json, by which the directory is known from now on; of many processes the first writes it."""
  if processes.is_first():
    write_atomically(workdir / "config.json", configs.to_json(config))


def open_workdir(workdir: pathlib.Path) -> None:
  """Makes sure that the directory is there and can be written."""
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    probe = workdir / f".writable-{jax.process_index()}"
    probe.touch()
    probe.unlink()
  except OSError as error:
    raise InputError(f"--workdir: {workdir} cannot be written ({error.strerror})") from None


def check_same_run(workdir: pathlib.Path, config: ConfigDict) -> None:
  """Makes sure that the directory holds no other run."""
  saved = workdir / "config.json"
  if saved.exists():
    try:
      difference = configs.first_difference(json.loads(saved.read_text()), config)
    except ValueError:
      raise InputError(f"{saved}: not JSON, expected the config of this directory's run") from None
    if difference:
      raise InputError(f"--workdir: {workdir} holds another run: {difference}")
