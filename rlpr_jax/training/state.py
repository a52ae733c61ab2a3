"""Everything a run needs to go on where it stopped, and its checkpoints."""

import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp

from rlpr_jax.errors import InputError
from rlpr_jax.filtering import FilterState
from rlpr_jax.models import Params
from rlpr_jax.training.packing import Groups


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
  """The last few states on disk, by orbax: written in the background, complete or not there at all.

  A checkpoint has three items: `params`, which can be read alone; `arrays`, the state's other arrays; `host`, as JSON.
  """

  def __init__(self, workdir: pathlib.Path, keep: int, carried_limit: int):
    """`carried_limit`: most groups a state can carry; they are padded to it, so that every checkpoint has one shape."""
    self._carried_limit = carried_limit
    self._manager = ocp.CheckpointManager(
      (workdir / "checkpoints").absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=keep)
    )

  def latest(self) -> int | None:
    return self._manager.latest_step()

  def save(self, state: TrainState) -> None:
    """Starts writing; `wait` before the state's arrays are given away to the next update."""
    arrays, host = self._split(state)
    host["carried"] = state.carried.count
    self._manager.save(
      state.step,
      args=ocp.args.Composite(
        params=ocp.args.StandardSave(state.params), arrays=ocp.args.StandardSave(arrays), host=ocp.args.JsonSave(host)
      ),
      force=True,
    )

  def wait(self) -> None:
    self._manager.wait_until_finished()

  def restore(self, like: TrainState) -> TrainState:
    """The newest state; `like` gives the structure, and shapes in it say where large arrays are to lie.

    Raises:
      InputError: the checkpoint cannot be read.
    """
    step = self.latest()
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
    self._manager.close()  # waits for what is being written


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
  except (ValueError, KeyError, OSError) as error:
    reason = " ".join(str(error).split())[:200]
    raise InputError(f"{manager.directory}/{step}: cannot be read ({reason})") from None


def _abstract(x: Any) -> Any:
  """What orbax is to restore: host arrays as they are, device arrays by shape, dtype and place."""
  if isinstance(x, np.ndarray):
    return x
  sharding = getattr(x, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
