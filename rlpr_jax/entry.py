"""The frame of the programs that work on a run's directory: flags, processes, the directory, errors."""

import contextlib
import functools
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence

import jax
from absl import flags
from ml_collections import ConfigDict

from rlpr_jax import command_line, huggingface, machine, models, processes, validation
from rlpr_jax import config as configs
from rlpr_jax.compilation import keep_programs
from rlpr_jax.errors import InputError, MachineError, exit_with_one_line, trouble
from rlpr_jax.policy import create_mesh
from rlpr_jax.runs import exports, lock, traces, trackers
from rlpr_jax.runs.inputs import check_program
from rlpr_jax.runs.interrupt import StopRequest, watch_launcher
from rlpr_jax.runs.storage import free_name, persist, write_atomically

# What a run writes into its directory.
WRITTEN = (
  "config.json",
  "inputs.json",
  "dropped_rows.jsonl",
  "metrics.jsonl",
  "rollouts",
  trackers.TENSORBOARD,
  trackers.DIRECTORY,
  "checkpoints",
  "damaged_checkpoints",
  "unfinished",
  "failed",
  exports.NAME,
  traces.NAME,
  "report.html",
  "diagnosis.json",
  "diagnosis.html",
)


def run(
  program: Callable[..., None],
  argv: Sequence[str] | None,
  doc: str,
  recipe: str = "quickstart",
  goes_on: bool = False,
) -> None:
  """Runs a program on the config and directory that a command line names.

  Args:
    program: is called with the config and the directory.
    argv: the program's name and its arguments; those of this process if None.
    doc: what --help says before the flags.
    recipe: where the command line names none.
    goes_on: whether the program goes on with a run: it has the flags --accept_changes and --fresh, and is given both.
  """
  with exit_with_one_line() as ending:
    given, config = command_line.parse_config(define_flags(recipe, goes_on), argv, doc)
    if not given.workdir:
      raise InputError("--workdir: missing, expected the run's directory")
    if "://" in given.workdir:  # a path would be made of it, on this machine's disk
      raise InputError(f"--workdir: {given.workdir}, expected a directory: mount the bucket, for instance by gcsfuse")
    workdir = pathlib.Path(given.workdir)
    ending.keep = functools.partial(traces.keep, workdir)
    watch_launcher()
    processes.start(given.distributed, given.coordinator, given.processes, given.process)
    with processes.end_together(ending):
      options = {"accept_changes": given.accept_changes, "fresh": given.fresh} if goes_on else {}
      program(config, workdir, **options)


def define_flags(recipe: str, goes_on: bool) -> flags.FlagValues:
  """The flags of such a program."""
  given = flags.FlagValues()
  command_line.define_config(given, recipe)
  flags.DEFINE_string("workdir", None, "Directory for all that is written.", flag_values=given)
  if goes_on:
    flags.DEFINE_bool(
      "accept_changes",
      False,
      "Go on with other data, tokenizer, chat template, weights or custom reward than the run began with.",
      flag_values=given,
    )
    flags.DEFINE_bool(
      "fresh", False, "Set aside what an earlier run has written there, and begin anew.", flag_values=given
    )
  flags.DEFINE_bool(
    "distributed",
    False,
    "Many processes, as jax finds out: needed on Cloud TPU VMs, not under GKE, Slurm or Open MPI.",
    flag_values=given,
  )
  flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where nothing else says it.", flag_values=given)
  flags.DEFINE_integer("processes", None, "How many processes there are.", lower_bound=1, flag_values=given)
  flags.DEFINE_integer("process", None, "Which of them this one is, from 0.", lower_bound=0, flag_values=given)
  return given


@contextlib.contextmanager
def begin(
  config: ConfigDict, workdir: pathlib.Path, program: str, stop: StopRequest, fresh: bool = False
) -> Iterator[None]:
  """Checks the config and the directory, before anything is written or compiled, and says what runs on what.

  As a context around the run: no other one is in the directory meanwhile.

  Args:
    program: train | sft.
    fresh: moves what an earlier run has written out of the way.

  Raises:
    InputError: a config that cannot be, or a directory that cannot be written, holds another run or is in use by one.
  """
  validation.validate(config)
  trackers.check(config.log.trackers)
  if config.export.push:
    huggingface.check_push("config.export.push", config.export.push)
  mesh = create_mesh(config)
  attention = config.model.attention
  if attention == "auto":
    attention = f"auto ({models.default_attention(mesh.devices.flat[0].platform)})"
  print(machine.describe(mesh, attention, config.model.compute_dtype), flush=True)
  open_workdir(workdir)
  with hold(workdir, stop), traces.kept(workdir):
    if fresh:
      set_run_aside(workdir)
    check_program(workdir, program)
    check_same_run(workdir, config)
    keep_programs(config.compilation_cache)
    yield


@contextlib.contextmanager
def hold(workdir: pathlib.Path, stop: StopRequest) -> Iterator[None]:
  """The lock of a run's directory; of many processes the first holds it for all, and all are refused together.

  Raises:
    InputError: another run is there.
  """
  with contextlib.ExitStack() as held:
    refusal: InputError | MachineError | None = None
    if processes.is_first():
      try:
        held.enter_context(lock.hold(workdir, stop.__bool__))
      except (InputError, MachineError) as error:
        refusal = error
    if processes.any_of(refusal is not None):
      raise refusal or InputError(f"--workdir: {workdir} is in use, as process 0 says")
    yield


def write_config(config: ConfigDict, workdir: pathlib.Path) -> None:
  """WORKDIR/config.json, by which the directory is known from now on; of many processes the first writes it."""
  if processes.is_first():
    path = workdir / "config.json"
    persist(lambda: write_atomically(path, configs.to_json(config)), path, config.log.retry_seconds)


def set_run_aside(workdir: pathlib.Path) -> None:
  """Moves what a run has written into a directory of its own, WORKDIR/earlier.1 and so on; other files stay."""
  written = [workdir / name for name in WRITTEN if os.path.lexists(workdir / name)]
  if written and processes.is_first():
    aside = free_name(workdir / "earlier")
    aside.mkdir()
    for path in written:
      path.rename(aside / path.name)
    print(f"what was in {workdir} is in {aside} now", flush=True)
  processes.any_of(False)  # none goes on before it is done


def open_workdir(workdir: pathlib.Path) -> None:
  """Makes sure that the directory is there and can be written.

  Raises:
    InputError: it cannot, until somebody mends it.
    MachineError: the disk is full or gone.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    probe = workdir / f".writable-{jax.process_index()}"
    probe.touch()
    probe.unlink(missing_ok=True)  # another program may try the same
  except OSError as error:
    raise trouble(error, f"--workdir: {workdir} cannot be written ({error.strerror})") from None


def check_same_run(workdir: pathlib.Path, config: ConfigDict) -> None:
  """Makes sure that the directory holds no other run."""
  saved = workdir / "config.json"
  if saved.exists() and (difference := configs.first_difference(configs.read_fields(saved), config)):
    raise InputError(f"--workdir: {workdir} holds another run: {difference}")
