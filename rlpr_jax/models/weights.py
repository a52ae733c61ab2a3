"""All that is known of each weight, in one table: its axes, how it begins, and its name in published files.

The path of a parameter is ("embedding",), ("head",), ("final_norm", "scale") or ("layers", NAME, PART), where PART is
`scale` of a norm, and `weight`, `bias`, `lora_a` or `lora_b` of a linear layer. Layers are stacked along a first axis.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax

from rlpr_jax.models.config import ModelConfig

Path = tuple[str, ...]


class Weight(NamedTuple):
  """A weight. Muon orthogonalises those of linear layers alone, and LoRA's adapters stand beside them alone."""

  huggingface: str  # its module in a file; of one in a layer, after model.layers.N
  axes: tuple[str | None, ...]  # by the names of `sharding.RULES`; "head_dim" is never split
  fan_in: tuple[str, ...] = ()  # the axes that are summed over; it begins normal, with a variance of 1 / their size
  linear: bool = False  # of a layer: axes that come in, the first, and axes that go out
  beside_post_norms: str = ""  # the module's name in a family that has norms after attention and MLP too
  fused: str = ""  # the module, where it is one of several whose tensors are one in files, in the order of the table

  @property
  def inputs(self) -> int:
    """How many axes come in."""
    return len(self.fan_in)

  def init_std(self, config: ModelConfig) -> float:
    """Standard deviation of the first values."""
    sizes = axis_sizes(config)
    return math.prod(sizes[axis] for axis in self.fan_in) ** -0.5

  def shape(self, config: ModelConfig) -> tuple[int, ...]:
    """Its shape in one layer, unless it is a norm's."""
    sizes = axis_sizes(config)
    return tuple(sizes[axis] for axis in self.axes if axis)


WEIGHTS = {
  "embedding": Weight("model.embed_tokens", ("vocab", "embed"), fan_in=("embed",)),
  "head": Weight("lm_head", ("vocab", "embed"), fan_in=("embed",)),
  "final_norm": Weight("model.norm", (None,)),
  "attention_norm": Weight("input_layernorm", (None,)),
  "query": Weight(
    "self_attn.q_proj", ("embed", "heads", "head_dim"), ("embed",), linear=True, fused="self_attn.qkv_proj"
  ),
  "key": Weight(
    "self_attn.k_proj", ("embed", "kv_heads", "head_dim"), ("embed",), linear=True, fused="self_attn.qkv_proj"
  ),
  "value": Weight(
    "self_attn.v_proj", ("embed", "kv_heads", "head_dim"), ("embed",), linear=True, fused="self_attn.qkv_proj"
  ),
  "out": Weight("self_attn.o_proj", ("heads", "head_dim", "embed"), ("heads", "head_dim"), linear=True),
  "query_norm": Weight("self_attn.q_norm", (None,)),
  "key_norm": Weight("self_attn.k_norm", (None,)),
  "post_attention_norm": Weight("post_attention_layernorm", (None,)),
  "mlp_norm": Weight("post_attention_layernorm", (None,), beside_post_norms="pre_feedforward_layernorm"),
  "gate": Weight("mlp.gate_proj", ("embed", "mlp"), ("embed",), linear=True, fused="mlp.gate_up_proj"),
  "up": Weight("mlp.up_proj", ("embed", "mlp"), ("embed",), linear=True, fused="mlp.gate_up_proj"),
  "down": Weight("mlp.down_proj", ("mlp", "embed"), ("mlp",), linear=True),
  "post_mlp_norm": Weight("post_feedforward_layernorm", (None,)),
}
LINEAR = tuple(name for name, weight in WEIGHTS.items() if weight.linear)


def axis_sizes(config: ModelConfig) -> dict[str, int]:
  """Length of each axis of the parameters.

  >>> axis_sizes(ModelConfig(8, 4, 16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=2))["mlp"]
  16
  """
  return {
    "vocab": config.vocab_size,
    "embed": config.embed_dim,
    "heads": config.num_heads,
    "kv_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "mlp": config.mlp_dim,
    "layers": config.num_layers,
  }


def key_path(path: Sequence[jax.tree_util.DictKey]) -> Path:
  """The path of a leaf of the parameters, as names.

  >>> key_path((jax.tree_util.DictKey("embedding"),))
  ('embedding',)
  """
  return tuple(key.key for key in path)


def weight_of(path: Path) -> Weight:
  """Finds the weight to which the parameter at `path` belongs.

  >>> weight_of(("layers", "query", "weight")).axes
  ('embed', 'heads', 'head_dim')
  """
  return WEIGHTS[path[1] if path[0] == "layers" else path[0]]


def param_axes(path: Path) -> tuple[str | None, ...]:
  """Names the axes of the parameter at `path`, for `sharding.Sharding.spec`.

  >>> param_axes(("layers", "down", "weight"))
  ('layers', 'mlp', 'embed')
  >>> param_axes(("layers", "down", "lora_b"))
  ('layers', None, 'embed')
  """
  weight = weight_of(path)
  ins, outs = weight.axes[: weight.inputs], weight.axes[weight.inputs :]
  axes = {"bias": outs, "lora_a": (*ins, None), "lora_b": (None, *outs)}.get(path[-1], weight.axes)
  return ("layers", *axes) if path[0] == "layers" else axes


def matrix_axes(path: Path) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
  """Finds which axes of a linear layer's stacked weight come in and which go out; None of any other parameter.

  >>> matrix_axes(("layers", "out", "weight"))
  ((1, 2), (3,))
  """
  weight = weight_of(path)
  if not weight.linear or path[-1] != "weight":
    return None
  axes = tuple(range(1, 1 + len(weight.axes)))
  return axes[: weight.inputs], axes[weight.inputs :]


def tensor_name(config: ModelConfig, path: Path) -> str:
  """Names the tensor of the parameter at `path` in safetensors; `{}` stands for the layer.

  >>> config = ModelConfig(8, 4, 4, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=2)
  >>> tensor_name(config, ("layers", "query", "lora_a"))
  'model.layers.{}.self_attn.q_proj.lora_A.weight'
  """
  weight = weight_of(path)
  module = (config.post_norms and weight.beside_post_norms) or weight.huggingface
  if config.fused_files and weight.fused:
    module = weight.fused
  part = {"bias": "bias", "lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}.get(path[-1], "weight")
  return f"model.layers.{{}}.{module}.{part}" if path[0] == "layers" else f"{module}.{part}"


def fused_rows(config: ModelConfig, path: Path) -> tuple[int, int] | None:
  """Finds the rows of its tensor in which the parameter at `path` lies; None where it is all of the tensor.

  >>> config = ModelConfig(8, 4, 6, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=2, fused_files=True)
  >>> [fused_rows(config, ("layers", name, "weight")) for name in ("query", "key", "value", "up", "down")]
  [(0, 4), (4, 6), (6, 8), (6, 12), None]
  """
  weight = weight_of(path)
  if not config.fused_files or not weight.fused:
    return None
  parts = [part for part in WEIGHTS.values() if part.fused == weight.fused]
  rows = [math.prod(part.shape(config)[part.inputs :]) for part in parts]
  first = sum(rows[: parts.index(weight)])
  return first, first + rows[parts.index(weight)]
