"""Which axis of an array lies on which axis of the device mesh: one table of logical names.

Parameters and activations name their axes ("embed", "heads", ...); `RULES` says over which mesh axes each name is
split. The mesh has three axes:
  - data: whole copies of the parameters, each with its share of the rows;
  - fsdp: rows are split too, and so are parameters and optimiser state;
  - tensor: heads, MLP columns and the vocabulary are split.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rlpr_jax.errors import InputError

MESH_AXES = ("data", "fsdp", "tensor")
RULES: dict[str, tuple[str, ...]] = {
  "batch": ("data", "fsdp"),
  "sequence": (),
  "embed": ("fsdp",),
  "heads": ("tensor",),
  "kv_heads": ("tensor",),
  "mlp": ("tensor",),
  "vocab": ("tensor",),
  "layers": (),
}


def create_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh of the given sizes; one of them may be -1, for all devices that the others leave.

  With many processes the devices of each stand together, so that each has whole parts along `tensor`.

  Raises:
    InputError: the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
  free = [axis for axis, size in sizes.items() if size == -1]
  if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
    raise InputError(f"config.mesh: sizes {sizes}, expected positive numbers and at most one -1")
  rest, left_over = divmod(len(devices), math.prod(size for size in sizes.values() if size != -1))
  if left_over or (not free and rest != 1):
    raise InputError(f"config.mesh: sizes {sizes} do not multiply to the {len(devices)} devices that are there")
  sizes |= dict.fromkeys(free, rest)
  if (processes := count_processes(devices)) > 1:
    own = len(devices) // processes
    if own % sizes["tensor"]:
      raise InputError(f"config.mesh.tensor: {sizes['tensor']}, expected a divisor of the {own} devices of a process")
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    return Mesh(np.reshape(ordered, tuple(sizes.values())), MESH_AXES, axis_types=(AxisType.Auto,) * 3)
  return jax.make_mesh(tuple(sizes.values()), MESH_AXES, (AxisType.Auto,) * 3, devices=devices)


def count_processes(devices: Sequence[jax.Device]) -> int:
  """How many processes have the devices: of those that are only described, how many would."""
  return len({device.process_index for device in devices})


@dataclasses.dataclass(frozen=True)
class Sharding:
  """A mesh and the table. Without a mesh everything is on one device and the methods do nothing."""

  mesh: Mesh | None = None
  rules: tuple[tuple[str, tuple[str, ...]], ...] = tuple(RULES.items())

  def __post_init__(self):
    if self.mesh is not None and self.mesh.size == 1:
      object.__setattr__(self, "mesh", None)

  def spec(self, axes: Sequence[str | None]) -> PartitionSpec:
    """Mesh axes of an array whose axes are named so. A mesh axis serves the first name that asks for it."""
    rules, taken, parts = dict(self.rules), set(), []
    for axis in axes:
      free = tuple(name for name in rules.get(axis, ()) if name not in taken)
      taken.update(free)
      parts.append(free or None)
    return PartitionSpec(*parts)

  def named(self, axes: Sequence[str | None]) -> NamedSharding | None:
    """The sharding of an array whose axes are named so."""
    return None if self.mesh is None else NamedSharding(self.mesh, self.spec(axes))

  def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
    """Tells the compiler how `x` is to lie."""
    return x if self.mesh is None else jax.lax.with_sharding_constraint(x, self.named(axes))

  def ways(self, axis: str) -> int:
    """Into how many parts an axis is split."""
    return 1 if self.mesh is None else math.prod(self.mesh.shape[name] for name in dict(self.rules).get(axis, ()))

  @property
  def processes(self) -> int:
    """How many processes share the mesh."""
    return 1 if self.mesh is None else count_processes(self.mesh.devices.flat)

  def by_process(self) -> "Sharding":
    """The same with whole copies on each process, which are split over its own devices alone."""
    if self.processes == 1:
      return self
    devices = self.mesh.devices.reshape(self.processes, 1, -1, self.mesh.shape["tensor"])
    return dataclasses.replace(self, mesh=Mesh(devices, ("process", *MESH_AXES), axis_types=(AxisType.Auto,) * 4))

  def own(self) -> "Sharding":
    """This process's part of `by_process`, as a mesh by itself."""
    if self.processes == 1:
      return self
    devices = self.by_process().mesh.devices[jax.process_index()]
    return dataclasses.replace(self, mesh=Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * 3))

  def replicate(self, axis: str) -> "Sharding":
    """The same with one axis on every device."""
    return dataclasses.replace(self, rules=tuple((name, () if name == axis else on) for name, on in self.rules))


def own_part(tree: Any) -> Any:
  """Arrays that lie as `Sharding.by_process` says, as arrays of this process's devices alone."""

  def one(x: jax.Array) -> jax.Array:
    parts = [shard.data for shard in x.addressable_shards]
    if len(parts) == 1:
      return parts[0]
    mesh = Mesh(x.sharding.mesh.devices[jax.process_index()], MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    return jax.make_array_from_single_device_arrays(x.shape, NamedSharding(mesh, x.sharding.spec), parts)

  return tree if jax.process_count() == 1 else jax.tree.map(one, tree)


def create(mesh: Mesh | None, rules: Mapping[str, Sequence[str]] | None = None) -> Sharding:
  """A sharding by `rules`, or by `RULES` where they say nothing.

  Raises:
    InputError: a rule for a name that is not in `RULES`, or an axis that the mesh does not have.
  """
  for name, on in (rules or {}).items():
    if name not in RULES:
      raise InputError(f"config.sharding.{name}: unknown axis, expected one of {', '.join(RULES)}")
    for axis in on:
      if axis not in MESH_AXES:
        raise InputError(f"config.sharding.{name}: {axis!r}, expected axes of the mesh: {', '.join(MESH_AXES)}")
  return Sharding(mesh, tuple((name, tuple((rules or {}).get(name, on))) for name, on in RULES.items()))


def fit(sharding: Sharding, sizes: Mapping[str, int]) -> Sharding:
  """The sharding for a model with axes of these sizes; fewer key/value heads than parts are replicated.

  Raises:
    InputError: an axis that cannot be split evenly, and into how many parts it could be.
  """
  if sharding.ways("kv_heads") > 1 and sizes["kv_heads"] < sharding.ways("kv_heads"):
    sharding = sharding.replicate("kv_heads")
  for axis, size in sizes.items():
    ways = sharding.ways(axis)
    if size % ways:
      # Parts that the heads allow; the key/value heads are replicated when there are fewer of them.
      fitting = [n for n in range(1, min(size, sharding.mesh.size) + 1) if size % n == 0]
      raise InputError(
        f"the model's {size} {axis} cannot be split {ways} ways by the mesh, expected one of"
        f" {', '.join(map(str, fitting))}"
      )
  return sharding
