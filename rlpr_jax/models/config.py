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

  def need(field: str) -> Any:
    if not isinstance(fields.get(field), int):
      raise InputError(f"{where}: {field} is {fields.get(field)!r}, expected an integer")
    return fields[field]

  heads = need("num_attention_heads")
  return ModelConfig(
    vocab_size=need("vocab_size"),
    embed_dim=need("hidden_size"),
    mlp_dim=need("intermediate_size"),
    num_layers=need("num_hidden_layers"),
    num_heads=heads,
    num_kv_heads=fields.get("num_key_value_heads") or heads,
    head_dim=fields.get("head_dim") or need("hidden_size") // heads,
    rope_theta=_rope_theta(fields, where),
    norm_eps=fields.get("rms_norm_eps", 1e-6),
    tie_embeddings=bool(fields.get("tie_word_embeddings", False)),
    qkv_bias=family == "qwen2",
  )


def _rope_theta(fields: dict[str, Any], where: str) -> float:
  """The rotary base, from `rope_theta` or, as transformers 5 writes it, from `rope_parameters`."""
  rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind != "default":
    raise InputError(f"{where}: rope type is {kind!r}, only 'default' is implemented")
  return float(rope.get("rope_theta", fields.get("rope_theta", 10_000.0)))
