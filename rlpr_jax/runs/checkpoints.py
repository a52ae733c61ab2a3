"""Checkpoints: the newest states of a run and the best, so that it goes on where it stopped."""

import logging
import pathlib
import shutil
import sys
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tenacity
from ml_collections import ConfigDict
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from rlpr_jax.errors import InputError
from rlpr_jax.models import Params
from rlpr_jax.runs.storage import persist, reason

State = TypeVar("State")
# Orbax warns of each checkpoint without an accuracy, and of each directory that is read only, as is meant here.
logging.getLogger("absl").addFilter(
  lambda record: record.filename != "checkpoint_manager.py" or record.levelno > logging.WARNING
)
# What orbax and tensorstore make of a disk that is full, gone or damaged.
_STORAGE_ERRORS = (OSError, ValueError, KeyError)


class OnDisk(NamedTuple):
  """The three items of a checkpoint."""

  params: Params  # can be read alone
  arrays: dict[str, Any]  # the state's other arrays
  host: dict[str, Any]  # as JSON; "step" is in it


class Checkpoints(Generic[State]):
  """The newest states on disk and the best, by orbax: written in the background, complete or not there at all."""

  def __init__(
    self, workdir: pathlib.Path, log: ConfigDict, split: Callable[[State], OnDisk], join: Callable[..., State]
  ):
    """Opens WORKDIR/checkpoints.

    Args:
      log: `config.log`, which says how many of the newest and of the best are kept, and how long trouble with the
        storage is borne.
      split, join: take a state apart into what goes on disk, and put it together again.
    """
    self._directory, self.log = (workdir / "checkpoints").absolute(), log
    self._split, self._join = split, join
    self._under_way: tuple[OnDisk, float | None] | None = None
    self._open()

  def _open(self) -> None:
    policies = [LatestN(self.log.keep_checkpoints)]
    if self.log.keep_best:
      policies.append(
        BestN(
          get_metric_fn=lambda metrics: metrics["accuracy"],
          n=self.log.keep_best,
          keep_checkpoints_without_metrics=False,
        )
      )
    # Only with a `best_fn` is the accuracy written, and known when the checkpoints are opened again.
    options = ocp.CheckpointManagerOptions(
      best_fn=lambda metrics: metrics["accuracy"], preservation_policy=AnyPreservationPolicy(policies)
    )
    self._manager = ocp.CheckpointManager(self._directory, options=options)

  def latest(self) -> int | None:
    return self._manager.latest_step()

  def save(self, state: State, accuracy: float | None = None) -> None:
    """Starts writing; `wait` before the state's arrays are given away to the next update.

    Raises:
      InputError: the storage did not take it for `log.retry_seconds`.
    """
    self.wait()
    params, arrays, host = self._split(state)
    self._under_way = OnDisk(params, arrays, host | {"checksums": checksums((params, arrays))}), accuracy
    try:
      self._start_saving()
    except _STORAGE_ERRORS as error:
      self._save_again(error)

  def wait(self) -> None:
    """Until what is under way is on disk; it is written anew where that failed.

    Raises:
      InputError: the storage did not take it for `log.retry_seconds`.
    """
    try:
      self._manager.wait_until_finished()
    except _STORAGE_ERRORS as error:
      self._save_again(error)
    self._under_way = None

  def _start_saving(self) -> None:
    assert self._under_way is not None
    (params, arrays, host), accuracy = self._under_way
    self._manager.save(
      host["step"],
      args=ocp.args.Composite(
        params=ocp.args.StandardSave(params), arrays=ocp.args.StandardSave(arrays), host=ocp.args.JsonSave(host)
      ),
      metrics=None if accuracy is None else {"accuracy": accuracy},
      force=True,
    )

  def _save_again(self, error: Exception) -> None:
    """Writes the state under way until that succeeds, each time as a new program would.

    Of many processes only one may have failed, or died, while the others wait for it: then the run ends, and is no
    wrong input, so that a launcher starts it again.
    """
    if jax.process_count() > 1:
      raise RuntimeError(f"{self._directory}: cannot be written ({reason(error)})") from error
    assert self._under_way is not None
    step = self._under_way[0].host["step"]
    print(f"{self._directory}/{step}: {reason(error)}, writing it again", file=sys.stderr, flush=True)

    def write() -> None:
      try:
        shutil.rmtree(self._directory / str(step), ignore_errors=True)
        self._open()
        self._start_saving()
        self._manager.wait_until_finished()
      except _STORAGE_ERRORS as error:
        raise OSError(reason(error)) from error

    persist(write, self._directory / str(step), self.log.retry_seconds)

  def restore(self, like: State) -> State | None:
    """The newest state that can be read, None if nothing was saved; newer ones that cannot are put aside, and named.

    Args:
      like: gives the structure, and shapes in it say where large arrays are to lie.

    Raises:
      InputError: none of the checkpoints can be read.
    """
    steps = sorted(self._manager.all_steps(), reverse=True)
    damaged: list[InputError] = []
    for step in steps:
      try:
        state = self._restore_step(step, like)
      except InputError as error:
        if jax.process_count() > 1:  # the others may have read their parts, and be further on
          raise
        damaged.append(error)
        continue
      self._put_aside(damaged, steps[: len(damaged)])
      return state
    if damaged:
      raise damaged[0]
    return None

  def _restore_step(self, step: int, like: State) -> State:
    params, arrays, _ = self._split(like)
    restored = _restore(
      self._manager,
      step,
      params=ocp.args.StandardRestore(jax.tree.map(_abstract, params)),
      arrays=ocp.args.StandardRestore(jax.tree.map(_abstract, arrays)),
      host=ocp.args.JsonRestore(),
    )
    params, arrays = restored["params"], restored["arrays"]
    host = restored["host"]
    _verify(f"{self._directory}/{step}", host.pop("checksums", None), (params, arrays))
    return self._join(params, arrays, host)

  def _put_aside(self, damaged: list[InputError], steps: list[int]) -> None:
    aside = self._directory.with_name("damaged_checkpoints")
    for error, step in zip(damaged, steps, strict=True):
      print(f"{error}: put aside in {aside}, going on from the one before", file=sys.stderr, flush=True)
      aside.mkdir(exist_ok=True)
      shutil.rmtree(aside / str(step), ignore_errors=True)
      (self._directory / str(step)).rename(aside / str(step))
    if damaged:
      self._open()

  def close(self) -> None:
    self.wait()
    self._manager.close()


def checksums(tree: Any) -> list[int]:
  """A number for each array, of its bits: the same wherever its parts lie."""
  return [int(_checksum(x)) for x in jax.tree.leaves(tree)]


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
  # Sums of integers wrap and do not round, so their order does not matter.
  bits = x.astype(jnp.uint32)
  if jnp.issubdtype(x.dtype, jnp.floating):
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
  return jnp.sum(bits, dtype=jnp.uint32)


def restore_params(workdir: pathlib.Path, step: int | None, like: Params) -> tuple[int, Params]:
  """The parameters of one checkpoint, the newest if `step` is None, and its step. Its other arrays are not read.

  Raises:
    InputError: there is no such checkpoint, or it cannot be read.
  """
  directory = (workdir / "checkpoints").absolute()
  if not directory.is_dir():
    raise InputError(f"{directory}: missing, expected the checkpoints of a run")
  with ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
    steps = sorted(manager.all_steps())
    chosen = step if step is not None else max(steps, default=None)
    if chosen is None or chosen not in steps:
      there = f"it has {', '.join(map(str, steps))}" if steps else "it has none"
      raise InputError(f"{directory}: no checkpoint of step {chosen}, {there}")
    params = ocp.args.StandardRestore(jax.tree.map(_abstract, like))
    restored = _restore(manager, chosen, params=params, host=ocp.args.JsonRestore())
  found, sums = restored["params"], restored["host"].get("checksums")
  _verify(f"{directory}/{chosen}", sums and sums[: len(jax.tree.leaves(found))], found)
  return chosen, found


def _verify(name: str, expected: list[int] | None, tree: Any) -> None:
  """Orbax reads zeros where a file is missing."""
  if expected != checksums(tree):
    raise InputError(f"{name}: cannot be read (the arrays are not those that were saved)")


def _restore(manager: ocp.CheckpointManager, step: int, **items: Any) -> Any:
  attempts = tenacity.Retrying(
    retry=tenacity.retry_if_exception(lambda error: isinstance(_unwrap(error), _STORAGE_ERRORS)),
    wait=tenacity.wait_fixed(1),
    stop=tenacity.stop_after_attempt(1 if jax.process_count() > 1 else 3),
    reraise=True,
  )
  try:
    return attempts(manager.restore, step, args=ocp.args.Composite(**items))
  except Exception as error:
    if not isinstance(_unwrap(error), _STORAGE_ERRORS):
      raise
    raise InputError(f"{manager.directory}/{step}: cannot be read ({reason(_unwrap(error))})") from None


def _unwrap(error: BaseException) -> BaseException:
  """Orbax puts what it meets while it reads an array into a plain `Exception`."""
  return error.__cause__ if type(error) is Exception and error.__cause__ else error


def _abstract(x: Any) -> Any:
  """Describes to orbax what to restore: host arrays as they are, device arrays by shape, dtype and place."""
  if isinstance(x, np.ndarray):
    return x
  sharding = getattr(x, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
