"""config.json of published models against what transformers makes of the same files, and what is refused in others."""

import dataclasses
import importlib
import json
import pathlib

import numpy as np
import pytest
import transformers

from rlpr_jax import models
from rlpr_jax.errors import InputError
from rlpr_jax.huggingface.families import from_huggingface, to_huggingface
from tests.huggingface.published import LLAMA3_ROPE, MULTIMODAL, OFFICIAL
from tests.models import cases

SMOLLM2 = pathlib.Path(__file__).parents[2] / ".cache" / "smollm2-135m-instruct" / "config.json"
# Not published, but what transformers makes of them is as definite.
MORE = {
  "qwen2 with windows": OFFICIAL["Qwen2.5-7B"] | {
    "use_sliding_window": True, "sliding_window": 77, "max_window_layers": 21,
  },
  "qwen2 with windows in all layers": OFFICIAL["Qwen2.5-7B"] | {"use_sliding_window": True, "max_window_layers": 0},
  "qwen2 with windows of no length": OFFICIAL["Qwen2.5-7B"] | {
    "use_sliding_window": True, "sliding_window": None, "max_window_layers": 3,
  },
  "qwen2 with yarn": OFFICIAL["Qwen2.5-7B"] | {
    "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
  },
  "qwen2 with every field of yarn": OFFICIAL["Qwen2.5-7B"] | {
    "rope_scaling": {
      "factor": 40.0, "original_max_position_embeddings": 4096, "rope_type": "yarn", "beta_fast": 16,
      "beta_slow": 2, "mscale": 0.707, "mscale_all_dim": 1.0, "truncate": False,
    },
  },
  "llama with yarn that does not stretch": OFFICIAL["SmolLM2-135M"] | {
    "rope_scaling": {
      "factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "yarn", "attention_factor": 0.5,
      "beta_fast": None, "mscale": None,
    },
  },
  "llama with yarn in one pair": OFFICIAL["SmolLM2-135M"] | {
    "rope_theta": 50.0, "rope_scaling": {"factor": 2.0, "original_max_position_embeddings": 4, "rope_type": "yarn"},
  },
  "qwen3 with windows by layer_types": OFFICIAL["Qwen3-8B"] | {
    "use_sliding_window": True, "sliding_window": 99, "layer_types": ["full_attention", "sliding_attention"] * 18,
  },
  "qwen3 without head_dim": {key: value for key, value in OFFICIAL["Qwen3-8B"].items() if key != "head_dim"} | {
    "attention_bias": True,
  },
  "llama with biases": OFFICIAL["Llama-3.2-1B"] | {"attention_bias": True, "mlp_bias": True, "head_dim": 32},
  "llama with few fields": {
    key: OFFICIAL["SmolLM2-135M"][key]
    for key in ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                "num_attention_heads", "max_position_embeddings")
  },
  "llama with linear rope": OFFICIAL["SmolLM2-135M"] | {"rope_scaling": {"type": "linear", "factor": 4.0}},
  "llama with both ropes": OFFICIAL["Llama-3.1-8B"] | {
    "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 77.0},
  },
  "llama with theta in two places": OFFICIAL["SmolLM2-135M"] | {"rope_parameters": {"rope_theta": 77.0}},
  "gemma2 of other attention": OFFICIAL["gemma-2-9b-it"] | {
    "query_pre_attn_scalar": 144, "sliding_window": 123, "attn_logit_softcapping": None, "head_dim": 128,
    "tie_word_embeddings": False,
  },
  "gemma2 with few fields": {
    key: OFFICIAL["gemma-2-2b-it"][key]
    for key in ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim",
                "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
  },
  "gemma3 with a linear rope": OFFICIAL["gemma-3-1b-it"] | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
  "gemma3 with yarn": OFFICIAL["gemma-3-1b-it"] | {
    "rope_scaling": {"factor": 8.0, "rope_type": "yarn", "original_max_position_embeddings": 4096},
  },
  "gemma3 of another period": OFFICIAL["gemma-3-1b-it"] | {"sliding_window_pattern": 4, "_sliding_window_pattern": 3},
  "gemma3 with theta beside rope_parameters": OFFICIAL["gemma-3-1b-it"] | {
    "rope_theta": 5e4, "rope_local_base_freq": 77.0,
    "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}, "sliding_attention": None},
  },
  "gemma3 with few fields": {
    key: OFFICIAL["gemma-3-1b-it"][key]
    for key in ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim",
                "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
  },
  "smollm3 with few fields": {
    key: OFFICIAL["SmolLM3-3B"][key]
    for key in ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
  },
  "smollm3 with windows": {key: value for key, value in OFFICIAL["SmolLM3-3B"].items() if key != "layer_types"} | {
    "use_sliding_window": True, "sliding_window": 512, "no_rope_layers": [1, 0] * 20, "attention_bias": True,
  },
  "olmo2 with few fields": {
    key: OFFICIAL["OLMo-2-1124-7B"][key]
    for key in ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                "num_attention_heads", "max_position_embeddings")
  },
  "phi3 with few fields": {
    key: OFFICIAL["phi-4"][key]
    for key in ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                "num_attention_heads", "max_position_embeddings", "pad_token_id")
  },
  "phi3 that rotates a part": OFFICIAL["phi-4"] | {"partial_rotary_factor": 0.75, "sliding_window": 2047},
  "smollm3 that is rotated in every layer": OFFICIAL["SmolLM3-3B"] | {"no_rope_layers": [1] * 36},
}  # fmt: skip
ALL = OFFICIAL | MORE
ROTARY = {
  "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma2": "Gemma2",
  "gemma3_text": "Gemma3", "smollm3": "SmolLM3", "olmo2": "Olmo2", "phi3": "Phi3",
}  # fmt: skip


@pytest.fixture
def read_by_transformers(tmp_path):
  def read(fields):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    return transformers.AutoConfig.from_pretrained(tmp_path)

  return read


def check_same(ours, theirs):
  """Every field of our config, against the attributes that the layers in transformers read."""
  family = theirs.model_type
  gemma = family in ("gemma2", "gemma3_text")
  assert ours.vocab_size == theirs.vocab_size
  assert ours.embed_dim == theirs.hidden_size
  assert ours.mlp_dim == theirs.intermediate_size
  assert ours.num_layers == theirs.num_hidden_layers
  assert ours.num_heads == theirs.num_attention_heads
  assert ours.num_kv_heads == theirs.num_key_value_heads
  assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
  assert ours.norm_eps == theirs.rms_norm_eps
  assert ours.tie_embeddings == theirs.tie_word_embeddings
  assert ours.max_length == theirs.max_position_embeddings
  activation = theirs.hidden_activation if gemma else theirs.hidden_act
  assert ours.activation == {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}[activation]
  attention_bias = family == "qwen2" or getattr(theirs, "attention_bias", False)
  biases = {"query", "key", "value"} if attention_bias else set()
  biases |= {"out"} if attention_bias and family != "qwen2" else set()
  biases |= {"gate", "up", "down"} if getattr(theirs, "mlp_bias", False) else set()
  assert set(ours.biases) == biases
  assert ours.fused_files == (family == "phi3")
  windowed = tuple(kind == "sliding_attention" for kind in getattr(theirs, "layer_types", []))
  if family in ("mistral", "phi3"):
    windowed = (theirs.sliding_window is not None,) * theirs.num_hidden_layers
  assert ours.windowed == (windowed if any(windowed) else ())
  assert ours.window == (theirs.sliding_window if any(windowed) else None)
  unrotated = tuple(not flag for flag in getattr(theirs, "no_rope_layers", [])[: ours.num_layers])
  assert ours.unrotated == (unrotated if any(unrotated) else ())
  olmo = family == "olmo2"
  assert (ours.norm_offset, ours.post_norms, ours.scale_embeddings) == (gemma, gemma or olmo, gemma)
  assert ours.qk_norm == (family in ("qwen3", "gemma3_text", "olmo2"))
  assert (ours.pre_norms, ours.qk_norm_whole) == (not olmo, olmo)
  assert ours.query_pre_attn_scalar == getattr(theirs, "query_pre_attn_scalar", None)
  assert ours.attention_softcap == getattr(theirs, "attn_logit_softcapping", None)
  assert ours.final_softcap == getattr(theirs, "final_logit_softcapping", None)
  cases.import_torch()
  name = ROTARY[family]
  module = importlib.import_module(f"transformers.models.{name.lower()}.modeling_{name.lower()}")
  rotary = getattr(module, f"{name}RotaryEmbedding")(theirs)
  if family == "gemma3_text":
    pairs = [
      (rope, getattr(rotary, f"{kind}_inv_freq"), getattr(rotary, f"{kind}_attention_scaling"))
      for rope, kind in ((ours.rope, "full_attention"), (ours.local_rope, "sliding_attention"))
    ]
  else:
    assert ours.local_rope is None
    pairs = [(ours.rope, rotary.inv_freq, rotary.attention_scaling)]
  for rope, frequencies, scale in pairs:
    assert rope.attention_factor == pytest.approx(scale, rel=1e-15)
    np.testing.assert_allclose(rope.frequencies(ours.head_dim), frequencies.numpy(), rtol=3e-7)


@pytest.mark.parametrize("name", ALL)
def test_config_is_what_transformers_makes_of_it(name, read_by_transformers):
  check_same(from_huggingface(ALL[name], name), read_by_transformers(ALL[name]))


def test_config_of_the_real_model(read_by_transformers):
  if not SMOLLM2.exists():
    pytest.skip("no .cache/smollm2-135m-instruct: run tools/smollm2.py")
  fields = json.loads(SMOLLM2.read_text())
  check_same(from_huggingface(fields, "SmolLM2"), read_by_transformers(fields))


@pytest.mark.parametrize("name", ALL)
def test_both_spellings_are_the_same_config(name, read_by_transformers, tmp_path):
  """That of the file, and that in which transformers 5 saves it."""
  read_by_transformers(ALL[name]).save_pretrained(tmp_path / "saved")
  saved = json.loads((tmp_path / "saved" / "config.json").read_text())
  assert "rope_parameters" in saved
  assert "rope_theta" not in saved
  assert from_huggingface(saved, name) == from_huggingface(ALL[name], name)


@pytest.mark.parametrize("name", ALL)
def test_what_is_written_is_the_same_config(name, read_by_transformers):
  config = from_huggingface(ALL[name], name)
  fields = to_huggingface(config)
  assert from_huggingface(fields, name) == config
  assert json.loads(json.dumps(fields)) == fields
  check_same(config, read_by_transformers(fields))
  assert fields["architectures"] == [type(transformers.AutoModelForCausalLM.from_config(tiny(fields))).__name__]


def tiny(fields):
  """The same config with hardly any parameters."""
  small = {"hidden_size": 8, "intermediate_size": 4, "vocab_size": 4, "num_hidden_layers": 1, "layer_types": None}
  small |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "pad_token_id": None}
  return transformers.AutoConfig.for_model(**fields | small)


@pytest.mark.parametrize(
  ("name", "changes"),
  [
    ("Qwen3-8B", {"scale_embeddings": True}),
    ("Qwen3-8B", {"norm_offset": True}),
    ("Qwen3-8B", {"biases": ("query",)}),
    ("Qwen3-8B", {"post_norms": True}),
    ("Qwen3-8B", {"attention_softcap": 3.0}),
    ("Qwen3-8B", {"query_pre_attn_scalar": 7.0}),
    ("Qwen3-8B", {"local_rope": models.Rope(3.0)}),
    ("Qwen3-8B", {"window": 8}),
    ("Qwen3-8B", {"unrotated": (True, False) * 18}),
    ("SmolLM3-3B", {"qk_norm": True}),
    ("OLMo-2-1124-7B", {"qk_norm_whole": False}),
    ("OLMo-2-1124-7B", {"pre_norms": True}),
    ("OLMo-2-1124-7B", {"rope": models.Rope(3.0, fraction=0.5)}),
    ("phi-4", {"biases": ("query", "key", "value")}),
    ("phi-4", {"rope": models.Rope(3.0, "linear", 2.0)}),
    ("Qwen3-8B", {"fused_files": True}),
    ("Qwen3-8B", {"qk_norm_whole": True}),
    ("gemma-3-1b-it", {"pre_norms": False}),
    ("Llama-3.1-8B", {"biases": ("up", "down")}),
    ("Llama-3.1-8B", {"windowed": (True,) * 31 + (False,), "window": 8}),
    ("Mistral-7B-v0.1", {"biases": ("query", "key", "value", "out")}),
    ("gemma-3-1b-it", {"scale_embeddings": False}),
    ("gemma-3-1b-it", {"norm_offset": False}),
    ("gemma-3-1b-it", {"post_norms": False}),
    ("gemma-3-1b-it", {"qk_norm": False}),
    ("gemma-3-1b-it", {"query_pre_attn_scalar": None}),
    ("gemma-3-1b-it", {"attention_softcap": 3.0}),
    ("gemma-3-1b-it", {"local_rope": None}),
    ("gemma-3-1b-it", {"local_rope": models.Rope(3.0, "linear", 2.0)}),
  ],
)
def test_settings_of_no_family_are_not_written(name, changes):
  changed = dataclasses.replace(from_huggingface(ALL[name], name), **changes)
  with pytest.raises(InputError) as caught:
    to_huggingface(changed)
  assert "\n" not in str(caught.value)


def test_settings_of_another_family_are_written_as_that_one():
  """Qwen3 without its norms is a Llama."""
  changed = dataclasses.replace(from_huggingface(ALL["Qwen3-8B"], ""), qk_norm=False)
  fields = to_huggingface(changed)
  assert fields["model_type"] == "llama"
  assert from_huggingface(fields, "") == changed


@pytest.mark.parametrize(("name", "family"), [("Mistral-7B-v0.1", "mistral"), ("Mistral-Small-24B", "llama")])
def test_mistral_is_written_as_what_computes_the_same(name, family):
  """Without a window it is a Llama."""
  config = from_huggingface(ALL[name], "")
  fields = to_huggingface(config)
  assert fields["model_type"] == family
  assert ("attention_bias" in fields, "layer_types" in fields) == (family == "llama", False)
  assert from_huggingface(fields, "") == config


def test_adapters_do_not_stand_in_a_config():
  config = from_huggingface(ALL["Qwen3-8B"], "")
  adapted = dataclasses.replace(config, lora=models.LoRA(4, 8.0, ("query",)))
  assert to_huggingface(adapted) == to_huggingface(config)


# --- what is refused ---


def message(name, **changes):
  """What is said about a published config with these fields; None takes one out, ... sets it to null."""
  fields = {key: value for key, value in (ALL[name] | changes).items() if value is not None or key not in changes}
  fields = {key: None if value is ... else value for key, value in fields.items()}
  with pytest.raises(InputError) as caught:
    from_huggingface(fields, "dir/config.json")
  text = str(caught.value)
  assert "\n" not in text
  assert text.startswith("dir/config.json: ")
  return text.removeprefix("dir/config.json: ")


REQUIRED = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]


@pytest.mark.parametrize(
  ("name", "field"),
  [(name, field) for name in OFFICIAL for field in REQUIRED]
  + [
    (name, "num_key_value_heads")
    for name in OFFICIAL
    if not any(rule in name for rule in ("lama", "SmolLM2", "OLMo", "phi"))
  ]
  + [(name, "head_dim") for name in OFFICIAL if "gemma" in name],
)
def test_missing_field(name, field):
  assert message(name, **{field: None}) == f"{field} is None, expected a positive integer"


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe", "mixtral", "gemma", "gemma3n", "", 3, ["llama"]])
def test_other_family(family):
  known = "llama, mistral, qwen2, qwen3, gemma2, gemma3_text, smollm3, olmo2, phi3, gemma3"
  assert message("Llama-3.1-8B", model_type=family) == f"model_type is {family!r}, expected one of {known}"


@pytest.mark.parametrize("name", MULTIMODAL)
def test_text_part_of_a_multimodal_model(name, read_by_transformers, tmp_path):
  """In both spellings, and written as a text model."""
  config, theirs = from_huggingface(MULTIMODAL[name], name), read_by_transformers(MULTIMODAL[name])
  check_same(config, theirs.text_config)
  theirs.save_pretrained(tmp_path / "saved")
  saved = json.loads((tmp_path / "saved" / "config.json").read_text())
  assert "rope_parameters" in saved["text_config"]
  assert from_huggingface(saved, name) == config
  fields = to_huggingface(config)
  assert fields["model_type"] == "gemma3_text"
  assert from_huggingface(fields, name) == config
  check_same(config, read_by_transformers(fields))


@pytest.mark.parametrize(
  ("top", "text", "expected"),
  [
    ({"text_config": None}, {}, "text_config is missing, expected with model_type gemma3"),
    ({"text_config": 3}, {}, "text_config is 3, expected an object"),
    ({"quantization_config": {"bits": 4}}, {}, "quantization_config is {'bits': 4}, which is not implemented for"),
    ({"hidden_size": 3}, {}, "hidden_size is 3, which is not implemented for gemma3, expected no such field"),
    ({"tie_word_embeddings": False}, {"tie_word_embeddings": True}, "tie_word_embeddings is False, and not so in"),
    ({}, {"tie_word_embeddings": False}, "tie_word_embeddings is True, and not so in text_config, expected the same"),
    ({}, {"model_type": "llama"}, "text_config: model_type is 'llama', expected gemma3_text with gemma3"),
    ({}, {"hidden_size": "2560"}, "text_config: hidden_size is '2560', expected a positive integer"),
    ({}, {"use_bidirectional_attention": True}, "text_config: use_bidirectional_attention is True, which is not"),
    ({}, {"rope_scaling": {"rope_type": "x"}}, "text_config: rope type is 'x', expected one of default, linear,"),
  ],
)
def test_multimodal_model_that_is_refused(top, text, expected):
  fields = dict(MULTIMODAL["gemma-3-4b-it"])
  fields["text_config"] = fields["text_config"] | text
  fields = {key: value for key, value in (fields | top).items() if value is not None}
  with pytest.raises(InputError) as caught:
    from_huggingface(fields, "config.json")
  assert str(caught.value).startswith(f"config.json: {expected}")
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "proportional", "mrope", "su", 3, ["llama3"], None])
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_other_rope_types(kind, spelling):
  said = message("SmolLM2-135M", **{spelling: {"rope_type": kind, "factor": 4.0}})
  assert said == f"rope type is {kind!r}, expected one of default, linear, llama3, yarn"
  full = {"full_attention": {"rope_type": kind, "factor": 4.0}}
  said = message("gemma-3-1b-it", **{spelling: full["full_attention"] if spelling == "rope_scaling" else full})
  assert said == f"rope type is {kind!r}, expected one of default, linear, llama3, yarn"


def test_other_rope_type_in_the_old_spelling():
  assert message("SmolLM2-135M", rope_scaling={"type": "ntk", "factor": 2.0}).startswith("rope type is 'ntk'")


@pytest.mark.parametrize("field", [key for key in LLAMA3_ROPE if key != "rope_type"])
def test_missing_field_of_a_rope(field):
  rope = {key: value for key, value in LLAMA3_ROPE.items() if key != field}
  assert message("Llama-3.1-8B", rope_scaling=rope) == f"rope: {field} is missing, expected with rope type 'llama3'"


@pytest.mark.parametrize(
  ("rope", "expected"),
  [
    ({"factor": "8"}, "rope: factor is '8', expected a positive number"),
    ({"factor": -8.0}, "rope: factor is -8.0, expected a positive number"),
    ({"factor": float("nan")}, "rope: factor is nan, expected a positive number"),
    ({"rope_theta": 0}, "rope: rope_theta is 0, expected a positive number"),
    ({"rope_theta": "large"}, "rope: rope_theta is 'large', expected a positive number"),
    ({"original_max_position_embeddings": 8192.5}, "original_max_position_embeddings is 8192.5, expected a positive"),
    ({"high_freq_factor": 1.0}, "rope: high_freq_factor is 1.0, expected more than low_freq_factor, 1.0"),
    ({"attention_factor": 1.3}, "rope: attention_factor is 1.3, expected no such field with rope type 'llama3'"),
    ({"partial_rotary_factor": 0.5}, "rope: partial_rotary_factor is 0.5, expected no such field"),
    ({"full_attention": {}}, "rope: full_attention is {}, expected no such field"),
  ],
)
def test_fields_of_a_rope(rope, expected):
  assert expected in message("Llama-3.1-8B", rope_scaling=LLAMA3_ROPE | rope)


@pytest.mark.parametrize(
  ("rope", "expected"),
  [
    ({"factor": None}, "rope: factor is None, expected a positive number"),
    ({"factor": 0}, "rope: factor is 0, expected a positive number"),
    ({"original_max_position_embeddings": None}, "rope: original_max_position_embeddings is None, expected a positive"),
    ({"beta_fast": "32"}, "rope: beta_fast is '32', expected a positive number"),
    ({"beta_fast": 1, "beta_slow": 2}, "rope: beta_fast is 1.0, expected at least beta_slow, 2.0"),
    ({"mscale": -1.0}, "rope: mscale is -1.0, expected a positive number"),
    ({"attention_factor": 0}, "rope: attention_factor is 0, expected a positive number"),
    ({"truncate": 0}, "rope: truncate is 0, expected true or false"),
    ({"rope_theta": 1}, "rope: rope_theta is 1, expected another with rope type 'yarn'"),
    ({"low_freq_factor": 1.0}, "rope: low_freq_factor is 1.0, expected no such field with rope type 'yarn'"),
    ({"short_factor": [1.0]}, "rope: short_factor is [1.0], expected no such field with rope type 'yarn'"),
  ],
)
def test_fields_of_yarn(rope, expected):
  yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
  assert message("Qwen2.5-7B", rope_scaling=yarn | rope).startswith(expected)


@pytest.mark.parametrize("field", ["factor", "original_max_position_embeddings"])
def test_missing_field_of_yarn(field):
  yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
  del yarn[field]
  assert message("Qwen2.5-7B", rope_scaling=yarn) == f"rope: {field} is missing, expected with rope type 'yarn'"


@pytest.mark.parametrize(
  ("fields", "expected"),
  [
    ({"rope_scaling": {"type": "longrope", "long_factor": [1.0]}}, "rope type is 'longrope', expected default"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type is 'linear', expected default"),
    ({"partial_rotary_factor": 0.56}, "rope: partial_rotary_factor is 0.56, expected at most 1, and an even number"),
    ({"partial_rotary_factor": 1.5}, "rope: partial_rotary_factor is 1.5, expected at most 1"),
    ({"partial_rotary_factor": 0.001}, "rope: partial_rotary_factor is 0.001, expected at most 1, and an even"),
    ({"rope_parameters": {"partial_rotary_factor": 0}}, "rope: partial_rotary_factor is 0, expected a positive number"),
    ({"resid_pdrop": 0.1}, "resid_pdrop is 0.1, only 0.0 is implemented"),
    ({"attention_bias": True}, "attention_bias is True, which is not implemented for phi3"),
    ({"mlp_bias": True}, "mlp_bias is True, which is not implemented for phi3"),
    ({"rope_scaling": {"rope_type": "default", "factor": 2.0}}, "rope: factor is 2.0, expected no such field"),
  ],
)
def test_fields_of_phi3(fields, expected):
  assert message("phi-4", **fields).startswith(expected)


def test_yarn_of_gemma3_is_truncated():
  """transformers looks for the field in another place than where it stands."""
  yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "truncate": False}
  assert message("gemma-3-1b-it", rope_scaling=yarn).startswith("rope: truncate is false, expected true")


def test_yarn_is_written_with_the_fields_that_others_know():
  """Those of its defaults that vLLM does not read are left out."""
  fields = to_huggingface(from_huggingface(ALL["DeepSeek-R1-0528-Qwen3-8B"], ""))
  assert fields["rope_scaling"] == {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "beta_fast": 32.0, "beta_slow": 1.0,
  }  # fmt: skip


@pytest.mark.parametrize(
  ("name", "field", "value", "expected"),
  [
    ("SmolLM2-135M", "hidden_size", "576", "hidden_size is '576', expected a positive integer"),
    ("SmolLM2-135M", "hidden_size", 576.5, "hidden_size is 576.5, expected a positive integer"),
    ("SmolLM2-135M", "num_hidden_layers", True, "num_hidden_layers is True, expected a positive integer"),
    ("SmolLM2-135M", "num_attention_heads", 0, "num_attention_heads is 0, expected a positive integer"),
    ("SmolLM2-135M", "num_key_value_heads", [3], "num_key_value_heads is [3], expected a positive integer"),
    ("SmolLM2-135M", "num_key_value_heads", 2, "9 query heads do not divide into 2 key/value heads"),
    ("SmolLM2-135M", "hidden_size", 577, "hidden_size 577 does not divide into 9 heads, and there is no head_dim"),
    ("SmolLM2-135M", "hidden_size", 567, "heads have 63 dimensions, expected an even number: pairs"),
    ("SmolLM2-135M", "head_dim", "64", "head_dim is '64', expected a positive integer"),
    ("SmolLM2-135M", "max_position_embeddings", "8k", "max_position_embeddings is '8k', expected a positive integer"),
    ("SmolLM2-135M", "rms_norm_eps", "small", "rms_norm_eps is 'small', expected a positive number"),
    ("SmolLM2-135M", "rms_norm_eps", float("inf"), "rms_norm_eps is inf, expected a positive number"),
    ("SmolLM2-135M", "rope_theta", {}, "rope: rope_theta is {}, expected a positive number"),
    ("SmolLM2-135M", "rope_scaling", "linear", "rope_scaling is 'linear', expected an object"),
    ("SmolLM2-135M", "rope_parameters", [1], "rope_parameters is [1], expected an object"),
    ("SmolLM2-135M", "tie_word_embeddings", "yes", "tie_word_embeddings is 'yes', expected true or false"),
    ("SmolLM2-135M", "attention_bias", 1, "attention_bias is 1, expected true or false"),
    ("SmolLM2-135M", "hidden_act", "relu", "hidden_act is 'relu', expected one of silu, swish, "),
    ("SmolLM2-135M", "hidden_act", "gelu", "hidden_act is 'gelu', expected one of "),
    ("SmolLM2-135M", "hidden_act", ["silu"], "hidden_act is ['silu'], expected one of "),
    ("gemma-2-2b-it", "hidden_activation", "quick_gelu", "hidden_activation is 'quick_gelu', expected one of "),
    ("gemma-2-2b-it", "query_pre_attn_scalar", ..., "query_pre_attn_scalar is None, expected a positive number"),
    ("gemma-2-2b-it", "attn_logit_softcapping", False, "attn_logit_softcapping is False, expected a positive number"),
    ("gemma-2-2b-it", "sliding_window", ..., "layers have sliding_attention but no window, expected sliding_window"),
    ("gemma-2-2b-it", "sliding_window", 4096.0, "sliding_window is 4096.0, expected a positive integer"),
    ("gemma-2-2b-it", "layer_types", ["full_attention"], "layer_types is ['full_attention'], expected a list of 26"),
    ("gemma-2-2b-it", "layer_types", ["chunked_attention"] * 26, "layer_types is ['chunked_attention', "),
    ("gemma-2-2b-it", "layer_types", [["full_attention"]] * 26, "layer_types is [['full_attention'], "),
    ("gemma-2-2b-it", "layer_types", 26, "layer_types is 26, expected a list of 26"),
    ("gemma-3-1b-it", "sliding_window_pattern", 0, "sliding_window_pattern is 0, expected a positive integer"),
    ("gemma-3-1b-it", "rope_local_base_freq", "1e4", "rope of windows: rope_theta is '1e4', expected a"),
    ("gemma-3-1b-it", "rope_parameters", {"rope_theta": 3.0}, "rope: rope_parameters has rope_theta, expected full_"),
    ("gemma-3-1b-it", "rope_parameters", {"full_attention": 3}, "rope: full_attention is 3, expected an object"),
    ("Qwen3-8B", "head_dim", ..., "head_dim is None, expected a positive integer"),
    ("Qwen2.5-7B", "use_sliding_window", "no", "use_sliding_window is 'no', expected true or false"),
    ("qwen2 with windows", "max_window_layers", -1, "max_window_layers is -1, expected an integer, 0 or more"),
    ("SmolLM3-3B", "no_rope_layers", [1] * 35, "no_rope_layers is [1, 1, "),
    ("SmolLM3-3B", "no_rope_layers", [2] * 36, "no_rope_layers is [2, 2, "),
    ("SmolLM3-3B", "no_rope_layers", 4, "no_rope_layers is 4, expected a list of 36, each 0 or 1"),
    ("smollm3 with few fields", "no_rope_layer_interval", 0, "no_rope_layer_interval is 0, expected a positive"),
    ("SmolLM3-3B", "layer_types", ["sliding_attention"] * 36, "layers have sliding_attention but no window"),
    ("Qwen2.5-7B", "layer_types", ["sliding_attention"] * 28, "layers have sliding_attention but no window"),
  ],
)  # fmt: skip
def test_field_of_another_type(name, field, value, expected):
  assert message(name, **{field: value}).startswith(expected)


@pytest.mark.parametrize(
  ("name", "field", "value"),
  [
    ("Qwen3-8B", "num_experts", 128),
    ("Qwen3-8B", "num_experts_per_tok", 8),
    ("Qwen3-8B", "decoder_sparse_step", 1),
    ("Llama-3.1-8B", "num_local_experts", 8),
    ("Llama-3.1-8B", "quantization_config", {"quant_method": "fp8"}),
    ("Llama-3.1-8B", "layer_types", ["full_attention"] * 32),
    ("Llama-3.1-8B", "sliding_window", 4096),
    ("Llama-3.1-8B", "clip_qkv", 8.0),
    ("Qwen2.5-7B", "attention_bias", True),
    ("Qwen2.5-7B", "mlp_bias", True),
    ("Qwen2.5-7B", "use_mrope", True),
    ("SmolLM2-135M", "rope_interleaved", True),
    ("gemma-3-1b-it", "use_bidirectional_attention", True),
    ("gemma-3-1b-it", "vision_config", {"hidden_size": 3}),
  ],
)
def test_setting_that_is_not_implemented(name, field, value):
  said = message(name, **{field: value})
  assert said.startswith(f"{field} is {repr(value)[:80]}, which is not implemented for {ALL[name]['model_type']}")


def test_soft_cap_of_gemma3_is_refused():
  """transformers reads it and computes without it, so either result would be wrong for somebody."""
  for value in (50.0, 0, False):
    assert message("gemma-3-1b-it", attn_logit_softcapping=value).startswith("attn_logit_softcapping is set, expected")
  fields = {key: value for key, value in ALL["gemma-3-1b-it"].items() if key != "attn_logit_softcapping"}
  assert from_huggingface(fields, "") == from_huggingface(ALL["gemma-3-1b-it"], "")
  assert from_huggingface(fields, "").attention_softcap is None


@pytest.mark.parametrize(
  ("field", "value"), [("pretraining_tp", 2), ("partial_rotary_factor", 0.5), ("embd_pdrop", 0.1), ("resid_pdrop", 0.1)]
)
def test_setting_that_is_implemented_for_one_value(field, value):
  only = {"pretraining_tp": "1", "partial_rotary_factor": "1.0"}.get(field, "0.0")
  assert message("SmolLM2-135M", **{field: value}) == f"{field} is {value}, only {only} is implemented"


@pytest.mark.parametrize(
  ("name", "mistyped", "field", "value"),
  [
    ("SmolLM2-135M", "num_hidden_layer", "num_hidden_layers", 30),
    ("SmolLM2-135M", "rope_tetha", "rope_theta", 1e5),
    ("SmolLM2-135M", "rms_norm_epsilon", "rms_norm_eps", 1e-5),
    ("SmolLM2-135M", "tie_word_embedding", "tie_word_embeddings", True),
    ("gemma-2-2b-it", "tie_word_embedding", "tie_word_embeddings", False),  # off, but on by default
    ("gemma-2-2b-it", "attn_logit_softcaping", "attn_logit_softcapping", ...),
    ("gemma-3-1b-it", "rope_local_base_frequency", "rope_local_base_freq", 3.0),
    ("Qwen2.5-7B", "use_slidingwindow", "use_sliding_window", True),
  ],
)
def test_mistyped_field(name, mistyped, field, value):
  said = message(name, **{field: None, mistyped: value})
  assert said == f"{mistyped} is not a field of {ALL[name]['model_type']}; was {field} meant?"


@pytest.mark.parametrize("name", OFFICIAL)
def test_fields_that_change_nothing(name):
  """What other programs write, and what is switched off."""
  more = {
    "unsloth_fixed": True, "_name_or_path": "x", "auto_map": {"AutoModel": "modeling.X"}, "dtype": "float32",
    "do_sample": True, "temperature": 0.6, "partial_rotary_factor": 1.0, "use_qk_norm": False, "num_experts": None,
    "mlp_only_layers": [], "quantization_config": None, "transformers.js_config": {"a": 1},
    "_attn_implementation": "flash_attention_2", "_flash_attn_2_enabled": True, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
    "pad_token": "<pad>", "model_max_length": 4096, "use_bfloat16": True, "gradient_checkpointing": True,
    "diversity_penalty": 0.0, "num_return_sequences": 1, "no_repeat_ngram_size": 0, "pruned_heads": {},
  }  # fmt: skip
  assert from_huggingface(ALL[name] | more, name) == from_huggingface(ALL[name], name)
