"""Checkpoints: the newest states of a run and the best, so that it goes on where it stopped."""

import dataclasses
import functools
import hashlib
import json
import logging
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tenacity
from ml_collections import ConfigDict
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, LatestN

from rlpr_jax.errors import InputError, MachineError, trouble
from rlpr_jax.models import Params
from rlpr_jax.runs.storage import persist, reason

State = TypeVar("State")
_norm = jax.jit(optax.tree.norm)
# Orbax warns of each checkpoint without an accuracy, and of each directory that is read only, as is meant here.
logging.getLogger("absl").addFilter(
  lambda record: record.filename != "checkpoint_manager.py" or record.levelno > logging.WARNING
)
# What orbax and tensorstore make of a disk that is full, gone or damaged.
_STORAGE_ERRORS = (OSError, ValueError, KeyError)


class OnDisk(NamedTuple):
  """The three items of a checkpoint. All of them together have a digest, and what was changed since is not read."""

  params: Params  # can be read alone
  arrays: dict[str, Any]  # the state's other arrays
  host: dict[str, Any]  # as JSON; "step" is in it


@dataclasses.dataclass
class _Best:
  """Keeps the checkpoints with the best accuracies, of those of which one is known."""

  most: int
  accuracies: dict[int, float]

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    del context
    known = {one.step: one.metrics["accuracy"] for one in checkpoints if one.metrics} | self.accuracies
    steps = sorted((one.step for one in checkpoints if one.step in known), key=lambda step: (known[step], step))
    return [one.step in steps[-self.most :] and self.most > 0 for one in checkpoints]


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

    Raises:
      InputError: something else is in its place.
      MachineError: the disk is full or gone.
    """
    self._directory, self.log = (workdir / "checkpoints").absolute(), log
    if os.path.lexists(self._directory) and not self._directory.is_dir():
      raise InputError(f"{self._directory}: not a directory, expected that of checkpoints")
    self._split, self._join = split, join
    self._under_way: tuple[OnDisk, float | None] | None = None
    self._accuracies: dict[int, float] = {}
    try:
      self._open()
    except OSError as error:
      raise trouble(error, f"{self._directory}: cannot be opened ({reason(error)})") from None

  def _open(self) -> None:
    policy = AnyPreservationPolicy([LatestN(self.log.keep_checkpoints), _Best(self.log.keep_best, self._accuracies)])
    # Only with a `best_fn` is the accuracy written, and known when the checkpoints are opened again.
    options = ocp.CheckpointManagerOptions(best_fn=lambda metrics: metrics["accuracy"], preservation_policy=policy)
    self._manager = ocp.CheckpointManager(self._directory, options=options)

  def latest(self) -> int | None:
    return self._manager.latest_step()

  def know(self, accuracies: Mapping[int, float]) -> None:
    """Says what is known of steps, by which the best are kept: that of one may have been measured after it was saved.

    Args:
      accuracies: by step, those that go for the ones the checkpoints hold.
    """
    self._accuracies.update(accuracies)

  def save(self, state: State, accuracy: float | None = None) -> None:
    """Starts writing; `wait` before the state's arrays are given away to the next update.

    Raises:
      MachineError: the storage did not take it for `log.retry_seconds`.
      InputError: its parameters are not finite.
    """
    self.wait()
    params, arrays, host = self._split(state)
    # By the norm: parameters whose squares are not finite make nothing that is. Asked of what is saved, and not in the
    # update, where old and new parameters would lie in memory side by side.
    if not jnp.isfinite(_norm(params)):
      before = self.latest()
      there = "there is none before it" if before is None else f"the one before it, of step {before}, is whole"
      raise InputError(
        f"{self._directory}: the parameters of step {host['step']} are not finite and not saved, {there}: expected a"
        " lower learning rate"
      )
    sums = checksums((params, arrays))
    self._under_way = OnDisk(params, arrays, host | {"sums": sums, "digest": _digest(host, sums)}), accuracy
    try:
      self._start_saving()
    except _STORAGE_ERRORS as error:
      self._save_again(error)

  def wait(self) -> None:
    """Until what is under way is on disk; it is written anew where that failed.

    Raises:
      MachineError: the storage did not take it for `log.retry_seconds`.
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

    Of many processes only one may have failed, or died, while the others wait for it: then the run ends, and a launcher
    starts it again.
    """
    if jax.process_count() > 1:
      raise MachineError(f"{self._directory}: cannot be written ({reason(error)})") from error
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
    params, found = restored["params"], restored["arrays"]
    _check_shapes(f"{self._directory}/{step}", found, arrays)
    arrays = found
    host = _verify(f"{self._directory}/{step}", step, restored["host"], (params, arrays))
    return self._join(params, arrays, host)

  def _put_aside(self, damaged: list[InputError], steps: list[int]) -> None:
    aside = self._directory.with_name("damaged_checkpoints")
    for error, step in zip(damaged, steps, strict=True):
      print(f"{error}: put aside in {aside}, going on from the one before", file=sys.stderr, flush=True)
      persist(functools.partial(self._move, step, aside), aside, self.log.retry_seconds)
    if damaged:
      self._open()

  def _move(self, step: int, aside: pathlib.Path) -> None:
    aside.mkdir(exist_ok=True)
    shutil.rmtree(aside / str(step), ignore_errors=True)
    (self._directory / str(step)).rename(aside / str(step))

  def close(self) -> None:
    self.wait()
    self._manager.close()


def checksums(tree: Any, of_places: bool = True) -> list[int]:
  """A number for each array, of its bits and their places: the same wherever its parts lie.

  Args:
    of_places: False for the plain sums of bits, which older versions wrote.

  >>> checksums({"a": np.array([1.0, 2.0]), "b": np.array([2.0, 1.0])})
  [2193092769, 958838164]
  """
  return [int(_checksum(x, of_places)) for x in jax.tree.leaves(tree)]


@functools.partial(jax.jit, static_argnames=("of_places",))
def _checksum(x: jax.Array, of_places: bool) -> jax.Array:
  bits = x.astype(jnp.uint32)
  if jnp.issubdtype(x.dtype, jnp.floating):
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
  if not of_places:
    return jnp.sum(bits, dtype=jnp.uint32)
  places, stride = jnp.zeros(x.shape, jnp.uint32), 1
  for axis in reversed(range(x.ndim)):
    places += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
    stride *= x.shape[axis]
  # Sums of integers wrap and do not round, so their order does not matter.
  return jnp.sum(_mix(bits ^ _mix(places)), dtype=jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
  """The end of MurmurHash3: every bit of a number depends on all of them."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def _digest(host: Mapping[str, Any], sums: Sequence[int]) -> str:
  """Of all that a checkpoint holds."""
  return hashlib.sha256(json.dumps([host, sums], sort_keys=True).encode()).hexdigest()


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
  found, name = restored["params"], f"{directory}/{chosen}"
  _verify(name, chosen, restored["host"], found, first=len(jax.tree.leaves(found)))
  return chosen, found


def _verify(name: str, step: int, saved: dict[str, Any], tree: Any, first: int | None = None) -> dict[str, Any]:
  """Checks all that was read of a checkpoint, since orbax reads zeros where a file is missing.

  Args:
    saved: what the checkpoint holds beside its arrays, and the sums of these.
    tree: its arrays, or the first of them.
    first: how many of them; None for all.

  Returns:
    what it holds beside them.

  Raises:
    InputError: something is not what was saved, or is that of another step.
  """
  host = {field: value for field, value in saved.items() if field not in ("sums", "digest", "checksums")}
  older = "checksums" in saved  # such versions wrote no digest
  sums = saved["checksums"] if older else saved.get("sums", [])
  if not older and saved.get("digest") != _digest(host, sums):
    raise InputError(f"{name}: cannot be read (its metadata is not what was saved)")
  if host["step"] != step:
    raise InputError(f"{name}: cannot be read (it is the checkpoint of step {host['step']})")
  if sums[:first] != checksums(tree, of_places=not older):
    raise InputError(f"{name}: cannot be read (the arrays are not those that were saved)")
  return host


def _check_shapes(name: str, found: Any, like: Any) -> None:
  """Checks that arrays have the shapes that this version gives them, but for how many rows there are.

  Raises:
    InputError: naming the first that has another.
  """
  expected = dict(jax.tree_util.tree_leaves_with_path(like))
  for path, array in jax.tree_util.tree_leaves_with_path(found):
    shape, wanted = np.shape(array), expected[path].shape
    if len(shape) != len(wanted) or shape[1:] != wanted[1:]:
      raise InputError(
        f"{name}: {jax.tree_util.keystr(path)} of shape {shape}, expected {('rows', *wanted[1:])}:"
        " was it written by another version of rlpr_jax?"
      )


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
