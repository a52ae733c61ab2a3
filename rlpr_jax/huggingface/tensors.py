"""How a parameter lies in a Hugging Face directory: the order of its axes there, and under which names."""

import dataclasses
import itertools
import math
import re

import jax

from rlpr_jax.models.weights import WEIGHTS, Path

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Of the decoder, whether it was saved with its head or, as a base model, without, and alone or beside a vision part.
_DECODER = re.compile(
  r"(model\.language_model\.|language_model\.model\.|language_model\.|model\.)?(?=(embed_tokens|layers|norm)\.)"
)
# What no model of ours computes with, as transformers leaves it out. Frequencies follow from the config.
_LEFT_OUT = {
  "rotary buffers": re.compile(r"(.*\.)?rotary_emb\.\w+"),
  "of the vision part": re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\..*"),
  "of another head": re.compile(r"(score|v_head|classifier)\..*"),
}


def canonical_name(name: str) -> str:
  """The name that a tensor has in a causal model, as `weights.tensor_name` gives it.

  >>> canonical_name("layers.0.mlp.up_proj.weight")
  'model.layers.0.mlp.up_proj.weight'
  >>> canonical_name("language_model.model.norm.weight"), canonical_name("language_model.lm_head.weight")
  ('model.norm.weight', 'lm_head.weight')
  """
  prefix = _DECODER.match(name)
  return f"model.{name[prefix.end() :]}" if prefix else name.removeprefix("language_model.")


def left_out(name: str) -> str | None:
  """Names in words a tensor that no model computes with; None of any other.

  >>> left_out("model.layers.0.self_attn.rotary_emb.inv_freq"), left_out("score.weight"), left_out("lm_head.weight")
  ('rotary buffers', 'of another head', None)
  """
  return next((kind for kind, pattern in _LEFT_OUT.items() if pattern.fullmatch(name)), None)


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
