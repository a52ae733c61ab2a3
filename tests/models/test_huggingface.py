"""Model directories: how tensors are laid out, and what is said about a directory that cannot be loaded."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from rlpr_jax import models
from rlpr_jax.errors import InputError

CONFIG = {
  "model_type": "llama",
  "vocab_size": 11,
  "hidden_size": 8,
  "intermediate_size": 12,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 6,
  "rms_norm_eps": 1e-5,
  "rope_theta": 5000.0,
  "hidden_act": "silu",
}
LAYER = {
  "input_layernorm.weight": (8,),
  "self_attn.q_proj.weight": (24, 8),
  "self_attn.k_proj.weight": (12, 8),
  "self_attn.v_proj.weight": (12, 8),
  "self_attn.o_proj.weight": (8, 24),
  "post_attention_layernorm.weight": (8,),
  "mlp.gate_proj.weight": (12, 8),
  "mlp.up_proj.weight": (12, 8),
  "mlp.down_proj.weight": (8, 12),
}
SHAPES = {
  "model.embed_tokens.weight": (11, 8),
  "model.norm.weight": (8,),
  "lm_head.weight": (11, 8),
  **{f"model.layers.{layer}.{name}": shape for layer in range(2) for name, shape in LAYER.items()},
}


@pytest.fixture
def tensors():
  rng = np.random.default_rng(0)
  return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


@pytest.fixture
def directory(tmp_path, tensors):
  (tmp_path / "config.json").write_text(json.dumps(CONFIG))
  save_file(tensors, tmp_path / "model.safetensors")
  return tmp_path


def change_config(directory, **fields):
  """Sets fields; those that are None are taken out."""
  changed = {name: value for name, value in (CONFIG | fields).items() if value is not None}
  (directory / "config.json").write_text(json.dumps(changed))


def shard(directory, tensors):
  """Two files and their index, in the place of one file."""
  (directory / "model.safetensors").unlink()
  weight_map = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(tensors)}
  for file in ("part-0.safetensors", "part-1.safetensors"):
    save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, directory / file)
  (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
  return weight_map


def error(directory):
  """The one line that is said about a directory."""
  with pytest.raises(InputError) as caught:
    models.load_pretrained(str(directory))
  message = str(caught.value)
  assert "\n" not in message
  return message


# --- what can be loaded ---


def test_config(directory):
  config, _ = models.load_pretrained(str(directory))
  assert config == models.ModelConfig(
    vocab_size=11, embed_dim=8, mlp_dim=12, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, rope_theta=5000.0,
    norm_eps=1e-5, tie_embeddings=False, qkv_bias=False, qk_norm=False, compute_dtype="float32",
  )  # fmt: skip


@pytest.mark.parametrize(
  ("fields", "expected"),
  [
    ({"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 700.0}}, {"rope_theta": 700.0}),
    ({"rope_theta": None}, {"rope_theta": 10_000.0}),
    ({"rope_scaling": {"rope_type": "default"}}, {"rope_theta": 5000.0}),
    ({"rms_norm_eps": None}, {"norm_eps": 1e-6}),
    ({"hidden_act": None}, {}),
    ({"mlp_bias": False, "attention_bias": False, "pretraining_tp": 1}, {}),
    ({"tie_word_embeddings": True}, {"tie_embeddings": True}),
  ],
)
def test_config_with_fields_written_otherwise(directory, fields, expected):
  change_config(directory, **fields)
  config, _ = models.load_pretrained(str(directory))
  assert {name: getattr(config, name) for name in expected} == expected


def test_heads_by_default(tmp_path, tensors):
  """One key/value head a query head, of embed_dim / heads."""
  change_config(tmp_path, num_key_value_heads=None, head_dim=None)
  for name in tensors:
    if "_proj.weight" in name and "self_attn" in name:
      tensors[name] = np.ones((8, 8), np.float32)
  save_file(tensors, tmp_path / "model.safetensors")
  config, params = models.load_pretrained(str(tmp_path))
  assert (config.num_kv_heads, config.head_dim) == (4, 2)
  assert params["layers"]["key"].shape == (2, 8, 4, 2)


def test_layout_of_every_tensor(directory, tensors):
  """Heads are split off the output of theirs, which stands first: element by element."""
  _, params = models.load_pretrained(str(directory))
  np.testing.assert_array_equal(params["embedding"], tensors["model.embed_tokens.weight"])
  np.testing.assert_array_equal(params["head"], tensors["lm_head.weight"])
  np.testing.assert_array_equal(params["final_norm"]["scale"], tensors["model.norm.weight"])
  for i in range(2):
    ours = jax.tree.map(lambda x, i=i: np.asarray(x[i]), params["layers"])
    theirs = {name: tensors[f"model.layers.{i}.{name}"] for name in LAYER}
    np.testing.assert_array_equal(ours["attention_norm"]["scale"], theirs["input_layernorm.weight"])
    np.testing.assert_array_equal(ours["mlp_norm"]["scale"], theirs["post_attention_layernorm.weight"])
    for name in ("gate", "up", "down"):
      np.testing.assert_array_equal(ours[name], theirs[f"mlp.{name}_proj.weight"].T)
    for name, heads in (("query", 4), ("key", 2), ("value", 2)):
      for d, n, h in np.ndindex(8, heads, 6):
        assert ours[name][d, n, h] == theirs[f"self_attn.{name[0]}_proj.weight"][n * 6 + h, d]
    for n, h, d in np.ndindex(4, 6, 8):
      assert ours["out"][n, h, d] == theirs["self_attn.o_proj.weight"][d, n * 6 + h]


def test_shards(directory, tensors):
  _, expected = models.load_pretrained(str(directory))
  shard(directory, tensors)
  jax.tree.map(np.testing.assert_array_equal, models.load_pretrained(str(directory))[1], expected)


def test_tied_head_is_not_read(directory, tensors):
  del tensors["lm_head.weight"]
  save_file(tensors, directory / "model.safetensors")
  change_config(directory, tie_word_embeddings=True)
  assert "head" not in models.load_pretrained(str(directory))[1]


def test_bfloat16_files_load_as_float32(directory, tensors):
  half = {name: tensor.astype(jnp.bfloat16) for name, tensor in tensors.items()}
  save_file(half, directory / "model.safetensors")
  _, params = models.load_pretrained(str(directory))
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
  np.testing.assert_array_equal(params["embedding"], half["model.embed_tokens.weight"].astype(np.float32))


# --- what cannot ---


def test_no_directory_and_no_config(tmp_path):
  missing = tmp_path / "nowhere"
  assert error(missing) == f"{missing}/config.json: missing, expected a Hugging Face model directory"
  assert error(tmp_path).startswith(f"{tmp_path}/config.json: missing")


@pytest.mark.parametrize("text", ["", "{", '{"model_type": llama}', "\x00\n\x01", "[1]", "null", '"llama"'])
def test_config_that_is_not_an_object(directory, text):
  (directory / "config.json").write_text(text)
  assert error(directory).startswith(f"{directory}/config.json: ")


def test_config_that_is_not_text(directory):
  (directory / "config.json").write_bytes(b"\xff\xfe\xfa")
  assert error(directory).startswith(f"{directory}/config.json: cannot be read as JSON")


@pytest.mark.parametrize(
  ("fields", "expected"),
  [
    ({"model_type": "gpt2"}, "model_type is 'gpt2', expected 'llama' or 'qwen2'"),
    ({"model_type": "qwen3"}, "model_type is 'qwen3'"),
    ({"model_type": None}, "model_type is None"),
    ({"vocab_size": None}, "vocab_size is None, expected a positive integer"),
    ({"hidden_size": None}, "hidden_size is None"),
    ({"intermediate_size": None}, "intermediate_size is None"),
    ({"num_hidden_layers": None}, "num_hidden_layers is None"),
    ({"num_attention_heads": None}, "num_attention_heads is None"),
    ({"hidden_size": "8"}, "hidden_size is '8', expected a positive integer"),
    ({"hidden_size": 8.5}, "hidden_size is 8.5"),
    ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    ({"hidden_size": 3, "head_dim": None}, "head_dim is 0"),
    ({"num_key_value_heads": "two"}, "num_key_value_heads is 'two'"),
    ({"head_dim": "6"}, "head_dim is '6'"),
    ({"num_key_value_heads": 3}, "4 query heads do not divide into 3 key/value heads"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
    ({"rope_theta": "large"}, "rope_theta is 'large', expected a positive number"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "rope_theta is 0"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu', only 'silu' is implemented"),
    ({"hidden_act": "gelu_pytorch_tanh"}, "hidden_act is 'gelu_pytorch_tanh'"),
    ({"attention_bias": True}, "attention_bias is true"),
    ({"mlp_bias": True}, "mlp_bias is True"),
    ({"pretraining_tp": 2}, "pretraining_tp is 2"),
    ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window is True"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope type is 'llama3', only 'default' is implemented"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type is 'linear'"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope type is 'yarn'"),
  ],
)
def test_config_that_is_not_understood(directory, fields, expected):
  change_config(directory, **fields)
  message = error(directory)
  assert message.startswith(f"{directory}/config.json: ")
  assert expected in message


def test_no_weights(directory):
  (directory / "model.safetensors").unlink()
  (directory / "pytorch_model.bin").touch()
  assert error(directory).startswith(f"{directory}: no weights, expected model.safetensors or")


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_missing_tensor(directory, tensors, name):
  del tensors[name]
  save_file(tensors, directory / "model.safetensors")
  assert error(directory) == f"{directory}: tensor {name} is missing, expected shape {list(SHAPES[name])}"


def test_missing_layer(directory):
  change_config(directory, num_hidden_layers=3)
  assert f"{directory}: tensor model.layers.2." in error(directory)


def test_missing_bias(directory):
  change_config(directory, model_type="qwen2")
  assert "tensor model.layers.0.self_attn.k_proj.bias is missing, expected shape [12]" in error(directory)


@pytest.mark.parametrize(
  ("name", "shape"),
  [
    ("model.embed_tokens.weight", (12, 8)),
    ("model.norm.weight", (8, 1)),
    ("model.layers.0.self_attn.q_proj.weight", (8, 24)),  # the other way round
    ("model.layers.1.self_attn.o_proj.weight", (24, 8)),
    ("model.layers.1.mlp.down_proj.weight", (96,)),
    ("model.layers.0.self_attn.k_proj.weight", (24, 8)),
  ],
)
def test_mis_shaped_tensor(directory, tensors, name, shape):
  tensors[name] = np.ones(shape, np.float32)
  save_file(tensors, directory / "model.safetensors")
  file = directory / "model.safetensors"
  assert error(directory) == f"{file}: tensor {name} has shape {list(shape)}, expected {list(SHAPES[name])}"


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.99])
def test_truncated_file(directory, share):
  file = directory / "model.safetensors"
  content = file.read_bytes()
  file.write_bytes(content[: int(share * len(content))])
  assert error(directory).startswith(f"{file}: not a complete safetensors file (")


def test_file_of_something_else(directory):
  file = directory / "model.safetensors"
  file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 538090408\n")
  assert error(directory).startswith(f"{file}: not a complete safetensors file (")


def test_truncated_shard(directory, tensors):
  shard(directory, tensors)
  file = directory / "part-1.safetensors"
  file.write_bytes(file.read_bytes()[:-40])
  assert error(directory).startswith(f"{file}: ")


def test_index_that_names_a_missing_shard(directory, tensors):
  shard(directory, tensors)
  (directory / "part-1.safetensors").unlink()
  index = directory / "model.safetensors.index.json"
  assert error(directory) == f"{index}: names part-1.safetensors, which is missing"


def test_index_that_names_the_wrong_shard(directory, tensors):
  weight_map = shard(directory, tensors)
  name = "model.norm.weight"
  weight_map[name] = {"part-0.safetensors": "part-1.safetensors"}.get(weight_map[name], "part-0.safetensors")
  (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
  message = error(directory)
  assert message.startswith(f"{directory / weight_map[name]}: ")
  assert name in message


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"model.norm.weight": 3}}'])
def test_index_that_is_none(directory, text):
  index = directory / "model.safetensors.index.json"
  index.write_text(text)
  assert error(directory).startswith(f"{index}: ")
