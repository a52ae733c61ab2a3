"""How a parameter lies in a Hugging Face directory: the name of its tensor there, and the order of its axes."""

import dataclasses
import itertools
import math

import jax

from rlpr_jax.models.config import LINEAR, ModelConfig

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_TOP = {
  ("embedding",): "model.embed_tokens.weight",
  ("final_norm", "scale"): "model.norm.weight",
  ("head",): "lm_head.weight",
}
_NORMS = {
  "attention_norm": "input_layernorm",
  "query_norm": "self_attn.q_norm",
  "key_norm": "self_attn.k_norm",
  "mlp_norm": "post_attention_layernorm",
}
_GEMMA_NORMS = _NORMS | {
  "post_attention_norm": "post_attention_layernorm",
  "mlp_norm": "pre_feedforward_layernorm",
  "post_mlp_norm": "post_feedforward_layernorm",
}
LINEAR_NAMES = {
  "query": "self_attn.q_proj",
  "key": "self_attn.k_proj",
  "value": "self_attn.v_proj",
  "out": "self_attn.o_proj",
  "gate": "mlp.gate_proj",
  "up": "mlp.up_proj",
  "down": "mlp.down_proj",
}
_PARTS = {
  "scale": "weight",
  "weight": "weight",
  "bias": "bias",
  "lora_a": "lora_A.weight",
  "lora_b": "lora_B.weight",
}


def tensor_name(config: ModelConfig, path: tuple[str, ...]) -> str:
  """Name of the parameter at `path` in safetensors; `{}` stands for the layer."""
  if path in _TOP:
    return _TOP[path]
  module, part = path[1:]
  norms = _GEMMA_NORMS if config.post_norms else _NORMS
  return f"model.layers.{{}}.{(norms | LINEAR_NAMES)[module]}.{_PARTS[part]}"


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


def layout(path: tuple[str, ...], shape: tuple[int, ...]) -> Layout:
  """Layout of the parameter at `path`; `shape` is that of one layer where layers are stacked."""
  axes = tuple(range(len(shape)))
  part = path[-1]
  if part == "bias":
    return Layout(shape, (axes,))
  if part in ("weight", "lora_a", "lora_b"):
    ins = {"weight": LINEAR[path[-2]], "lora_a": len(shape) - 1, "lora_b": 1}[part]
    return Layout(shape, (axes[ins:], axes[:ins]))
  return Layout(shape, tuple((axis,) for axis in axes))


def key_path(path: tuple[jax.tree_util.DictKey, ...]) -> tuple[str, ...]:
  """The path of a leaf of the parameters, as names."""
  return tuple(key.key for key in path)
