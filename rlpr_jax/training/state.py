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
  params: Params  # float32 masters
  opt_state: optax.OptState
  filter: FilterState
  baselines: np.ndarray  # float32[N] r' of each prompt under the initial policy
  carried: Groups  # kept groups that the step before had no room for
  stream: dict[str, Any]  # position of the data stream


class Checkpoints:
  """The last few states on disk, by orbax: written in the background, complete or not there at all."""

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
    args = ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), host=ocp.args.JsonSave(host))
    self._manager.save(state.step, args=args, force=True)

  def wait(self) -> None:
    self._manager.wait_until_finished()

  def restore(self, like: TrainState) -> TrainState:
    """The newest state; `like` gives the structure.

    Raises:
      InputError: the checkpoint cannot be read.
    """
    step = self.latest()
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, self._split(like)[0])
    args = ocp.args.Composite(arrays=ocp.args.StandardRestore(abstract), host=ocp.args.JsonRestore())
    try:
      restored = self._manager.restore(step, args=args)
    except (ValueError, KeyError, OSError) as error:
      reason = " ".join(str(error).split())[:200]
      raise InputError(f"{self._manager.directory}/{step}: cannot be read ({reason})") from None
    arrays, host = restored["arrays"], restored["host"]
    arrays["carried"] = arrays["carried"].take(slice(host.pop("carried")))
    return TrainState(**arrays, **host)

  def _split(self, state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays, for orbax, and what goes beside them as JSON."""
    arrays = state._asdict()
    host = {name: arrays.pop(name) for name in ("step", "stream")}
    missing = self._carried_limit - state.carried.count
    pad = [np.pad(field, [(0, missing)] + [(0, 0)] * (field.ndim - 1)) for field in state.carried]
    return arrays | {"carried": Groups(*pad)}, host

  def close(self) -> None:
    self._manager.close()  # waits for what is being written
