"""The shape of a policy: one dataclass for every family, read from a Hugging Face config.json."""

import dataclasses
from typing import Any

from rlpr_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Sizes and switches of one decoder. A family is a setting of these, not a class."""

  vocab_size: int
  embed_dim: int
  mlp_dim: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope_theta: float = 10_000.0  # base of the rotary frequencies
  norm_eps: float = 1e-6
  tie_embeddings: bool = False  # the output head is the embedding
  qkv_bias: bool = False  # Qwen2
  qk_norm: bool = False  # RMS norm of queries and keys over the head
  compute_dtype: str = "float32"  # bfloat16 on accelerators; parameters keep their own dtype

  def __post_init__(self):
    if self.num_heads % self.num_kv_heads:
      raise InputError(f"{self.num_heads} query heads do not divide into {self.num_kv_heads} key/value heads")


# Fields whose other values change the result and are not implemented: field -> the values that are understood.
_UNDERSTOOD = {
  "hidden_act": ("silu",),
  "mlp_bias": (False, None),
  "use_sliding_window": (False, None),
  "pretraining_tp": (1, None),
}


def from_huggingface(fields: dict[str, Any], where: str) -> ModelConfig:
  """Reads the fields of a Llama or Qwen2 config.json; `where` names the file in errors.

  Raises:
    InputError: a missing field, another family, or a setting that changes the result and is not implemented.
  """
  family = fields.get("model_type")
  if family not in ("llama", "qwen2"):
    raise InputError(f"{where}: model_type is {family!r}, expected 'llama' or 'qwen2'")
  for field, values in _UNDERSTOOD.items():
    if fields.get(field, values[0]) not in values:
      raise InputError(f"{where}: {field} is {fields[field]!r}, only {values[0]!r} is implemented")
  if family == "llama" and fields.get("attention_bias"):
    raise InputError(f"{where}: attention_bias is true, which is not implemented for llama")

  def count(field: str, default: int | None = None) -> int:
    value = default if fields.get(field) is None else fields[field]
    if type(value) is not int or value < 1:
      raise InputError(f"{where}: {field} is {value!r}, expected a positive integer")
    return value

  width, heads = count("hidden_size"), count("num_attention_heads")
  config = {
    "vocab_size": count("vocab_size"),
    "embed_dim": width,
    "mlp_dim": count("intermediate_size"),
    "num_layers": count("num_hidden_layers"),
    "num_heads": heads,
    "num_kv_heads": count("num_key_value_heads", heads),
    "head_dim": count("head_dim", width // heads),
    "rope_theta": _rope_theta(fields, where),
    "norm_eps": _number(fields, "rms_norm_eps", 1e-6, where),
    "tie_embeddings": bool(fields.get("tie_word_embeddings", False)),
    "qkv_bias": family == "qwen2",
  }
  try:
    return ModelConfig(**config)
  except InputError as error:
    raise InputError(f"{where}: {error}") from None


def _rope_theta(fields: dict[str, Any], where: str) -> float:
  """The rotary base, from `rope_theta` or, as transformers 5 writes it, from `rope_parameters`."""
  rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind != "default":
    raise InputError(f"{where}: rope type is {kind!r}, only 'default' is implemented")
  return _number(rope if "rope_theta" in rope else fields, "rope_theta", 10_000.0, where)


def _number(fields: dict[str, Any], field: str, default: float, where: str) -> float:
  value = fields.get(field, default)
  if type(value) not in (int, float) or value <= 0:
    raise InputError(f"{where}: {field} is {value!r}, expected a positive number")
  return float(value)
