"""config.json of each model family, read and written. A family is its fields here and nothing else.

Both spellings are read, that of transformers 4 (`rope_theta`, `rope_scaling`) and of 5 (`rope_parameters`,
`layer_types`); the older one is written, since both versions understand it. Where a field is missing, its value is the
one that transformers takes, or it is asked for. A field that is not known by name is refused unless it is switched off,
for it may change the result.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rlpr_jax.errors import InputError
from rlpr_jax.models.config import ModelConfig, Rope

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "smollm3", "olmo2", "phi3")
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
  "mistral": "MistralForCausalLM",
  "qwen2": "Qwen2ForCausalLM",
  "qwen3": "Qwen3ForCausalLM",
  "gemma2": "Gemma2ForCausalLM",
  "gemma3_text": "Gemma3ForCausalLM",
  "smollm3": "SmolLM3ForCausalLM",
  "olmo2": "Olmo2ForCausalLM",
  "phi3": "Phi3ForCausalLM",
}

# What a decoder of every family is made of.
_SIZES = {
  "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
  "head_dim", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings", "rope_theta", "rope_scaling",
  "rope_parameters",
}  # fmt: skip
_QWEN_FIELDS = {"hidden_act", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}
_GEMMA_FIELDS = {
  "hidden_activation", "attention_bias", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping",
  "sliding_window", "layer_types",
}  # fmt: skip
_READ = {
  "llama": _SIZES | {"hidden_act", "attention_bias", "mlp_bias"},
  "mistral": _SIZES | {"hidden_act", "sliding_window"},
  "qwen2": _SIZES | _QWEN_FIELDS,
  "qwen3": _SIZES | _QWEN_FIELDS | {"attention_bias"},
  "gemma2": _SIZES | _GEMMA_FIELDS,
  "gemma3_text": _SIZES | _GEMMA_FIELDS | {"rope_local_base_freq", "sliding_window_pattern"},
  "smollm3": _SIZES | {
    "hidden_act", "attention_bias", "mlp_bias", "use_sliding_window", "sliding_window", "layer_types",
    "no_rope_layers", "no_rope_layer_interval",
  },
  "olmo2": _SIZES | {"hidden_act", "attention_bias"},
  "phi3": _SIZES | {"hidden_act", "sliding_window", "partial_rotary_factor"},
  "gemma3": {
    "text_config", "vision_config", "tie_word_embeddings", "mm_tokens_per_image", "boi_token_index", "eoi_token_index",
    "image_token_index", "boi_token_id", "eoi_token_id", "image_token_id",
  },
}  # fmt: skip
# Models of texts and images, whose text model alone is read, and its family.
_MULTIMODAL = {"gemma3": "gemma3_text"}
# What transformers takes where the text_config of such a model does not say it: published files say what differs.
_TEXT_DEFAULTS = {
  "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
  "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131_072,
}  # fmt: skip
# Of no effect on the logits of a forward pass without dropout.
_HARMLESS = {
  "model_type", "architectures", "torch_dtype", "dtype", "transformers_version", "transformers.js_config", "auto_map",
  "_name_or_path", "name_or_path", "model_name", "license", "is_llama_config", "unsloth_fixed", "unsloth_version",
  "_commit_hash", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id",
  "decoder_start_token_id", "bos_token", "eos_token", "pad_token", "unk_token", "tokenizer_class", "model_max_length",
  "max_sequence_length", "initializer_range", "attention_dropout", "hidden_dropout", "use_cache",
  "cache_implementation", "attn_implementation", "_attn_implementation", "_attn_implementation_autoset",
  "_flash_attn_2_enabled", "gradient_checkpointing", "use_bfloat16", "torchscript", "output_attentions",
  "output_hidden_states", "return_dict", "id2label", "label2id", "num_labels", "problem_type", "finetuning_task",
  "task_specific_params", "prefix", "chunk_size_feed_forward",
  # How to generate.
  "do_sample", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "num_beams",
  "num_beam_groups", "diversity_penalty", "num_return_sequences", "no_repeat_ngram_size",
  "encoder_no_repeat_ngram_size", "early_stopping", "min_length", "max_length", "max_new_tokens",
}  # fmt: skip
# Published files of these families have them, and transformers does not look at them.
_GEMMA_HARMLESS = {"hidden_act", "sliding_window_size", "_sliding_window_pattern"}  # what it reads stands beside them
_HARMLESS_IN = {
  "gemma2": _GEMMA_HARMLESS,
  "gemma3_text": _GEMMA_HARMLESS,
  "smollm3": {"max_window_layers", "pretraining_tp"},
  "phi3": {"original_max_position_embeddings"},  # of a kind of rope that is not implemented
}
# Known, but implemented for one value alone.
_ONLY = {"pretraining_tp": 1, "partial_rotary_factor": 1.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
# The fields that each kind of rotary embedding must have.
_ROPES = {
  "default": (),
  "linear": ("factor",),
  "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
  "yarn": ("factor", "original_max_position_embeddings"),
}
# Those that it may have.
_ROPES_OPTIONAL = {
  # transformers passes over attn_factor, which is vLLM's name for something else (DeepSeek-R1-0528-Qwen3-8B has it).
  "yarn": ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate", "attn_factor"),
}
# Where no padding token is given, transformers takes that of the published vocabulary, which has to be an id of ours.
_PADDED = ("smollm3", "phi3")
_LAYER_TYPES = {"full_attention": False, "sliding_attention": True}  # whether they have a window


def from_huggingface(fields: dict[str, Any], where: str) -> ModelConfig:
  """Reads the fields of a config.json; `where` names the file in errors.

  Raises:
    InputError: a missing field, another family, or a setting that may change the result and is not implemented.
  """
  family = fields.get("model_type")
  if family not in (*FAMILIES, *_MULTIMODAL):
    raise InputError(f"{where}: model_type is {family!r}, expected one of {', '.join((*FAMILIES, *_MULTIMODAL))}")
  _refuse_unknown(family, fields, where)
  if family in _MULTIMODAL:
    return from_huggingface(_text_fields(family, fields, where), f"{where}: text_config")
  if family == "gemma3_text" and fields.get("attn_logit_softcapping") is not None:
    raise InputError(
      f"{where}: attn_logit_softcapping is set, expected null: Gemma 3 has none (transformers ignores it)"
    )
  read = _Reader(fields, where)
  gemma = family in _GEMMA
  layers, heads = read.count("num_hidden_layers"), read.count("num_attention_heads")
  unrotated = _unrotated(read, layers) if family == "smollm3" else ()
  windowed, window = _windows(family, read, layers, unrotated)
  rope, local_rope = _ropes(family, read)
  biases: tuple[str, ...] = _ATTENTION_BIASES[:3] if family == "qwen2" else ()
  if read.flag("attention_bias"):
    biases = _ATTENTION_BIASES
  if read.flag("mlp_bias"):
    biases += _MLP_BIASES
  config: dict[str, Any] = {
    "vocab_size": read.count("vocab_size"),
    "embed_dim": read.count("hidden_size"),
    "mlp_dim": read.count("intermediate_size"),
    "num_layers": layers,
    "num_heads": heads,
    # transformers' own numbers for a missing field are those of one size of the model, but for these families' rule.
    "num_kv_heads": read.count("num_key_value_heads", heads if family in ("llama", "olmo2", "phi3") else None),
    "head_dim": _head_dim(family, read, heads),
    "rope": rope,
    "local_rope": local_rope,
    "unrotated": unrotated,
    "window": window,
    "windowed": windowed,
    "activation": _activation(family, read),
    "norm_eps": read.number("rms_norm_eps", 1e-5 if family in ("olmo2", "phi3") else 1e-6),
    "norm_offset": gemma,
    "pre_norms": family != "olmo2",
    "post_norms": gemma or family == "olmo2",
    "scale_embeddings": gemma,
    "query_pre_attn_scalar": read.number("query_pre_attn_scalar", 256) if gemma else None,
    "attention_softcap": read.optional("attn_logit_softcapping", 50.0) if family == "gemma2" else None,
    "final_softcap": read.optional("final_logit_softcapping", 30.0 if family == "gemma2" else None),
    "tie_embeddings": read.flag("tie_word_embeddings", gemma or family == "smollm3"),
    "biases": biases,
    "qk_norm": family in ("qwen3", "gemma3_text", "olmo2"),
    "qk_norm_whole": family == "olmo2",
    "fused_files": family == "phi3",
    "max_length": read.count("max_position_embeddings") if "max_position_embeddings" in fields else None,
  }
  try:
    return ModelConfig(**config)
  except InputError as error:
    raise InputError(f"{where}: {error}") from None


def _text_fields(family: str, fields: dict[str, Any], where: str) -> dict[str, Any]:
  """The fields of the text model in the config.json of a multimodal one."""
  top = _Reader(fields, where)
  text, tied = top.object("text_config"), top.flag("tie_word_embeddings", True)
  if "text_config" not in fields:
    raise InputError(f"{where}: text_config is missing, expected with model_type {family}")
  if text.get("model_type", _MULTIMODAL[family]) != _MULTIMODAL[family]:
    raise InputError(
      f"{where}: text_config: model_type is {text['model_type']!r}, expected {_MULTIMODAL[family]} with {family}"
    )
  if _Reader(text, f"{where}: text_config").flag("tie_word_embeddings", tied) != tied:
    raise InputError(f"{where}: tie_word_embeddings is {tied}, and not so in text_config, expected the same")
  return _TEXT_DEFAULTS | text | {"model_type": _MULTIMODAL[family], "tie_word_embeddings": tied}


def _family_of(config: ModelConfig) -> str:
  """The family whose model a config describes, or which is nearest to it."""
  if config.fused_files:
    return "phi3"
  if any(config.unrotated):
    return "smollm3"
  if not config.pre_norms:
    return "olmo2"
  if config.post_norms:
    return "gemma3_text" if config.qk_norm else "gemma2"
  if config.qk_norm:
    return "qwen3"
  if config.windowed == (True,) * config.num_layers and not config.biases:
    return "mistral"
  if config.biases == _ATTENTION_BIASES[:3] or any(config.windowed):
    return "qwen2"
  return "llama"


def to_huggingface(config: ModelConfig) -> dict[str, Any]:
  """The config.json of a model, such that `from_huggingface` gives the same config again.

  Raises:
    InputError: no family has these settings together.
  """
  family = _family_of(config)
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
  read = _READ[family]
  activation = "gelu_pytorch_tanh" if config.activation == "gelu_tanh" else "silu"
  fields["hidden_activation" if family in _GEMMA else "hidden_act"] = activation
  if config.max_length is not None:
    fields["max_position_embeddings"] = config.max_length
  if "attention_bias" in read:
    fields["attention_bias"] = "out" in config.biases
  if "partial_rotary_factor" in read:
    fields["partial_rotary_factor"] = config.rope.fraction
  if "mlp_bias" in read:
    fields["mlp_bias"] = "gate" in config.biases
  if family in _GEMMA:
    fields |= {
      "query_pre_attn_scalar": _whole(config.query_pre_attn_scalar),
      "attn_logit_softcapping": config.attention_softcap,
      "final_logit_softcapping": config.final_softcap,
    }
  if family == "gemma3_text":
    fields["rope_local_base_freq"] = (config.local_rope or config.rope).theta
  windowed = config.windowed or (False,) * config.num_layers
  if "sliding_window" in read:
    fields["sliding_window"] = config.window
  if "layer_types" in read:
    fields["layer_types"] = ["sliding_attention" if local else "full_attention" for local in windowed]
  if "use_sliding_window" in read:
    fields["use_sliding_window"] = config.window is not None
  if family in _QWEN:
    fields["max_window_layers"] = windowed.count(False)  # for what does not know layer_types
  if family == "smollm3":
    fields["no_rope_layers"] = [int(not without) for without in config.unrotated]
  if family in _PADDED:
    fields["pad_token_id"] = None
  again = from_huggingface(fields, "config.json")
  for field in dataclasses.fields(config):
    found, wanted = getattr(again, field.name), getattr(config, field.name)
    if field.name not in ("lora", "known_tokens") and found != wanted:  # these do not stand in a config.json
      raise InputError(f"{field.name} is {wanted}, which a config.json of {family} cannot say, expected {found}")
  return fields


class _Reader:
  """Typed fields of a config.json; an error names the file, the field, its value and what was expected."""

  def __init__(self, fields: dict[str, Any], where: str):
    self.fields, self.where = fields, where

  def count(self, field: str, default: int | None = None, least: int = 1) -> int:
    value = default if self.fields.get(field) is None else self.fields[field]
    if type(value) is not int or value < least:
      expected = "a positive integer" if least else "an integer, 0 or more"
      raise InputError(f"{self.where}: {field} is {value!r}, expected {expected}")
    return value

  def number(self, field: str, default: float | None) -> float:
    value: Any = self.fields.get(field, default)
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

  def object(self, field: str) -> dict[str, Any]:
    value = {} if self.fields.get(field) is None else self.fields[field]
    if not isinstance(value, dict):
      raise InputError(f"{self.where}: {field} is {value!r}, expected an object")
    return value

  def choice(self, field: str, default: str, choices: Mapping[str, Any]) -> str:
    value = default if self.fields.get(field) is None else self.fields[field]
    if not isinstance(value, str) or value not in choices:
      raise InputError(f"{self.where}: {field} is {value!r}, expected one of {', '.join(choices)}")
    return value


def _refuse_unknown(family: str, fields: dict[str, Any], where: str) -> None:
  known = _READ[family] | _HARMLESS | _HARMLESS_IN.get(family, set())
  for field, value in fields.items():
    if field in known:
      continue
    if field in _ONLY:
      if value is not None and value != _ONLY[field]:
        raise InputError(f"{where}: {field} is {value!r}, only {_ONLY[field]!r} is implemented")
      continue
    off = value is None or value is False or value in ([], {})
    # What is switched off is refused too if it is almost certainly another field mistyped.
    near = difflib.get_close_matches(field, _READ[family] - set(fields), n=1, cutoff=0.9 if off else 0.8)
    if near:
      raise InputError(f"{where}: {field} is not a field of {family}; was {near[0]} meant?")
    if not off:
      raise InputError(
        f"{where}: {field} is {value!r:.80}, which is not implemented for {family}, expected no such field"
      )


def _head_dim(family: str, read: _Reader, heads: int) -> int:
  if family not in ("qwen3", *_GEMMA) and read.fields.get("head_dim") is None:
    width = read.count("hidden_size")
    if width % heads:
      raise InputError(
        f"{read.where}: hidden_size {width} does not divide into {heads} heads, and there is no head_dim"
      )
    size = width // heads
  else:
    size = read.count("head_dim", 128 if family == "qwen3" and "head_dim" not in read.fields else None)
  if size % 2:
    raise InputError(f"{read.where}: heads have {size} dimensions, expected an even number: pairs of them are rotated")
  return size


def _activation(family: str, read: _Reader) -> str:
  if family in _GEMMA:
    return _ACTIVATIONS[read.choice("hidden_activation", "gelu_pytorch_tanh", _ACTIVATIONS)]
  return _ACTIVATIONS[read.choice("hidden_act", "silu", _ACTIVATIONS)]


def _unrotated(read: _Reader, layers: int) -> tuple[bool, ...]:
  """Whether each layer of a SmolLM3 goes without rotary embedding; () where none does."""
  rotated = read.fields.get("no_rope_layers")  # in spite of its name: 1 for a layer with it
  if rotated is None:
    period = read.count("no_rope_layer_interval", 4)
    unrotated = tuple((layer + 1) % period == 0 for layer in range(layers))
  elif isinstance(rotated, list) and len(rotated) >= layers and all(flag in (0, 1) for flag in rotated):
    unrotated = tuple(not flag for flag in rotated[:layers])
  else:
    raise InputError(f"{read.where}: no_rope_layers is {rotated!r:.80}, expected a list of {layers}, each 0 or 1")
  return unrotated if any(unrotated) else ()


def _windows(
  family: str, read: _Reader, layers: int, unrotated: tuple[bool, ...]
) -> tuple[tuple[bool, ...], int | None]:
  """Whether each layer has a window, and its tokens; (), None where none has."""
  if "sliding_window" not in _READ[family]:
    return (), None
  fields = read.fields
  default = None if family in ("smollm3", "phi3") else 4096
  window = read.count("sliding_window", default) if fields.get("sliding_window", default) is not None else None
  if "use_sliding_window" in _READ[family] and not read.flag("use_sliding_window"):
    window = None
  if family in ("mistral", "phi3"):
    return ((True,) * layers, window) if window else ((), None)
  types = fields.get("layer_types")
  if types is not None:
    if not isinstance(types, list) or len(types) != layers or not all(kind in tuple(_LAYER_TYPES) for kind in types):
      raise InputError(
        f"{read.where}: layer_types is {types!r:.80}, expected a list of {layers}, each {' or '.join(_LAYER_TYPES)}"
      )
    windowed = tuple(_LAYER_TYPES[kind] for kind in types)
  elif family == "smollm3":
    windowed = unrotated if window is not None else ()
  elif family in _QWEN:
    full = read.count("max_window_layers", 28, least=0)
    windowed = tuple(window is not None and layer >= full for layer in range(layers))
  else:
    period = 2 if family == "gemma2" else read.count("sliding_window_pattern", 6)
    windowed = tuple((layer + 1) % period != 0 for layer in range(layers))
  if not any(windowed):
    return (), None
  if window is None:
    raise InputError(f"{read.where}: layers have sliding_attention but no window, expected sliding_window to be set")
  return windowed, window


def _ropes(family: str, read: _Reader) -> tuple[Rope, Rope | None]:
  """Rotary settings of all layers, and of those with a window where the family has others for them."""
  fields, where = read.fields, f"{read.where}: rope"
  parameters, scaling = read.object("rope_parameters"), read.object("rope_scaling")
  # As in transformers: rope_scaling goes before rope_parameters, and rope_theta is for what does not say it itself.
  if family != "gemma3_text":
    theta = 2_000_000.0 if family == "smollm3" else 10_000.0
    rope = {"rope_theta": fields.get("rope_theta", theta)} | (scaling or parameters)
    return (_partial_rope(read, rope, where) if family == "phi3" else _rope(rope, where)), None
  for kind in parameters:
    if kind not in _LAYER_TYPES:
      raise InputError(f"{where}: rope_parameters has {kind}, expected {' and '.join(_LAYER_TYPES)}")
  of_layers = _Reader(parameters, where)
  full = {"rope_theta": fields.get("rope_theta", 1_000_000.0)} | of_layers.object("full_attention") | scaling
  local = {"rope_theta": fields.get("rope_local_base_freq", 10_000.0)} | of_layers.object("sliding_attention")
  ropes = _rope(full, where), _rope(local, f"{where} of windows")
  if not all(rope.truncate for rope in ropes):
    raise InputError(f"{where}: truncate is false, expected true: transformers does not read it of Gemma 3")
  return ropes


def _partial_rope(model: _Reader, fields: dict[str, Any], where: str) -> Rope:
  """That of Phi-3, which may rotate a part of each head, and is stretched in no way that is implemented."""
  fields = {"partial_rotary_factor": model.fields.get("partial_rotary_factor", 1.0)} | fields
  fraction = _Reader(fields, where).number("partial_rotary_factor", 1.0)
  rope = _rope({name: value for name, value in fields.items() if name != "partial_rotary_factor"}, where, ("default",))
  rotated = int(fraction * _head_dim("phi3", model, model.count("num_attention_heads")))
  if fraction > 1 or not rotated or rotated % 2:
    raise InputError(
      f"{where}: partial_rotary_factor is {fraction}, expected at most 1, and an even number of a head's dimensions, "
      f"not {rotated}"
    )
  return dataclasses.replace(rope, fraction=fraction)


def _rope(fields: dict[str, Any], where: str, kinds: Sequence[str] = tuple(_ROPES)) -> Rope:
  read = _Reader(fields, where)
  kind = fields.get("rope_type", fields.get("type", "default"))
  if not isinstance(kind, str) or kind not in kinds:
    raise InputError(f"{where} type is {kind!r}, expected {'one of ' * (len(kinds) > 1)}{', '.join(kinds)}")
  for field in _ROPES[kind]:
    if field not in fields:
      raise InputError(f"{where}: {field} is missing, expected with rope type {kind!r}")
  for field, value in fields.items():
    known = (*_ROPES[kind], *_ROPES_OPTIONAL.get(kind, ()), "rope_type", "type", "rope_theta")
    if field not in known and value is not None and _ONLY.get(field) != value:
      raise InputError(f"{where}: {field} is {value!r:.80}, expected no such field with rope type {kind!r}")
  rope: dict[str, Any] = {"theta": read.number("rope_theta", 10_000.0), "kind": kind}
  if kind != "default":
    rope["factor"] = read.number("factor", 1.0)
  if kind == "llama3":
    low, high = read.number("low_freq_factor", 1.0), read.number("high_freq_factor", 4.0)
    if high <= low:
      raise InputError(f"{where}: high_freq_factor is {high}, expected more than low_freq_factor, {low}")
    rope |= {"low_freq_factor": low, "high_freq_factor": high}
    rope["original_length"] = read.count("original_max_position_embeddings")
  if kind == "yarn":
    rope["original_length"] = read.count("original_max_position_embeddings")
    fast, slow = read.optional("beta_fast", None) or 32.0, read.optional("beta_slow", None) or 1.0
    if fast < slow:
      raise InputError(f"{where}: beta_fast is {fast}, expected at least beta_slow, {slow}")
    if rope["theta"] == 1:
      raise InputError(f"{where}: rope_theta is 1, expected another with rope type 'yarn'")
    rope |= {"beta_fast": fast, "beta_slow": slow, "truncate": read.flag("truncate", True)}
    rope["attention_factor"] = read.optional("attention_factor", None) or _yarn_attention_factor(
      rope["factor"], read.optional("mscale", None), read.optional("mscale_all_dim", None)
    )
  return Rope(**rope)


def _yarn_attention_factor(factor: float, mscale: float | None = None, mscale_all_dim: float | None = None) -> float:
  """The factor of queries and keys where a config.json does not say it, as transformers gives it.

  >>> _yarn_attention_factor(4.0), _yarn_attention_factor(40.0, 1.0, 1.0)
  (1.1386, 1.0)
  """

  def scale(mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

  return scale(mscale) / scale(mscale_all_dim) if mscale and mscale_all_dim else scale(1.0)


def _write_scaling(rope: Rope) -> dict[str, Any] | None:
  if rope.kind == "default":
    return None
  scaling: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
  if rope.kind == "llama3":
    scaling["low_freq_factor"] = rope.low_freq_factor
    scaling["high_freq_factor"] = rope.high_freq_factor
    scaling["original_max_position_embeddings"] = rope.original_length
  if rope.kind == "yarn":
    scaling["original_max_position_embeddings"] = rope.original_length
    scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
    # Only what is not the default: vLLM does not know these fields.
    if not rope.truncate:
      scaling["truncate"] = False
    if rope.attention_factor != _yarn_attention_factor(rope.factor):
      scaling["attention_factor"] = rope.attention_factor
  return scaling


def _whole(value: float | None) -> float | int | None:
  """As an integer where it is one: transformers asks for that."""
  return int(value) if value is not None and value.is_integer() else value
