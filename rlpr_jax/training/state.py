"""Everything a run needs to go on where it stopped, and its checkpoints."""

import itertools
import pathlib
import shutil
import sys
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from rlpr_jax import processes
from rlpr_jax.errors import InputError
from rlpr_jax.filtering import FilterState
from rlpr_jax.models import Params
from rlpr_jax.storage import persist, reason
from rlpr_jax.training.packing import Groups

# What orbax and tensorstore make of a disk that is full, gone or damaged.
_STORAGE_ERRORS = (OSError, ValueError, KeyError, RuntimeError)


class TrainState(NamedTuple):
  """The state between two training steps. Random keys are not here: they follow from the seed and the draw's number."""

  step: int  # training steps finished
  params: Params  # float32 masters of what is trained
  opt_state: optax.OptState
  filter: FilterState
  baselines: np.ndarray  # float32[N, A] log-probabilities of each reference without reasoning; NaN: no token, unknown
  initial: Params  # the initial policy, for a KL term or as frozen scorer; else nothing
  lagged: Params  # the policy some steps ago, as scorer; else nothing
  carried: Groups  # kept groups that the step before had no room for
  stream: dict[str, Any]  # position of the data stream


class Checkpoints:
  """The newest states on disk and the best, by orbax: written in the background, complete or not there at all.

  A checkpoint has three items: `params`, which can be read alone; `arrays`, the state's other arrays; `host`, as JSON.
  """

  def __init__(self, workdir: pathlib.Path, keep: int, keep_best: int, carried_limit: int, retry_seconds: float):
    """Opens WORKDIR/checkpoints.

    Args:
      keep: how many of the newest are kept.
      keep_best: and how many of those with the highest `accuracy`, as `save` was told.
      carried_limit: most groups a state can carry; they are padded to it, so that every checkpoint has one shape.
      retry_seconds: how long trouble with the storage is borne.
    """
    self._directory, self._carried_limit = (workdir / "checkpoints").absolute(), carried_limit
    self._keep, self._keep_best, self._retry_seconds = keep, keep_best, retry_seconds
    self._under_way: tuple[TrainState, float | None] | None = None
    self._open()

  def _open(self) -> None:
    policies = [LatestN(self._keep)]
    if self._keep_best:
      best = BestN(get_metric_fn=lambda x: x["accuracy"], n=self._keep_best, keep_checkpoints_without_metrics=False)
      policies.append(best)
    options = ocp.CheckpointManagerOptions(preservation_policy=AnyPreservationPolicy(policies))
    self._manager = ocp.CheckpointManager(self._directory, options=options)

  def latest(self) -> int | None:
    return self._manager.latest_step()

  def save(self, state: TrainState, accuracy: float | None = None) -> None:
    """Starts writing; `wait` before the state's arrays are given away to the next update.

    Raises:
      InputError: the storage did not take it for `retry_seconds`.
    """
    self.wait()
    self._under_way = state, accuracy
    try:
      self._start_saving()
    except _STORAGE_ERRORS as error:
      self._save_again(error)

  def wait(self) -> None:
    """Until what is under way is on disk; it is written anew where that failed.

    Raises:
      InputError: the storage did not take it for `retry_seconds`.
    """
    try:
      self._manager.wait_until_finished()
    except _STORAGE_ERRORS as error:
      self._save_again(error)
    self._under_way = None

  def _start_saving(self) -> None:
    state, accuracy = self._under_way
    arrays, host = self._split(state)
    host["carried"] = state.carried.count
    self._manager.save(
      state.step,
      args=ocp.args.Composite(
        params=ocp.args.StandardSave(state.params), arrays=ocp.args.StandardSave(arrays), host=ocp.args.JsonSave(host)
      ),
      metrics=None if accuracy is None else {"accuracy": accuracy},
      force=True,
    )

  def _save_again(self, error: Exception) -> None:
    """Writes the state under way until that succeeds, each time as a new program would."""
    step = self._under_way[0].step
    print(f"{self._directory}/{step}: {reason(error)}, writing it again", file=sys.stderr, flush=True)

    def write() -> None:
      try:
        shutil.rmtree(self._directory / str(step), ignore_errors=True)
        self._open()
        self._start_saving()
        self._manager.wait_until_finished()
      except _STORAGE_ERRORS as error:
        raise OSError(reason(error)) from error

    persist(write, self._directory / str(step), self._retry_seconds)

  def restore(self, like: TrainState) -> TrainState | None:
    """The newest state that can be read, None if nothing was saved; newer ones that cannot are put aside, and named.

    Args:
      like: gives the structure, and shapes in it say where large arrays are to lie.

    Raises:
      InputError: none of the checkpoints can be read.
    """
    steps = sorted(self._manager.all_steps(), reverse=True)
    damaged: list[InputError] = []
    for step in steps:
      state = None
      try:
        state = self._restore_step(step, like)
      except InputError as error:
        damaged.append(error)
      if not processes.any_of(state is None):
        self._put_aside(damaged, steps[: len(damaged)])
        return state
    if steps:
      raise damaged[0] if damaged else InputError(f"{self._directory}: cannot be read by another process")
    return None

  def _restore_step(self, step: int, like: TrainState) -> TrainState:
    restored = _restore(
      self._manager,
      step,
      params=ocp.args.StandardRestore(jax.tree.map(_abstract, like.params)),
      arrays=ocp.args.StandardRestore(jax.tree.map(_abstract, self._split(like)[0])),
      host=ocp.args.JsonRestore(),
    )
    arrays, host = restored["arrays"], restored["host"]
    arrays["carried"] = arrays["carried"].take(slice(host.pop("carried")))
    return TrainState(params=restored["params"], **{"initial": {}, "lagged": {}} | arrays, **host)

  def _put_aside(self, damaged: list[InputError], steps: list[int]) -> None:
    if not steps:
      return
    aside = self._directory.with_name("damaged_checkpoints")
    for error, step in itertools.zip_longest(damaged, steps):
      print(f"{error or step}: put aside in {aside}, going on from the one before", file=sys.stderr, flush=True)
      if processes.is_first():
        aside.mkdir(exist_ok=True)
        shutil.rmtree(aside / str(step), ignore_errors=True)
        (self._directory / str(step)).rename(aside / str(step))
    processes.any_of(False)  # not before it is done
    self._open()

  def _split(self, state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays beside the parameters, for orbax, and what goes beside them as JSON."""
    arrays = state._asdict()
    del arrays["params"]
    host = {name: arrays.pop(name) for name in ("step", "stream")}
    arrays = {name: value for name, value in arrays.items() if jax.tree.leaves(value)}
    missing = self._carried_limit - state.carried.count
    carried = jax.tree.map(lambda x: np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)), state.carried)
    return arrays | {"carried": carried}, host

  def close(self) -> None:
    self.wait()
    self._manager.close()


def restore_params(workdir: pathlib.Path, step: int | None, like: Params) -> tuple[int, Params]:
  """The parameters of one checkpoint, the newest if `step` is None, and its step. Nothing else of it is read.

  Raises:
    InputError: there is no such checkpoint, or it cannot be read.
  """
  directory = (workdir / "checkpoints").absolute()
  if not directory.is_dir():
    raise InputError(f"{directory}: missing, expected the checkpoints of a run")
  with ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
    steps = sorted(manager.all_steps())
    chosen = step if step is not None else max(steps, default=None)
    if chosen not in steps:
      there = f"it has {', '.join(map(str, steps))}" if steps else "it has none"
      raise InputError(f"{directory}: no checkpoint of step {chosen}, {there}")
    restored = _restore(manager, chosen, params=ocp.args.StandardRestore(jax.tree.map(_abstract, like)))
  return chosen, restored["params"]


def _restore(manager: ocp.CheckpointManager, step: int, **items: Any) -> Any:
  try:
    return manager.restore(step, args=ocp.args.Composite(**items))
  except _STORAGE_ERRORS as error:
    raise InputError(f"{manager.directory}/{step}: cannot be read ({reason(error)})") from None


def _abstract(x: Any) -> Any:
  """What orbax is to restore: host arrays as they are, device arrays by shape, dtype and place."""
  if isinstance(x, np.ndarray):
    return x
  sharding = getattr(x, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
