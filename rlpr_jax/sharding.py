"""Which axis of an array lies on which axis of the device mesh: one table of logical names.

Parameters and activations name their axes ("embed", "heads", ...); `RULES` says over which mesh axes each name is
split. The mesh has three axes:
  - data: whole copies of the parameters, each with its share of the rows;
  - fsdp: rows are split too, and so are parameters and optimiser state;
  - tensor: heads, MLP columns and the vocabulary are split.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

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


def create_mesh(
  data: int = 1,
  fsdp: int = -1,
  tensor: int = 1,
  devices: Sequence[Any] | None = None,
  together: bool = False,
) -> Mesh:
  """A mesh of the given sizes; one of them may be -1, for all devices that the others leave.

  With many processes each has whole parts along `tensor`, and these stand in the order of the torus: along another
  order the compiler for a three-dimensional one turns all-gathers into all-reduces of twice the bytes.

  Args:
    together: all parts of a process stand together instead, for `Sharding.by_process`.

  Raises:
    InputError: the sizes do not multiply to the number of devices.

  >>> dict(create_mesh(devices=jax.devices()[:1]).shape)
  {'data': 1, 'fsdp': 1, 'tensor': 1}
  """
  devices = jax.devices() if devices is None else devices
  sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
  free = [axis for axis, size in sizes.items() if size == -1]
  if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
    raise InputError(f"sizes {sizes}, expected positive numbers and at most one -1")
  rest, left_over = divmod(len(devices), math.prod(size for size in sizes.values() if size != -1))
  if left_over or (not free and rest != 1):
    raise InputError(f"sizes {sizes} do not multiply to the {len(devices)} devices that are there")
  sizes |= dict.fromkeys(free, rest)
  if (processes := count_processes(devices)) > 1:
    own = len(devices) // processes
    if own % sizes["tensor"]:
      raise InputError(f"tensor: {sizes['tensor']}, expected a divisor of the {own} devices of a process")
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    parts = np.reshape(ordered, (-1, sizes["tensor"])).tolist()
    if not together:
      parts.sort(key=lambda part: _place(part[0]))
    return Mesh(np.reshape(parts, tuple(sizes.values())), MESH_AXES, axis_types=(AxisType.Auto,) * 3)
  return jax.make_mesh(tuple(sizes.values()), MESH_AXES, (AxisType.Auto,) * 3, devices=devices)


def _place(device: Any) -> tuple[int, ...]:
  """Where a device lies in its torus, slice by slice; elsewhere its process comes first."""
  if device.platform != "tpu":
    return device.process_index, device.id
  return getattr(device, "slice_index", 0) or 0, *reversed(device.coords), device.core_on_chip


def count_processes(devices: Iterable[Any]) -> int:
  """How many processes have the devices: of those that are only described, how many would."""
  return len({device.process_index for device in devices})


@dataclasses.dataclass(frozen=True)
class Sharding:
  """A mesh and the table. Without a mesh everything is on one device and the methods do nothing."""

  mesh: Mesh | AbstractMesh | None = None
  rules: tuple[tuple[str, tuple[str, ...]], ...] = tuple(RULES.items())

  def __post_init__(self) -> None:
    if self.mesh is not None and self.mesh.size == 1:
      object.__setattr__(self, "mesh", None)

  def spec(self, axes: Sequence[str | None]) -> PartitionSpec:
    """Mesh axes of an array whose axes are named so. A mesh axis serves the first name that asks for it."""
    rules, taken = dict(self.rules), set[str]()
    parts = []
    for axis in axes:
      free = tuple(name for name in (rules.get(axis, ()) if axis else ()) if name not in taken)
      taken.update(free)
      parts.append(free or None)
    return PartitionSpec(*parts)

  def named(self, axes: Sequence[str | None]) -> NamedSharding | None:
    """The sharding of an array whose axes are named so."""
    return None if self.mesh is None else NamedSharding(self.mesh, self.spec(axes))

  def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
    """Tells the compiler how `x` is to lie."""
    return x if self.mesh is None else jax.lax.with_sharding_constraint(x, self.named(axes))

  def num_shards(self, axis: str) -> int:
    """The number of parts into which an axis is split."""
    return 1 if self.mesh is None else math.prod(self.mesh.shape[name] for name in dict(self.rules).get(axis, ()))

  @property
  def processes(self) -> int:
    """How many processes share the mesh."""
    return 1 if self.mesh is None else count_processes(self.mesh.devices.flat)

  @property
  def splits_params(self) -> bool:
    """Whether parameters are split along `data` or `fsdp`, which lead from process to process."""
    return any({"data", "fsdp"} & set(on) for name, on in self.rules if name not in ("batch", "sequence"))

  def by_process(self) -> "Sharding":
    """Gives each process whole copies of the parameters, which are split over its own devices alone."""
    if self.mesh is None or self.processes == 1 or not self.splits_params:
      return self
    devices = self.mesh.devices.reshape(self.processes, 1, -1, self.mesh.shape["tensor"])
    return dataclasses.replace(self, mesh=Mesh(devices, ("process", *MESH_AXES), axis_types=(AxisType.Auto,) * 4))

  def own(self) -> "Sharding":
    """This process's part of `by_process`, as a mesh by itself."""
    if self.mesh is None or self.processes == 1:
      return self
    parts = self.mesh.devices.reshape(-1, self.mesh.shape["tensor"])
    devices = np.stack([part for part in parts if part[0].process_index == jax.process_index()])[None]
    return dataclasses.replace(self, mesh=Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * 3))

  def replicate(self, axis: str) -> "Sharding":
    """Keeps one axis whole on every device."""
    return dataclasses.replace(self, rules=tuple((name, () if name == axis else on) for name, on in self.rules))


def own_part(tree: Any, sharding: Sharding) -> Any:
  """Makes of arrays that lie as `sharding.by_process()` says arrays of this process's devices alone."""
  mesh = sharding.own().mesh
  if mesh is None or jax.process_count() == 1:
    return tree

  def take(x: Any) -> jax.Array:
    parts = [shard.data for shard in x.addressable_shards]
    if len(parts) == 1:
      return parts[0]
    return jax.make_array_from_single_device_arrays(x.shape, NamedSharding(mesh, x.sharding.spec), parts)

  return jax.tree.map(take, tree)


def create(mesh: Mesh | AbstractMesh | None, rules: Mapping[str, Sequence[str]] | None = None) -> Sharding:
  """A sharding by `rules`, or by `RULES` where they say nothing.

  Raises:
    InputError: a rule for a name that is not in `RULES`, or an axis that the mesh does not have.

  >>> dict(create(None, {"embed": ()}).rules)["embed"]
  ()
  """
  for name, on in (rules or {}).items():
    if name not in RULES:
      raise InputError(f"{name}: unknown axis, expected one of {', '.join(RULES)}")
    for axis in on:
      if axis not in MESH_AXES:
        raise InputError(f"{name}: {axis!r}, expected axes of the mesh: {', '.join(MESH_AXES)}")
  return Sharding(mesh, tuple((name, tuple((rules or {}).get(name, on))) for name, on in RULES.items()))


def fit(sharding: Sharding, sizes: Mapping[str, int]) -> Sharding:
  """The sharding for a model with axes of these sizes; fewer key/value heads than parts are replicated.

  Raises:
    InputError: an axis that cannot be split evenly, and into how many parts it could be.

  >>> fit(Sharding(), {"heads": 3, "kv_heads": 1}).num_shards("heads")  # without a mesh everything fits
  1
  """
  if sharding.num_shards("kv_heads") > 1 and sizes["kv_heads"] < sharding.num_shards("kv_heads"):
    sharding = sharding.replicate("kv_heads")
  for axis, size in sizes.items():
    num_shards = sharding.num_shards(axis)
    if sharding.mesh is not None and size % num_shards:
      # Parts that the heads allow; the key/value heads are replicated when there are fewer of them.
      fitting = [n for n in range(1, min(size, sharding.mesh.size) + 1) if size % n == 0]
      raise InputError(
        f"the model's {size} {axis} cannot be split {num_shards} ways by the mesh, expected one of"
        f" {', '.join(map(str, fitting))}"
      )
  return sharding
