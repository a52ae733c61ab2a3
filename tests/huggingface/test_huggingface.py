"""Model directories: how tensors are laid out, and what is said about a directory that cannot be loaded."""

import json
import pathlib

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from rlpr_jax import huggingface, models
from rlpr_jax.errors import InputError
from rlpr_jax.huggingface import loading

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
    huggingface.load_pretrained(str(directory))
  message = str(caught.value)
  assert "\n" not in message
  return message


# --- what can be loaded ---


def test_config(directory):
  config, _ = huggingface.load_pretrained(str(directory))
  assert config == models.ModelConfig(
    vocab_size=11, embed_dim=8, mlp_dim=12, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6,
    rope=models.Rope(theta=5000.0), norm_eps=1e-5,
  )  # fmt: skip


def test_heads_by_default(tmp_path, tensors):
  """One key/value head a query head, of embed_dim / heads."""
  change_config(tmp_path, num_key_value_heads=None, head_dim=None)
  for name in tensors:
    if "_proj.weight" in name and "self_attn" in name:
      tensors[name] = np.ones((8, 8), np.float32)
  save_file(tensors, tmp_path / "model.safetensors")
  config, params = huggingface.load_pretrained(str(tmp_path))
  assert (config.num_kv_heads, config.head_dim) == (4, 2)
  assert params["layers"]["key"]["weight"].shape == (2, 8, 4, 2)


def check_layout(params, tensors):
  """Heads are split off the output of theirs, which stands first: element by element."""
  np.testing.assert_array_equal(params["embedding"], tensors["model.embed_tokens.weight"])
  np.testing.assert_array_equal(params["head"], tensors["lm_head.weight"])
  np.testing.assert_array_equal(params["final_norm"]["scale"], tensors["model.norm.weight"])
  for i in range(2):
    ours = jax.tree.map(lambda x, i=i: np.asarray(x[i]), params["layers"])
    theirs = {name: tensors[f"model.layers.{i}.{name}"] for name in LAYER}
    np.testing.assert_array_equal(ours["attention_norm"]["scale"], theirs["input_layernorm.weight"])
    np.testing.assert_array_equal(ours["mlp_norm"]["scale"], theirs["post_attention_layernorm.weight"])
    for name in ("gate", "up", "down"):
      np.testing.assert_array_equal(ours[name]["weight"], theirs[f"mlp.{name}_proj.weight"].T)
    for name, heads in (("query", 4), ("key", 2), ("value", 2)):
      for d, n, h in np.ndindex(8, heads, 6):
        assert ours[name]["weight"][d, n, h] == theirs[f"self_attn.{name[0]}_proj.weight"][n * 6 + h, d]
    for n, h, d in np.ndindex(4, 6, 8):
      assert ours["out"]["weight"][n, h, d] == theirs["self_attn.o_proj.weight"][d, n * 6 + h]


def test_layout_of_every_tensor(directory, tensors):
  check_layout(huggingface.load_pretrained(str(directory))[1], tensors)


def test_layout_of_biases(directory, tensors):
  """Flat in the file, by heads here."""
  change_config(directory, attention_bias=True, mlp_bias=True)
  sizes = {"self_attn.q_proj": 24, "self_attn.k_proj": 12, "self_attn.v_proj": 12, "self_attn.o_proj": 8}
  sizes |= {"mlp.gate_proj": 12, "mlp.up_proj": 12, "mlp.down_proj": 8}
  rng = np.random.default_rng(1)
  for layer in range(2):
    for name, size in sizes.items():
      tensors[f"model.layers.{layer}.{name}.bias"] = rng.normal(size=size).astype(np.float32)
  save_file(tensors, directory / "model.safetensors")
  _, params = huggingface.load_pretrained(str(directory))
  check_layout(params, tensors)
  shapes = {"query": (4, 6), "key": (2, 6), "value": (2, 6), "out": (8,), "gate": (12,), "up": (12,), "down": (8,)}
  for (ours, shape), theirs in zip(shapes.items(), sizes, strict=True):
    found = params["layers"][ours]["bias"]
    assert found.shape == (2, *shape)
    for layer in range(2):
      np.testing.assert_array_equal(np.ravel(found[layer]), tensors[f"model.layers.{layer}.{theirs}.bias"])


@pytest.fixture
def fused(directory, tensors):
  """The same weights as a Phi-3 has them."""
  change_config(directory, model_type="phi3")
  for layer in range(2):
    for name, parts in (("self_attn.qkv", "qkv"), ("mlp.gate_up", ("gate_", "up_"))):
      names = [f"model.layers.{layer}.{name.split('.')[0]}.{part.removesuffix('_')}_proj.weight" for part in parts]
      tensors[f"model.layers.{layer}.{name}_proj.weight"] = np.concatenate([tensors.pop(part) for part in names])
  save_file(tensors, directory / "model.safetensors")
  return tensors


def test_layout_of_fused_tensors(directory, fused):
  """One below the other in the file: query, key, value; gate, up."""
  _, params = huggingface.load_pretrained(str(directory))
  again = dict(fused)
  for layer in range(2):
    qkv, mlp = (again[f"model.layers.{layer}.{name}_proj.weight"] for name in ("self_attn.qkv", "mlp.gate_up"))
    for name, rows in (("q", slice(0, 24)), ("k", slice(24, 36)), ("v", slice(36, 48))):
      again[f"model.layers.{layer}.self_attn.{name}_proj.weight"] = qkv[rows]
    again |= {
      f"model.layers.{layer}.mlp.gate_proj.weight": mlp[:12],
      f"model.layers.{layer}.mlp.up_proj.weight": mlp[12:],
    }
  check_layout(params, again)


def test_slices_of_fused_tensors(directory, fused):
  """What one device of several reads of the keys."""
  name = "model.layers.1.self_attn.qkv_proj.weight"
  with loading._open_file(directory / "model.safetensors") as reader:
    keys = loading._Tensor(directory, name, reader, rows=(24, 36))
    np.testing.assert_array_equal(loading._read(keys, (slice(6, 12), slice(0, 3))), fused[name][30:36, :3])
    np.testing.assert_array_equal(loading._read(keys, (slice(None), slice(None))), fused[name][24:36])


def test_mis_shaped_fused_tensor(directory, fused):
  name = "model.layers.1.mlp.gate_up_proj.weight"
  fused[name] = fused[name][:12]
  save_file(fused, directory / "model.safetensors")
  file = directory / "model.safetensors"
  assert error(directory) == f"{file}: tensor {name} has shape [12, 8], expected [24, 8]"


def test_shards(directory, tensors):
  _, expected = huggingface.load_pretrained(str(directory))
  shard(directory, tensors)
  jax.tree.map(np.testing.assert_array_equal, huggingface.load_pretrained(str(directory))[1], expected)


def test_tied_head_is_not_read(directory, tensors):
  del tensors["lm_head.weight"]
  save_file(tensors, directory / "model.safetensors")
  change_config(directory, tie_word_embeddings=True)
  assert "head" not in huggingface.load_pretrained(str(directory))[1]


def test_bfloat16_files_load_as_float32(directory, tensors):
  half = {name: tensor.astype(jnp.bfloat16) for name, tensor in tensors.items()}
  save_file(half, directory / "model.safetensors")
  _, params = huggingface.load_pretrained(str(directory))
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
  check_layout(params, {name: tensor.astype(np.float32) for name, tensor in half.items()})


@pytest.mark.parametrize("stored", [np.float16, np.float32])
def test_files_load_as_bfloat16(directory, tensors, stored):
  stored = {name: tensor.astype(stored) for name, tensor in tensors.items()}
  save_file(stored, directory / "model.safetensors")
  _, params = huggingface.load_pretrained(str(directory), dtype=jnp.bfloat16)
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
  check_layout(params, {name: tensor.astype(jnp.bfloat16) for name, tensor in stored.items()})


BUFFERS = ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "rotary_emb.inv_freq"]


@pytest.mark.parametrize("name", BUFFERS)
def test_frequencies_in_the_file_are_left_out(directory, tensors, name, capsys):
  save_file(tensors | {name: np.ones(3, np.float32)}, directory / "model.safetensors")
  check_layout(huggingface.load_pretrained(str(directory))[1], tensors)
  said = "tensors left out, which the model does not compute with: 1 rotary buffers"
  assert capsys.readouterr().out == f"{directory}: {said}\n"


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("listed", [True, False])
def test_frequencies_in_the_index_or_beside_it(directory, tensors, held, listed):
  """Older files hold them and do not list them, or the other way round."""
  buffers = {name: np.ones(3, np.float32) for name in BUFFERS}
  weight_map = shard(directory, tensors | buffers)
  if not held:
    for file in ("part-0.safetensors", "part-1.safetensors"):
      save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, directory / file)
  if not listed:
    weight_map = {name: weight_map[name] for name in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
  check_layout(huggingface.load_pretrained(str(directory))[1], tensors)


@pytest.mark.parametrize("sharded", [False, True])
def test_heads_of_other_models_are_left_out(directory, tensors, sharded, capsys):
  more = {"score.weight": np.ones((2, 8), np.float32), "v_head.summary.bias": np.ones(1, np.float32)}
  more[BUFFERS[0]] = np.ones(3, np.float32)
  save_file(tensors | more, directory / "model.safetensors")
  if sharded:
    shard(directory, tensors | more)
  check_layout(huggingface.load_pretrained(str(directory))[1], tensors)
  (line,) = capsys.readouterr().out.splitlines()
  assert line.startswith(f"{directory}: tensors left out, which the model does not compute with: ")
  assert {"2 of another head", "1 rotary buffers"} == set(line.split("with: ")[1].split(", "))


def test_nothing_is_said_where_nothing_is_left_out(directory, capsys):
  huggingface.load_pretrained(str(directory))
  assert capsys.readouterr().out == ""


@pytest.mark.parametrize("sharded", [False, True])
def test_names_of_a_base_model(directory, tensors, sharded):
  """Saved without its head, it does not begin its names with `model.`; transformers takes both."""
  head = {"lm_head.weight": tensors["lm_head.weight"]}
  base = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name not in head}
  save_file(base | head, directory / "model.safetensors")
  if sharded:
    shard(directory, base | head)
  check_layout(huggingface.load_pretrained(str(directory))[1], tensors)


def test_base_model_with_a_tied_head(directory, tensors):
  del tensors["lm_head.weight"]
  save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, directory / "model.safetensors")
  change_config(directory, tie_word_embeddings=True)
  _, params = huggingface.load_pretrained(str(directory))
  np.testing.assert_array_equal(params["embedding"], tensors["model.embed_tokens.weight"])


def test_base_model_without_a_head(directory, tensors):
  del tensors["lm_head.weight"]
  save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, directory / "model.safetensors")
  assert error(directory) == f"{directory}: tensor lm_head.weight is missing, expected shape [11, 8]"


def test_tensor_under_two_names(directory, tensors):
  file = directory / "model.safetensors"
  save_file(tensors | {"norm.weight": np.ones(8, np.float32)}, file)
  assert error(directory) == f"{file}: has tensors model.norm.weight and norm.weight, expected one of them"


def test_a_tensor_has_its_own_name_in_an_error(directory, tensors):
  tensors["norm.weight"] = np.ones(9, np.float32)
  del tensors["model.norm.weight"]
  save_file(tensors, directory / "model.safetensors")
  assert error(directory) == f"{directory}/model.safetensors: tensor norm.weight has shape [9], expected [8]"


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_tied_head_in_the_file_is_the_embedding_once_more(directory, tensors, stored, monkeypatch):
  """In whatever dtype, and in however many slices they are compared."""
  monkeypatch.setattr(loading, "_COMPARED", 3 * 4 * 8)  # three rows
  change_config(directory, tie_word_embeddings=True)
  embedding = tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].astype(jnp.bfloat16)
  tensors["lm_head.weight"] = embedding.astype(jnp.dtype(stored))
  save_file(tensors, directory / "model.safetensors")
  config, params = huggingface.load_pretrained(str(directory))
  assert config.tie_embeddings
  assert "head" not in params


@pytest.mark.parametrize("place", [(0, 0), (5, 3), (10, 7)])
@pytest.mark.parametrize("value", [np.nan, 1.5])
def test_tied_head_that_is_another(directory, tensors, place, value, monkeypatch):
  """transformers would compute with it, and we would not."""
  monkeypatch.setattr(loading, "_COMPARED", 3 * 4 * 8)
  change_config(directory, tie_word_embeddings=True)
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
  tensors["lm_head.weight"][place] = value
  file = directory / "model.safetensors"
  save_file(tensors, file)
  said = "expected the same numbers where config.json has tie_word_embeddings true"
  assert error(directory) == f"{file}: tensor lm_head.weight differs from model.embed_tokens.weight, {said}"
  change_config(directory)
  check_layout(huggingface.load_pretrained(str(directory))[1], tensors)  # untied, as it says


def test_tied_head_of_another_shape(directory, tensors):
  change_config(directory, tie_word_embeddings=True)
  tensors["lm_head.weight"] = np.concatenate([tensors["model.embed_tokens.weight"]] * 2)
  save_file(tensors, directory / "model.safetensors")
  assert "tensor lm_head.weight differs from model.embed_tokens.weight, expected" in error(directory)


def test_one_file_goes_before_an_index(directory, tensors):
  """As in transformers."""
  (directory / "model.safetensors.index.json").write_text("{}")
  check_layout(huggingface.load_pretrained(str(directory))[1], tensors)


# --- the hub ---


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """Makes a repository in a cache of huggingface_hub, which may not go on the net; returns its snapshot."""
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

  def make(name, commit, ref):
    repo = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir(exist_ok=True)
    (repo / "refs" / ref).write_text(commit)
    return snapshot

  return make


def test_hub_id(cache, tensors):
  main, old = cache("some-org/tiny_model.1", "a" * 40, "main"), cache("some-org/tiny_model.1", "b" * 40, "v0")
  for snapshot, factor in ((main, 1), (old, 2)):
    (snapshot / "config.json").write_text(json.dumps(CONFIG))
    save_file({name: factor * tensor for name, tensor in tensors.items()}, snapshot / "model.safetensors")
  assert huggingface.resolve("some-org/tiny_model.1") == main
  assert huggingface.resolve("some-org/tiny_model.1@v0") == old
  assert huggingface.resolve("some-org/tiny_model.1@" + "b" * 40) == old
  check_layout(huggingface.load_pretrained("some-org/tiny_model.1")[1], tensors)
  _, params = huggingface.load_pretrained("some-org/tiny_model.1@v0")
  check_layout(params, {name: 2 * tensor for name, tensor in tensors.items()})


def test_directory_goes_before_the_hub(cache, directory, monkeypatch):
  cache("org/name", "a" * 40, "main")
  (directory / "org" / "name").mkdir(parents=True)
  monkeypatch.chdir(directory)
  assert huggingface.resolve("org/name") == pathlib.Path("org/name")
  assert huggingface.resolve(directory) == directory


def test_what_is_fetched(monkeypatch, tmp_path):
  """Neither pickled weights nor code, nor weights in other formats."""
  asked = {}
  monkeypatch.setattr(
    huggingface_hub, "snapshot_download", lambda name, **settings: asked.update(settings) or str(tmp_path)
  )
  huggingface.resolve("org/name")
  files = [
    "config.json", "generation_config.json", "model.safetensors", "model-00001-of-00002.safetensors",
    "model.safetensors.index.json", "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt",
    "chat_template.jinja",
  ]  # fmt: skip
  others = [
    "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "modeling_llama.py", "original/consolidated.00.pth",
    "original/params.json", "consolidated.safetensors", "onnx/model.safetensors", "training_args.bin", "model.gguf",
    "tokenizer.py", "tokenization.py", "README.md",
  ]  # fmt: skip
  found = huggingface_hub.utils.filter_repo_objects(
    files + others, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
  )
  assert list(found) == files


@pytest.mark.parametrize("name", ["org/missing", "org/name@v9"])
def test_hub_id_that_cannot_be_had(cache, name):
  cache("org/name", "a" * 40, "main")
  assert error(name).startswith(f"{name}: no such directory, and not on the Hugging Face hub either: ")


def test_error_of_the_hub_is_one_line(monkeypatch):
  def fail(*args, **settings):
    raise RuntimeError("no\n\n  connection")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
  assert error("org/name").endswith("hub either: no connection")


@pytest.mark.parametrize(
  "name", ["", "gpt2", "a/b/c", "/nowhere/x", "../org", "org/name@", "https://hub/x", "org/na me"]
)
def test_neither_a_directory_nor_a_hub_id(name, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **settings: pytest.fail("asked the hub"))
  assert error(name) == f"{name}: no such directory, expected one or org/name of the Hugging Face hub"


# --- what cannot ---


def test_no_directory_and_no_config(tmp_path):
  missing = tmp_path / "nowhere"
  assert error(missing) == f"{missing}: no such directory, expected one or org/name of the Hugging Face hub"
  assert error(tmp_path) == f"{tmp_path}/config.json: missing, expected a Hugging Face model directory"


@pytest.mark.parametrize("text", ["", "{", '{"model_type": llama}', "\x00\n\x01", "[1]", "null", '"llama"'])
def test_config_that_is_not_an_object(directory, text):
  (directory / "config.json").write_text(text)
  assert error(directory).startswith(f"{directory}/config.json: ")


def test_config_that_is_not_text(directory):
  (directory / "config.json").write_bytes(b"\xff\xfe\xfa")
  assert error(directory).startswith(f"{directory}/config.json: cannot be read as JSON")


def test_config_that_is_not_understood(directory):
  """What is said about its fields is tested in test_config_json.py."""
  change_config(directory, hidden_act="relu")
  assert error(directory).startswith(f"{directory}/config.json: hidden_act is 'relu', expected one of ")


def test_config_that_says_a_field_twice(directory):
  (directory / "config.json").write_text(json.dumps(CONFIG)[:-1] + ', "rope_theta": 7.0}')
  assert error(directory) == f"{directory}/config.json: rope_theta stands there twice, expected it once"


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
def test_index_that_is_none(directory, tensors, text):
  shard(directory, tensors)
  index = directory / "model.safetensors.index.json"
  index.write_text(text)
  assert error(directory).startswith(f"{index}: ")


def test_index_that_names_a_tensor_twice(directory, tensors):
  weight_map = shard(directory, tensors)
  index = directory / "model.safetensors.index.json"
  text = json.dumps({"weight_map": weight_map})
  index.write_text(text[:-2] + ', "model.norm.weight": "part-0.safetensors"}}')
  assert error(directory) == f"{index}: model.norm.weight stands there twice, expected it once"


@pytest.mark.parametrize("name", ["../part-1.safetensors", "/part-1.safetensors", "sub/part-1.safetensors", "..", ""])
def test_index_that_names_a_file_elsewhere(directory, tensors, name):
  weight_map = shard(directory, tensors)
  (directory / "sub").mkdir()
  for place in (directory.parent, directory / "sub"):
    (place / "part-1.safetensors").write_bytes((directory / "part-1.safetensors").read_bytes())
  weight_map = {tensor: name if file == "part-1.safetensors" else file for tensor, file in weight_map.items()}
  index = directory / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": weight_map}))
  assert error(directory) == f"{index}: names {name!r}, expected the name of a file beside it"


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.self_attn.q_norm.weight"])
def test_index_that_leaves_out_a_tensor(directory, tensors, name):
  """Of the model or not."""
  tensors.setdefault(name, np.ones(6, np.float32))
  weight_map = shard(directory, tensors)
  file = directory / weight_map.pop(name)
  (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
  assert error(directory) == f"{file}: tensor {name} is not in model.safetensors.index.json, expected it there"


# --- what would be another model ---


@pytest.mark.parametrize(
  ("name", "shape"),
  [
    ("model.layers.0.self_attn.q_norm.weight", (6,)),
    ("model.layers.1.self_attn.k_proj.bias", (12,)),
    ("model.layers.2.input_layernorm.weight", (8,)),
    ("model.layers.0.mlp.experts.0.up_proj.weight", (12, 8)),
    ("model.layers.0.self_attn.q_proj.lora_A.weight", (2, 8)),
    ("model.layers.0.mlp.up_proj.weight_scale", (12,)),
  ],
)
@pytest.mark.parametrize("sharded", [False, True])
def test_tensor_that_the_config_does_not_account_for(directory, tensors, name, shape, sharded):
  tensors[name] = np.ones(shape, np.float32)
  save_file(tensors, directory / "model.safetensors")
  file = directory / "model.safetensors"
  if sharded:
    file = directory / shard(directory, tensors)[name]
  assert error(directory) == f"{file}: tensor {name} is not one of the model in config.json, expected no such tensor"


@pytest.mark.parametrize(
  "dtype", [np.int8, np.uint8, np.int32, np.float64, np.bool_, jnp.float8_e4m3fn, jnp.float8_e5m2]
)
def test_tensor_of_another_dtype(directory, tensors, dtype):
  name = "model.layers.1.mlp.gate_proj.weight"
  tensors[name] = tensors[name].astype(dtype)
  save_file(tensors, directory / "model.safetensors")
  message = error(directory)
  assert message.startswith(f"{directory / 'model.safetensors'}: tensor {name} is ")
  assert message.endswith(", expected one of BF16, F16, F32")
