"""How a parameter lies in a Hugging Face directory: the order of its axes there."""

import dataclasses
import itertools
import math

import jax

from rlpr_jax.models.weights import WEIGHTS, Path

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Layout:
  """A parameter, or its part in one layer, and the tensor of a file that holds the same numbers.

  A linear layer's weight is [*ins, *outs] here and [outs, ins] there, where several axes (heads and their dimensions)
  are one.
  """

  shape: tuple[int, ...]  # of the parameter
  groups: tuple[tuple[int, ...], ...]  # for each axis of the tensor, those of the parameter that it is made of

  @property
  def file_shape(self) -> tuple[int, ...]:
    return tuple(math.prod(self.shape[axis] for axis in group) for group in self.groups)

  def read(self, tensor: jax.Array) -> jax.Array:
    """The parameter, of a tensor in `file_shape`."""
    order = tuple(itertools.chain(*self.groups))
    split = tensor.reshape([self.shape[axis] for axis in order])
    return split.transpose([order.index(axis) for axis in range(len(order))])

  def write(self, parameter: jax.Array) -> jax.Array:
    """The tensor in `file_shape`, of a parameter."""
    return parameter.transpose(tuple(itertools.chain(*self.groups))).reshape(self.file_shape)


def layout(path: Path, shape: tuple[int, ...]) -> Layout:
  """Layout of the parameter at `path`; `shape` is that of one layer where layers are stacked.

  >>> layout(("layers", "query", "weight"), (64, 4, 16)).file_shape
  (64, 64)
  """
  axes = tuple(range(len(shape)))
  part = path[-1]
  if part == "bias":
    return Layout(shape, (axes,))
  if part in ("weight", "lora_a", "lora_b"):
    ins = {"weight": WEIGHTS[path[-2]].inputs, "lora_a": len(shape) - 1, "lora_b": 1}[part]
    return Layout(shape, (axes[ins:], axes[:ins]))
  return Layout(shape, tuple((axis,) for axis in axes))
