"""Directories that we write: the tensors that transformers writes, read by transformers and PEFT; whole or absent."""

import dataclasses
import functools
import gc
import json
import os
import pathlib
import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import transformers

from rlpr_jax import huggingface, models
from rlpr_jax.data import builtin
from rlpr_jax.errors import InputError
from rlpr_jax.huggingface import saving
from tests.models import cases

TOKENS = cases.random_tokens(2, cases.LENGTH)


def load_torch(directory):
  torch = cases.import_torch()
  return transformers.AutoModelForCausalLM.from_pretrained(
    directory, attn_implementation="eager", dtype=torch.float32
  ).eval()


def our_logits(config, params):
  return cases.whole_logits(models.definition(config), params, TOKENS)


def read_tensors(directory):
  """All tensors of a directory by name, from one file or several."""
  tensors = {}
  for file in sorted(directory.glob("*.safetensors")):
    tensors |= safetensors.numpy.load_file(file)
  return tensors


def check_equal(one, other):
  """Bit by bit, dtypes and keys too."""
  assert jax.tree.map(lambda x: (x.shape, x.dtype), one) == jax.tree.map(lambda x: (x.shape, x.dtype), other)
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), one, other)


@functools.cache
def small(lora=None):
  """A config and parameters with nothing special, and with adapters if asked for."""
  config = dataclasses.replace(cases.config("llama"), lora=lora)
  return config, jax.tree.map(jnp.asarray, cases.random_params(config))


# --- what is written ---


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", cases.CASES)
def test_tensors_are_those_that_transformers_wrote(name, dtype, tmp_path):
  """Loaded and written again, bit by bit, under the same names; and loaded once more."""
  torch = cases.import_torch()
  theirs = cases.randomise(transformers.AutoConfig.for_model(**cases.CASES[name])).to(getattr(torch, dtype))
  theirs.save_pretrained(tmp_path / "theirs")
  config, params = huggingface.load_pretrained(tmp_path / "theirs", dtype=jnp.dtype(dtype))
  huggingface.save_pretrained(tmp_path / "ours", config, params)
  found, expected = read_tensors(tmp_path / "ours"), read_tensors(tmp_path / "theirs")
  assert {x.dtype for x in found.values()} == {jnp.dtype(dtype)}
  check_equal(found, expected)
  again_config, again = huggingface.load_pretrained(tmp_path / "ours", dtype=jnp.dtype(dtype))
  assert again_config == config
  check_equal(again, params)


@pytest.mark.parametrize("name", cases.variants_slow())
def test_transformers_loads_it(name, tmp_path):
  """With every weight and no other, and the same logits."""
  torch = cases.import_torch()
  config = cases.config(name)
  params = jax.tree.map(jnp.asarray, cases.random_params(config))
  huggingface.save_pretrained(tmp_path, config, params)
  theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
  )
  assert not any(report.values()), report
  expected = our_logits(config, params)
  assert np.std(expected) > 0.5
  np.testing.assert_allclose(cases.torch_logits(theirs.eval(), TOKENS), expected, atol=1e-5)


def test_dtype_of_the_files(tmp_path):
  """Rounded once from what the parameters are."""
  config, params = small()
  huggingface.save_pretrained(tmp_path, config, params, dtype=jnp.bfloat16)
  _, found = huggingface.load_pretrained(tmp_path, dtype=jnp.bfloat16)
  check_equal(found, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
  assert {x.dtype for x in read_tensors(tmp_path).values()} == {jnp.dtype(jnp.bfloat16)}
  torch = cases.import_torch()
  assert transformers.AutoConfig.from_pretrained(tmp_path).dtype == torch.bfloat16
  assert next(transformers.AutoModelForCausalLM.from_pretrained(tmp_path).parameters()).dtype == torch.bfloat16


def test_files(tmp_path):
  huggingface.save_pretrained(tmp_path, *small())
  assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
  with safetensors.safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
    assert file.metadata() == {"format": "pt"}
  assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "float32"


def test_tokenizer(tmp_path):
  config, params = small()
  tokenizer = builtin.tokenizer()
  huggingface.save_pretrained(tmp_path, config, params, tokenizer)
  fields = json.loads((tmp_path / "config.json").read_text())
  for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
    assert fields[name] == getattr(tokenizer, name)
  assert huggingface.load_pretrained(tmp_path)[0] == config
  found = transformers.AutoTokenizer.from_pretrained(tmp_path)
  chat = [{"role": "user", "content": "3*4+5 coins"}, {"role": "assistant", "content": "<think>x</think>"}]
  assert found.apply_chat_template(chat, tokenize=False) == tokenizer.apply_chat_template(chat, tokenize=False)
  text = tokenizer.apply_chat_template(chat, tokenize=False)
  assert found.encode(text) == tokenizer.encode(text)
  assert (found.eos_token, found.pad_token, len(found)) == (tokenizer.eos_token, tokenizer.pad_token, len(tokenizer))
  assert load_torch(tmp_path).generation_config.eos_token_id == tokenizer.eos_token_id


# --- several files ---


def test_shards(tmp_path):
  """As transformers writes them: names, index, sizes; and nothing is lost."""
  config, params = small()
  huggingface.save_pretrained(tmp_path / "one", config, params)
  huggingface.save_pretrained(tmp_path / "many", config, params, max_shard_bytes=40_000)
  load_torch(tmp_path / "one").save_pretrained(tmp_path / "theirs", max_shard_size=40_000)
  files = sorted(file.name for file in (tmp_path / "many").glob("*.safetensors"))
  count = len(files)
  assert count > 3
  assert files == [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
  found, expected = (
    json.loads((tmp_path / name / "model.safetensors.index.json").read_text()) for name in ("many", "theirs")
  )
  assert found["metadata"]["total_size"] == expected["metadata"]["total_size"]
  assert found["weight_map"].keys() == expected["weight_map"].keys()
  for file in files:
    tensors = safetensors.numpy.load_file(tmp_path / "many" / file)
    assert {found["weight_map"][name] for name in tensors} == {file}
    assert sum(tensor.nbytes for tensor in tensors.values()) <= 40_000
  check_equal(read_tensors(tmp_path / "many"), read_tensors(tmp_path / "one"))
  check_equal(huggingface.load_pretrained(tmp_path / "many")[1], params)
  np.testing.assert_array_equal(
    cases.torch_logits(load_torch(tmp_path / "many"), TOKENS), cases.torch_logits(load_torch(tmp_path / "one"), TOKENS)
  )


@pytest.mark.slow
def test_one_file_at_a_time(tmp_path, monkeypatch):
  """When a file is written, the tensors of those before it are gone."""
  config, params = small()
  before, sizes = [], []

  def save_file(tensors, *args):
    gc.collect()
    assert not any(tensor() is not None for tensor in before)
    before.extend(weakref.ref(tensor) for tensor in tensors.values())
    sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
    safetensors.numpy.save_file(tensors, *args)

  monkeypatch.setattr(saving, "save_file", save_file)
  huggingface.save_pretrained(tmp_path, config, params, max_shard_bytes=40_000)
  assert len(sizes) > 3
  assert max(sizes) <= 40_000
  assert len(before) == len(read_tensors(tmp_path))


SAVE_FROM_A_MESH = """
import dataclasses, sys
import jax
from rlpr_jax import huggingface, models, sharding
from tests.models import cases

config = dataclasses.replace(cases.config("qwen3"), lora=models.LoRA(4, 6.0, ("query", "out", "up", "down")))
placed = models.abstract_params(config, sharding.create(sharding.create_mesh(fsdp=2, tensor=2)))
params = jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), cases.random_params(config), placed)
assert len(params["layers"]["up"]["weight"].sharding.device_set) == 4
assert params["layers"]["up"]["weight"].addressable_shards[0].data.size * 4 == params["layers"]["up"]["weight"].size
huggingface.save_pretrained(sys.argv[1] + "/merged", config, params, max_shard_bytes=40_000)
huggingface.save_adapter(sys.argv[1] + "/adapter", config, params, "base")
"""


def test_parameters_split_over_a_mesh(tmp_path):
  """Four devices, in another interpreter: the same files as from one."""
  environment = os.environ | {
    "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4",
    "JAX_PLATFORMS": "cpu",
  }
  subprocess.run([sys.executable, "-c", SAVE_FROM_A_MESH, tmp_path], env=environment, check=True, timeout=240)
  config = dataclasses.replace(cases.config("qwen3"), lora=models.LoRA(4, 6.0, ("query", "out", "up", "down")))
  params = jax.tree.map(jnp.asarray, cases.random_params(config))
  huggingface.save_pretrained(tmp_path / "alone", config, params)
  huggingface.save_adapter(tmp_path / "adapter_alone", config, params, "base")
  check_equal(read_tensors(tmp_path / "adapter"), read_tensors(tmp_path / "adapter_alone"))
  found, expected = read_tensors(tmp_path / "merged"), read_tensors(tmp_path / "alone")
  merged = ("q_proj", "o_proj", "up_proj", "down_proj")
  assert found.keys() == expected.keys()
  for name, tensor in expected.items():
    if any(linear in name for linear in merged):
      np.testing.assert_allclose(found[name], tensor, atol=1e-6)  # sums in another order
    else:
      np.testing.assert_array_equal(found[name], tensor)


# --- whole or not at all ---


def message(*args, **settings):
  with pytest.raises(InputError) as caught:
    huggingface.save_pretrained(*args, **settings)
  assert "\n" not in str(caught.value)
  return str(caught.value)


def test_directory_that_is_not_empty(tmp_path):
  (tmp_path / "notes.txt").write_text("mine")
  assert message(tmp_path, *small()) == f"{tmp_path}: is there and not an empty directory, expected a new one"
  assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
  file = tmp_path / "notes.txt"
  assert message(file, *small()) == f"{file}: is there and not an empty directory, expected a new one"
  assert file.read_text() == "mine"
  with pytest.raises(InputError, match="is there and not an empty directory"):
    huggingface.save_adapter(tmp_path, *small(models.LoRA(2, 4.0, ("query",))), base="base")


def test_directory_that_is_refused_before_anything_is_computed(tmp_path):
  (tmp_path / "notes.txt").write_text("mine")
  config, _ = small()
  broken = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), models.abstract_params(config))
  assert "is there and not" in message(tmp_path, config, broken)


def test_directories_above_are_made(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  huggingface.save_pretrained("a/b/c", *small())
  huggingface.load_pretrained("a/b/c")
  assert [file.name for file in tmp_path.iterdir()] == ["a"]
  assert [file.name for file in (tmp_path / "a/b").iterdir()] == ["c"]
  (tmp_path / "plain").mkdir()
  assert (tmp_path / "a/b/c").stat().st_mode == (tmp_path / "plain").stat().st_mode  # others may read it


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), safetensors.SafetensorError("disk full")])
@pytest.mark.parametrize("directory", ["out", "a/b/out"])
def test_nothing_is_left_when_writing_fails(tmp_path, monkeypatch, failure, directory):
  def save_file(tensors, file, *args):
    if "00003" in pathlib.Path(file).name:
      raise failure
    safetensors.numpy.save_file(tensors, file, *args)

  monkeypatch.setattr(saving, "save_file", save_file)
  said = message(tmp_path / directory, *small(), builtin.tokenizer(), max_shard_bytes=40_000)
  assert said == f"{tmp_path / directory}: cannot be written ({failure})"
  assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_after_an_interrupt(tmp_path, monkeypatch):
  def save_file(tensors, file, *args):
    pathlib.Path(file).write_bytes(b"half")
    raise KeyboardInterrupt

  monkeypatch.setattr(saving, "save_file", save_file)
  with pytest.raises(KeyboardInterrupt):
    huggingface.save_pretrained(tmp_path / "out", *small())
  assert list(tmp_path.iterdir()) == []


def test_directory_below_a_file(tmp_path):
  (tmp_path / "file").write_text("mine")
  assert message(tmp_path / "file" / "out", *small()).startswith(f"{tmp_path / 'file' / 'out'}: cannot be written (")
  assert (tmp_path / "file").read_text() == "mine"


def test_config_of_no_family(tmp_path):
  config, params = small()
  assert "config.json of llama cannot say" in message(
    tmp_path / "out", dataclasses.replace(config, scale_embeddings=True), params
  )
  assert list(tmp_path.iterdir()) == []


# --- adapters ---

LINEAR = ("query", "key", "value", "out", "gate", "up", "down")
LORAS = {
  "llama": models.LoRA(3, 7.5, LINEAR),
  "llama_biases": models.LoRA(2, 1.0, ("query", "out", "down")),
  "qwen2": models.LoRA(4, 8.0, ("query", "value")),
  "qwen3": models.LoRA(4, 16.0, LINEAR),
  "gemma2": models.LoRA(2, 4.0, ("key", "gate")),
  "gemma3": models.LoRA(5, 3.0, LINEAR),
  "phi3_partial": models.LoRA(4, 16.0, ("out", "down")),
}


@functools.cache
def adapted(name):
  """A model with adapters that change much, and its logits."""
  config = dataclasses.replace(cases.config(name), lora=LORAS[name])
  params = jax.tree.map(jnp.asarray, cases.random_params(config))
  logits = our_logits(config, params)
  base = our_logits(dataclasses.replace(config, lora=None), without_adapters(params))
  assert np.max(np.abs(logits - base)) > 0.1
  return config, params, logits


def without_adapters(params):
  kept = {name: without_adapters(part) if isinstance(part, dict) else part for name, part in params.items()}
  return {name: part for name, part in kept.items() if not name.startswith("lora_")}


@pytest.mark.parametrize("name", LORAS)
def test_merged_adapters(name, tmp_path):
  config, params, logits = adapted(name)
  huggingface.save_pretrained(tmp_path, config, params)
  assert not any("lora" in tensor for tensor in read_tensors(tmp_path))
  np.testing.assert_allclose(cases.torch_logits(load_torch(tmp_path), TOKENS), logits, atol=2e-5)
  assert huggingface.load_pretrained(tmp_path)[0] == dataclasses.replace(config, lora=None)


def test_adapters_are_merged_in_float32(tmp_path):
  """Base in bfloat16: what is written is the sum rounded once, not a sum of rounded terms."""
  config, params, _ = adapted("llama")
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  huggingface.save_pretrained(tmp_path, config, params)
  found = read_tensors(tmp_path)
  wide = jax.tree.map(lambda x: np.asarray(x, np.float64), params)["layers"]
  for layer in range(config.num_layers):
    down, out = ({part: leaf[layer] for part, leaf in wide[name].items()} for name in ("down", "out"))
    merged = down["weight"] + 2.5 * down["lora_a"] @ down["lora_b"]
    weight = found[f"model.layers.{layer}.mlp.down_proj.weight"]
    assert weight.dtype == jnp.bfloat16
    np.testing.assert_allclose(weight.T.astype(np.float64), merged, rtol=2**-8)  # half the distance of two bfloat16
    merged = out["weight"] + 2.5 * np.einsum("nhr,rd->nhd", out["lora_a"], out["lora_b"])
    weight = found[f"model.layers.{layer}.self_attn.o_proj.weight"]
    np.testing.assert_allclose(weight.T.astype(np.float64), merged.reshape(80, 48), rtol=2**-8)


@pytest.mark.parametrize("name", LORAS)
def test_peft_loads_the_adapters(name, tmp_path):
  peft = pytest.importorskip("peft", reason="peft is not installed")
  config, params, logits = adapted(name)
  base = tmp_path / "base"
  huggingface.save_pretrained(base, dataclasses.replace(config, lora=None), without_adapters(params))
  huggingface.save_adapter(tmp_path / "adapter", config, params, base=str(base))
  theirs = peft.PeftModel.from_pretrained(load_torch(base), tmp_path / "adapter").eval()
  assert theirs.peft_config["default"].base_model_name_or_path == str(base)
  np.testing.assert_allclose(cases.torch_logits(theirs, TOKENS), logits, atol=2e-5)
  expected = {key.replace(".default", "") for key in theirs.state_dict() if "lora_" in key}
  assert read_tensors(tmp_path / "adapter").keys() == expected
  merged = cases.torch_logits(theirs.merge_and_unload(), TOKENS)
  huggingface.save_pretrained(tmp_path / "merged", config, params)
  np.testing.assert_allclose(cases.torch_logits(load_torch(tmp_path / "merged"), TOKENS), merged, atol=2e-5)


def test_peft_finds_the_base_itself(tmp_path):
  """And the tokenizer, if it was written along."""
  peft = pytest.importorskip("peft", reason="peft is not installed")
  config, params, _ = adapted("qwen3")
  base = tmp_path / "base"
  huggingface.save_pretrained(base, dataclasses.replace(config, lora=None), without_adapters(params))
  huggingface.save_adapter(tmp_path / "adapter", config, params, str(base), builtin.tokenizer())
  # PEFT makes room for as many tokens as the tokenizer has; here the model has more.
  theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", attn_implementation="eager")
  vocabulary = len(builtin.tokenizer())
  tokens = TOKENS % vocabulary
  expected = cases.whole_logits(models.definition(config), params, tokens)
  found = cases.torch_logits(theirs.eval(), tokens)
  np.testing.assert_allclose(found, expected[..., : found.shape[-1]], atol=2e-5)
  assert transformers.AutoTokenizer.from_pretrained(tmp_path / "adapter").eos_token == builtin.tokenizer().eos_token


def test_adapters_alone_are_enough(tmp_path):
  """The base need not be there."""
  config, params, _ = adapted("gemma3")
  huggingface.save_adapter(tmp_path / "all", config, params, "base")
  huggingface.save_adapter(tmp_path / "alone", config, models.adapters(params), "base")
  check_equal(read_tensors(tmp_path / "alone"), read_tensors(tmp_path / "all"))
  assert sorted(file.name for file in (tmp_path / "alone").iterdir()) == [
    "adapter_config.json",
    "adapter_model.safetensors",
  ]


def test_adapters_of_fused_layers(tmp_path):
  """They are merged into their own rows; alone, they would be adapters of a layer that they are a part of."""
  lora = models.LoRA(3, 7.5, LINEAR)
  config = dataclasses.replace(cases.config("phi3"), lora=lora)
  params = jax.tree.map(jnp.asarray, cases.random_params(config))
  huggingface.save_pretrained(tmp_path / "merged", config, params)
  found = cases.torch_logits(load_torch(tmp_path / "merged"), TOKENS)
  np.testing.assert_allclose(found, our_logits(config, params), atol=2e-5)
  with pytest.raises(InputError, match="the adapters of query, key, value, gate, up belong to one tensor of the model"):
    huggingface.save_adapter(tmp_path / "alone", config, params, "base")
  assert not (tmp_path / "alone").exists()


def test_no_adapters_to_write(tmp_path):
  with pytest.raises(InputError, match="has no adapters to be written"):
    huggingface.save_adapter(tmp_path / "out", *small(), base="base")
  assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_when_writing_adapters_fails(tmp_path, monkeypatch):
  def save_file(*args):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(saving, "save_file", save_file)
  config, params, _ = adapted("qwen2")
  with pytest.raises(InputError, match="cannot be written"):
    huggingface.save_adapter(tmp_path / "out", config, params, "base")
  assert list(tmp_path.iterdir()) == []
