"""config.json of each model family, read and written. A family is its fields here and nothing else.

Both spellings are read, that of transformers 4 (`rope_theta`, `rope_scaling`) and of 5 (`rope_parameters`,
`layer_types`); the older one is written, since both versions understand it. A field that is not known by name is refused
unless it is switched off, for it may change the result.
"""

import dataclasses
import difflib
from typing import Any

from rlpr_jax.errors import InputError
from rlpr_jax.models.config import ModelConfig, Rope

FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text")
_GEMMA = ("gemma2", "gemma3_text")
_QWEN = ("qwen2", "qwen3")
_ATTENTION_BIASES = ("query", "key", "value", "out")
_MLP_BIASES = ("gate", "up", "down")
_ACTIVATIONS = {
  "silu": "silu",
  "swish": "silu",
  "gelu_pytorch_tanh": "gelu_tanh",
  "gelu_new": "gelu_tanh",
  "gelu_fast": "gelu_tanh",
}
_ARCHITECTURES = {
  "llama": "LlamaForCausalLM",
  "qwen2": "Qwen2ForCausalLM",
  "qwen3": "Qwen3ForCausalLM",
  "gemma2": "Gemma2ForCausalLM",
  "gemma3_text": "Gemma3ForCausalLM",
}

# What a decoder of every family is made of.
_SIZES = {
  "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
  "head_dim", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings",
  "rope_theta", "rope_scaling", "rope_parameters",
}  # fmt: skip
_WINDOWS = {"sliding_window", "layer_types"}
_READ = {
  "llama": _SIZES | {"hidden_act", "attention_bias", "mlp_bias"},
  "qwen2": _SIZES | _WINDOWS | {"hidden_act", "use_sliding_window", "max_window_layers"},
  "qwen3": _SIZES | _WINDOWS | {"hidden_act", "use_sliding_window", "max_window_layers", "attention_bias"},
  "gemma2": _SIZES | _WINDOWS | {
    "hidden_act", "hidden_activation", "attention_bias", "query_pre_attn_scalar", "attn_logit_softcapping",
    "final_logit_softcapping",
  },
  "gemma3_text": _SIZES | _WINDOWS | {
    "hidden_act", "hidden_activation", "attention_bias", "query_pre_attn_scalar", "attn_logit_softcapping",
    "final_logit_softcapping", "rope_local_base_freq", "sliding_window_pattern", "_sliding_window_pattern",
  },
}  # fmt: skip
# Of no effect on the logits of one forward pass without dropout.
_HARMLESS = {
  "model_type", "architectures", "torch_dtype", "dtype", "transformers_version", "transformers.js_config",
  "_name_or_path", "name_or_path", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "use_cache",
  "cache_implementation", "initializer_range", "attention_dropout", "hidden_dropout", "attn_implementation",
  "_attn_implementation_autoset", "auto_map", "is_llama_config", "unsloth_fixed", "unsloth_version", "output_attentions",
  "output_hidden_states", "return_dict", "id2label", "label2id", "problem_type", "chunk_size_feed_forward", "task_specific_params",
  "model_name", "license",
}  # fmt: skip
# Known by name, but implemented for one value alone.
_ONLY = {"pretraining_tp": 1, "partial_rotary_factor": 1.0}


def from_huggingface(fields: dict[str, Any], where: str) -> ModelConfig:
  """Reads the fields of a config.json; `where` names the file in errors.

  Raises:
    InputError: a missing field, another family, or a setting that may change the result and is not implemented.
  """
  family = fields.get("model_type")
  if family not in FAMILIES:
    raise InputError(f"{where}: model_type is {family!r}, expected one of {', '.join(FAMILIES)}")
  _refuse_unknown(family, fields, where)
  read = _Reader(fields, where)
  gemma, qwen = family in _GEMMA, family in _QWEN
  width, heads, layers = read.count("hidden_size"), read.count("num_attention_heads"), read.count("num_hidden_layers")
  windowed, window = _windows(family, read, layers)
  rope, local_rope = _ropes(family, read)
  biases = _ATTENTION_BIASES[:3] if family == "qwen2" else ()
  if read.flag("attention_bias"):
    biases = _ATTENTION_BIASES
  if read.flag("mlp_bias"):
    biases += _MLP_BIASES
  if not gemma and fields.get("head_dim") is None and width % heads:
    raise InputError(f"{where}: hidden_size {width} does not divide into {heads} heads, and there is no head_dim")
  config = {
    "vocab_size": read.count("vocab_size"),
    "embed_dim": width,
    "mlp_dim": read.count("intermediate_size"),
    "num_layers": layers,
    "num_heads": heads,
    "num_kv_heads": read.count("num_key_value_heads", None if gemma else heads),
    "head_dim": read.count("head_dim", None if gemma else 128 if family == "qwen3" else width // heads),
    "rope": rope,
    "local_rope": local_rope,
    "window": window if any(windowed) else None,
    "windowed": windowed if any(windowed) else (),
    "activation": _activation(family, fields, where),
    "norm_eps": read.number("rms_norm_eps", 1e-6),
    "norm_offset": gemma,
    "post_norms": gemma,
    "scale_embeddings": gemma,
    "query_pre_attn_scalar": read.number("query_pre_attn_scalar", 256) if gemma else None,
    "attention_softcap": read.optional("attn_logit_softcapping", 50.0 if family == "gemma2" else None),
    "final_softcap": read.optional("final_logit_softcapping", 30.0 if family == "gemma2" else None),
    "tie_embeddings": read.flag("tie_word_embeddings", gemma),
    "biases": biases,
    "qk_norm": family in ("qwen3", "gemma3_text"),
    "max_length": read.count("max_position_embeddings") if "max_position_embeddings" in fields else None,
  }
  try:
    return ModelConfig(**config)
  except InputError as error:
    raise InputError(f"{where}: {error}") from None


def family_of(config: ModelConfig) -> str:
  """The family whose model a config describes.

  Raises:
    InputError: none of them.
  """
  if config.post_norms:
    return "gemma3_text" if config.qk_norm else "gemma2"
  if config.qk_norm:
    return "qwen3"
  if config.biases == _ATTENTION_BIASES[:3] or any(config.windowed):
    return "qwen2"
  return "llama"


def to_huggingface(config: ModelConfig) -> dict[str, Any]:
  """The config.json of a model, such that `from_huggingface` gives the same config again.

  Raises:
    InputError: no family has these settings together.
  """
  family = family_of(config)
  fields: dict[str, Any] = {
    "model_type": family,
    "architectures": [_ARCHITECTURES[family]],
    "vocab_size": config.vocab_size,
    "hidden_size": config.embed_dim,
    "intermediate_size": config.mlp_dim,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "rms_norm_eps": config.norm_eps,
    "tie_word_embeddings": config.tie_embeddings,
    "rope_theta": config.rope.theta,
    "rope_scaling": _write_scaling(config.rope),
  }
  activation = "gelu_pytorch_tanh" if config.activation == "gelu_tanh" else "silu"
  fields["hidden_activation" if family in _GEMMA else "hidden_act"] = activation
  if config.max_length is not None:
    fields["max_position_embeddings"] = config.max_length
  if family != "qwen2":
    fields["attention_bias"] = "out" in config.biases
  if family == "llama":
    fields["mlp_bias"] = "gate" in config.biases
  if family in _GEMMA:
    fields |= {
      "query_pre_attn_scalar": config.query_pre_attn_scalar,
      "attn_logit_softcapping": config.attention_softcap,
      "final_logit_softcapping": config.final_softcap,
    }
  if family == "gemma3_text":
    fields["rope_local_base_freq"] = (config.local_rope or config.rope).theta
  if family != "llama":
    windowed = config.windowed or (False,) * config.num_layers
    fields["sliding_window"] = config.window
    fields["layer_types"] = ["sliding_attention" if local else "full_attention" for local in windowed]
  if family in _QWEN:
    fields["use_sliding_window"] = config.window is not None
  if from_huggingface(fields, "config") != dataclasses.replace(config, lora=None):  # adapters are not in a config.json
    raise InputError(f"the policy is close to a {family} model but not one: it cannot be written as a config.json")
  return fields


class _Reader:
  """Typed fields of a config.json; an error names the file, the field, its value and what was expected."""

  def __init__(self, fields: dict[str, Any], where: str):
    self.fields, self.where = fields, where

  def count(self, field: str, default: int | None = None) -> int:
    value = default if self.fields.get(field) is None else self.fields[field]
    if type(value) is not int or value < 1:
      raise InputError(f"{self.where}: {field} is {value!r}, expected a positive integer")
    return value

  def number(self, field: str, default: float) -> float:
    value = self.fields.get(field, default)
    if type(value) not in (int, float) or not 0 < value < float("inf"):
      raise InputError(f"{self.where}: {field} is {value!r}, expected a positive number")
    return float(value)

  def optional(self, field: str, default: float | None) -> float | None:
    return None if self.fields.get(field, default) is None else self.number(field, default)

  def flag(self, field: str, default: bool = False) -> bool:
    value = default if self.fields.get(field) is None else self.fields[field]
    if type(value) is not bool:
      raise InputError(f"{self.where}: {field} is {value!r}, expected true or false")
    return value


def _refuse_unknown(family: str, fields: dict[str, Any], where: str) -> None:
  known = _READ[family] | _HARMLESS
  for field, value in fields.items():
    if field in known or value is None or value is False or value in ([], {}):
      continue
    if field in _ONLY:
      if value != _ONLY[field]:
        raise InputError(f"{where}: {field} is {value!r}, only {_ONLY[field]!r} is implemented")
      continue
    near = difflib.get_close_matches(field, _READ[family] - set(fields), n=1, cutoff=0.8)
    hint = f"; was {near[0]} meant?" if near else "; remove it if it does not change the model"
    raise InputError(f"{where}: field {field} ({str(value)[:60]}) is not known for {family}{hint}")


def _activation(family: str, fields: dict[str, Any], where: str) -> str:
  # Gemma's first files name another activation in hidden_act than the one the model was trained with.
  field = "hidden_activation" if family in _GEMMA else "hidden_act"
  default = "gelu_pytorch_tanh" if family in _GEMMA else "silu"
  value = fields.get(field) or default
  if value not in _ACTIVATIONS:
    raise InputError(f"{where}: {field} is {value!r}, expected one of {', '.join(_ACTIVATIONS)}")
  return _ACTIVATIONS[value]


def _windows(family: str, read: _Reader, layers: int) -> tuple[tuple[bool, ...], int | None]:
  """Which layers have a window, and its tokens."""
  fields, where = read.fields, read.where
  if family == "llama" or (family in _QWEN and not read.flag("use_sliding_window")):
    if "sliding_attention" in (fields.get("layer_types") or ()):
      raise InputError(f"{where}: layer_types has sliding_attention, but use_sliding_window is not true")
    return (), None
  types = fields.get("layer_types")
  if types is not None:
    kinds = {"full_attention": False, "sliding_attention": True}
    if not isinstance(types, list) or len(types) != layers or not all(kind in kinds for kind in types):
      raise InputError(f"{where}: layer_types is {types!r:.80}, expected {layers} of {', '.join(kinds)}")
    windowed = tuple(kinds[kind] for kind in types)
  elif family in _QWEN:
    full = fields.get("max_window_layers", 28)
    if type(full) is not int:
      raise InputError(f"{where}: max_window_layers is {full!r}, expected a number of layers")
    windowed = tuple(layer >= full for layer in range(layers))
  else:
    pattern = "_sliding_window_pattern" if "_sliding_window_pattern" in fields else "sliding_window_pattern"
    period = 2 if family == "gemma2" else read.count(pattern, 6)
    windowed = tuple((layer + 1) % period != 0 for layer in range(layers))
  return windowed, read.count("sliding_window", 4096) if any(windowed) else None


def _ropes(family: str, read: _Reader) -> tuple[Rope, Rope | None]:
  """Rotary settings of all layers, and of those with a window where the family has others for them."""
  fields, where = read.fields, read.where
  parameters = fields.get("rope_parameters")
  if family == "gemma3_text":
    both = parameters or {}
    full = dict(both.get("full_attention") or {"rope_theta": fields.get("rope_theta", 1_000_000.0)})
    full |= fields.get("rope_scaling") or {}
    local = both.get("sliding_attention") or {"rope_theta": fields.get("rope_local_base_freq", 10_000.0)}
    return (
      _rope({"rope_theta": 1_000_000.0, **full}, f"{where}: rope"),
      _rope({"rope_theta": 10_000.0, **local}, f"{where}: rope of windows"),
    )
  rope = {"rope_theta": fields.get("rope_theta", 10_000.0)} | (parameters or fields.get("rope_scaling") or {})
  return _rope(rope, f"{where}: rope"), None


def _rope(fields: dict[str, Any], where: str) -> Rope:
  read = _Reader(fields, where)
  kind = fields.get("rope_type", fields.get("type", "default"))
  wanted = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
  }
  if kind not in wanted:
    raise InputError(f"{where} type is {kind!r}, expected one of {', '.join(wanted)}")
  for field, value in fields.items():
    known = wanted[kind] | {"rope_type", "type", "rope_theta"}
    if field not in known and value is not None and _ONLY.get(field) != value:
      raise InputError(f"{where}: field {field} is not known for rope type {kind!r}")
  missing = sorted(wanted[kind] - set(fields))
  if missing:
    raise InputError(f"{where}: {missing[0]} is missing, expected with rope type {kind!r}")
  rope = {"theta": read.number("rope_theta", 10_000.0), "kind": kind}
  if "factor" in wanted[kind]:
    rope["factor"] = read.number("factor", 1.0)
  if kind == "llama3":
    rope["low_freq_factor"] = read.number("low_freq_factor", 1.0)
    rope["high_freq_factor"] = read.number("high_freq_factor", 4.0)
    rope["original_length"] = read.count("original_max_position_embeddings")
    if rope["high_freq_factor"] <= rope["low_freq_factor"]:
      raise InputError(f"{where}: high_freq_factor {rope['high_freq_factor']} is not over low_freq_factor")
  return Rope(**rope)


def _write_scaling(rope: Rope) -> dict[str, Any] | None:
  if rope.kind == "default":
    return None
  scaling: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
  if rope.kind == "llama3":
    scaling["low_freq_factor"] = rope.low_freq_factor
    scaling["high_freq_factor"] = rope.high_freq_factor
    scaling["original_max_position_embeddings"] = rope.original_length
  return scaling
