"""Every family against transformers in torch (CPU, float32, eager attention), and what makes one differ from another.

Random small models, see cases.py. The largest differences seen are in docs/models.md.
"""

import copy
import dataclasses
import functools

import jax
import numpy as np
import pytest
import safetensors.numpy
import transformers

from rlpr_jax import huggingface, models
from rlpr_jax.huggingface import families
from rlpr_jax.models import Rope
from tests.models import cases

TOKENS = cases.random_tokens(2, cases.LENGTH)
ATOL = 2e-5  # of logits of size one; the largest difference seen is half of it


@functools.cache
def model(name):
  return models.definition(cases.config(name))


@functools.cache
def expected_logits(name):
  return cases.torch_logits(cases.torch_model(name), TOKENS)


@pytest.mark.parametrize("name", cases.CASES)
def test_logits_of_whole_rows(name):
  config, params = cases.loaded(name)
  assert config == cases.config(name)  # transformers wrote the file that was read
  found = cases.whole_logits(model(name), params, TOKENS)
  assert found.dtype == np.float32
  assert np.std(expected_logits(name)) > 0.5
  np.testing.assert_allclose(found, expected_logits(name), atol=ATOL, rtol=0)


IN_THE_CACHE = ("qwen2", "gemma2", "smollm3")  # biases; windows and soft caps; layers without places


@pytest.mark.parametrize(
  "name", [pytest.param(name, marks=[] if name in IN_THE_CACHE else [pytest.mark.slow]) for name in cases.CASES]
)
def test_logits_through_the_cache(name):
  """Prompts of different lengths, then one token and many by turns: more than a window at once, and over its edge."""
  found = cases.chunked_logits(model(name), cases.loaded(name)[1], TOKENS, np.array([5, 11]), (1, 11))
  np.testing.assert_allclose(found, expected_logits(name), atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", cases.variants_slow())
def test_sequences_packed_into_one_row_are_as_if_alone(name):
  """Against torch, which sees each alone; the second is longer than every window."""
  sequences = [cases.random_tokens(n, seed=n) for n in (13, 24)]
  row = cases.pack(sequences, cases.LENGTH)
  rows = [np.repeat(x, 2, axis=0) for x in row]
  found = cases.whole_logits(model(name), cases.loaded(name)[1], *rows)[0]
  alone = [cases.torch_logits(cases.torch_model(name), sequence[None])[0] for sequence in sequences]
  np.testing.assert_allclose(found[:37], np.concatenate(alone), atol=ATOL, rtol=0)
  assert np.all(np.isfinite(found))  # on padding too


# A variant of a family has another forward pass, and the same kind of backward pass.
@pytest.mark.parametrize("name", cases.variants_slow())
def test_gradients(name):
  """By every parameter of every layer, within 2e-5 of its largest entry."""
  found = cases.gradients(model(name), cases.loaded(name)[1], TOKENS)
  expected = cases.torch_gradients(cases.torch_model(name), TOKENS)
  assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, expected)
  assert all(np.all(np.max(np.abs(x), axis=tuple(range(1, x.ndim))) > 0) for x in jax.tree.leaves(expected["layers"]))
  differences = cases.differences(found, expected)
  assert len(differences) == len(jax.tree.leaves(expected))
  assert {name: error for name, error in differences.items() if not error < 2e-5} == {}


@pytest.mark.parametrize("name", cases.CASES)
def test_config_is_written_so_that_it_can_be_read(name):
  """By us, and by transformers, which makes the same model of it."""
  config = cases.config(name)
  fields = families.to_huggingface(config)
  assert families.from_huggingface(fields, name) == config
  theirs = transformers.AutoConfig.for_model(**fields | {"pad_token_id": None})
  again = cases.randomise(theirs)  # the weights come from a seed
  np.testing.assert_array_equal(cases.torch_logits(again, TOKENS), expected_logits(name))


def test_base_model_alone(tmp_path):
  """As transformers saves it: names without `model.`, and no head, which is the embedding."""
  theirs = cases.torch_model("llama_tied")
  theirs.model.save_pretrained(tmp_path)
  config, params = huggingface.load_pretrained(tmp_path)
  assert config == cases.config("llama_tied")
  jax.tree.map(np.testing.assert_array_equal, params, cases.loaded("llama_tied")[1])


def test_gemma3_without_any_window():
  """The other rope is then nobody's."""
  fields = cases.CASES["gemma3"] | {"layer_types": ["full_attention"] * 7}
  theirs = cases.randomise(transformers.AutoConfig.for_model(**fields))
  config, params = cases.load(theirs)
  assert (config.window, config.windowed) == (None, ())
  found = cases.whole_logits(models.definition(config), params, TOKENS)
  np.testing.assert_allclose(found, cases.torch_logits(theirs, TOKENS), atol=ATOL, rtol=0)


@functools.cache
def multimodal():
  """A Gemma 3 of texts and images, with noise in every weight."""
  torch = cases.import_torch()
  vision = {
    "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
  }  # fmt: skip
  config = transformers.Gemma3Config(
    text_config=cases.CASES["gemma3"], vision_config=vision, mm_tokens_per_image=4, image_token_index=cases.VOCAB - 1
  )
  theirs = transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
  torch.manual_seed(1)
  for parameter in theirs.parameters():
    parameter.data = (0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5) * torch.randn(parameter.shape)
  theirs.tie_weights()
  return theirs


@pytest.mark.parametrize("prefix", ["as saved", "language_model.model.", "model.language_model."])
def test_text_part_of_a_multimodal_model(tmp_path, prefix, capsys):
  """Under the names of published files, and under those of transformers 5."""
  multimodal().save_pretrained(tmp_path)
  file = tmp_path / "model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  body = next(name for name in tensors if name.endswith("embed_tokens.weight")).removesuffix("embed_tokens.weight")
  vision = sum("language_model" not in name for name in tensors)
  assert vision > 20
  if prefix != "as saved":
    safetensors.numpy.save_file({name.replace(body, prefix): tensor for name, tensor in tensors.items()}, file)
  config, params = huggingface.load_pretrained(tmp_path)
  said = f"tensors left out, which the model does not compute with: {vision} of the vision part"
  assert capsys.readouterr().out == f"{tmp_path}: {said}\n"
  assert config == cases.config("gemma3")
  tokens = TOKENS % (cases.VOCAB - 1)  # none of them an image
  expected = cases.torch_logits(multimodal(), tokens)
  assert np.std(expected) > 0.5
  found = cases.whole_logits(models.definition(config), params, tokens)
  np.testing.assert_allclose(found, expected, atol=ATOL, rtol=0)
  cached = cases.chunked_logits(models.definition(config), params, tokens, np.array([5, 11]), (1, 11))
  np.testing.assert_allclose(cached, expected, atol=ATOL, rtol=0)


def test_gradients_of_the_text_part_of_a_multimodal_model(tmp_path):
  torch = cases.import_torch()
  theirs, tokens = copy.deepcopy(multimodal()), TOKENS % (cases.VOCAB - 1)
  theirs.save_pretrained(tmp_path / "weights")
  config, params = huggingface.load_pretrained(tmp_path / "weights")
  logits, targets = theirs(torch.tensor(tokens)).logits[:, :-1], torch.tensor(tokens[:, 1:]).long()
  (-torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))).backward()
  for parameter in theirs.parameters():  # those of the vision part have none
    parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
  theirs.save_pretrained(tmp_path / "gradients")
  expected = huggingface.load_pretrained(tmp_path / "gradients")[1]
  differences = cases.differences(cases.gradients(models.definition(config), params, tokens), expected)
  assert {name: error for name, error in differences.items() if not error < 2e-5} == {}


def test_text_part_is_written_as_a_text_model(tmp_path):
  """Which transformers loads without the vision part."""
  multimodal().save_pretrained(tmp_path / "both")
  config, params = huggingface.load_pretrained(tmp_path / "both")
  huggingface.save_pretrained(tmp_path / "text", config, params)
  theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "text", attn_implementation="eager", output_loading_info=True
  )
  assert not any(report.values()), report
  again_config, again = huggingface.load_pretrained(tmp_path / "text")
  assert again_config == config
  jax.tree.map(np.testing.assert_array_equal, again, params)
  tokens = TOKENS % (cases.VOCAB - 1)
  np.testing.assert_array_equal(cases.torch_logits(theirs.eval(), tokens), cases.torch_logits(multimodal(), tokens))


# --- each setting matters ---

# Settings that are switched off, by case: were one without effect, the tests above could not tell that it is right.
SWITCHES = {
  "llama": [
    {"norm_eps": 1e-6},
    {"rope": Rope()},  # theta
    {"activation": "gelu_tanh"},
    {"scale_embeddings": True},
    {"norm_offset": True},
  ],
  "llama_biases": [{"biases": tuple(name for name in models.LINEAR if name != without)} for without in models.LINEAR],
  "llama_long": [
    {"rope": Rope(500.0)},
    {"rope": Rope(500.0, "linear", 8.0)},
    {"rope": Rope(500.0, "llama3", 4.0, 1.0, 4.0, 8)},
    {"rope": Rope(500.0, "llama3", 8.0, 2.0, 4.0, 8)},
    {"rope": Rope(500.0, "llama3", 8.0, 1.0, 8.0, 8)},
    {"rope": Rope(500.0, "llama3", 8.0, 1.0, 4.0, 16)},
  ],
  "llama_linear": [{"rope": Rope(1000.0)}],
  "llama_yarn": [
    {"rope": dataclasses.replace(cases.config("llama_yarn").rope, **change)}
    for change in (
      {"kind": "default"},
      {"factor": 4.0},
      {"original_length": 32},
      {"beta_fast": 32.0},
      {"beta_slow": 2.0},
      {"truncate": True},
      {"attention_factor": 1.0},
    )
  ],
  "qwen3_yarn": [{"rope": Rope(100.0)}],
  "mistral": [{"windowed": (), "window": None}, {"window": 5}],
  "qwen2": [
    {"windowed": (), "window": None},
    {"windowed": (True,) * 4},
    {"windowed": (True, True, False, False)},
    {"window": 5},
    {"window": 7},
    {"biases": ("query", "key")},
  ],
  "qwen3": [{"qk_norm": False}],
  "qwen3_biases": [{"biases": ("query", "key", "value")}],
  "gemma2": [
    {"windowed": (), "window": None},
    {"windowed": (False, True) * 2},
    {"window": 6},
    {"attention_softcap": None},
    {"final_softcap": None},
    {"norm_offset": False},
    {"post_norms": False},
    {"scale_embeddings": False},
    {"query_pre_attn_scalar": None},
    {"activation": "silu"},
  ],
  "gemma3": [
    {"windowed": (), "window": None},
    {"windowed": (True,) * 7},
    {"window": 8},
    {"rope": Rope(1000.0)},
    {"local_rope": None},
    {"local_rope": Rope(1000.0)},
    {"qk_norm": False},
    {"norm_offset": False},
    {"post_norms": False},
    {"scale_embeddings": False},
    {"query_pre_attn_scalar": None},
  ],
  "smollm3": [{"unrotated": ()}, {"unrotated": (True,) * 5}, {"unrotated": (True, False) * 2 + (True,)}],
  "smollm3_windows": [
    {"unrotated": ()},
    {"windowed": (), "window": None},
    {"windowed": (False, False, True, False)},
    {"windowed": (True, False, False, False)},
    {"rope": Rope(100.0)},
  ],
  "olmo2": [{"post_norms": False}, {"qk_norm": False, "qk_norm_whole": False}, {"norm_eps": 1e-6}],
  "phi3_partial": [
    {"rope": Rope(500.0)},
    {"rope": Rope(500.0, fraction=0.5)},
    {"windowed": (), "window": None},
    {"window": 5},
  ],
}


def test_norms_before_attention_and_mlp_matter():
  """Those of Llama, which OLMo 2 goes without."""
  config, params = cases.loaded("llama")
  changed = dataclasses.replace(config, pre_norms=False)
  found = cases.whole_logits(models.definition(changed), prune(params, models.abstract_params(changed)), TOKENS)
  assert np.max(np.abs(found - expected_logits("llama"))) > 1e-2


def test_a_norm_of_all_heads_is_not_one_of_each():
  """Of OLMo 2's weights, whose norms are then of the first head's scale alone."""
  config, params = cases.loaded("olmo2")
  changed = dataclasses.replace(config, qk_norm_whole=False)
  first = {
    name: {"scale": params["layers"][name]["scale"][:, : config.head_dim]} for name in ("query_norm", "key_norm")
  }
  params = params | {"layers": params["layers"] | first}
  found = cases.whole_logits(models.definition(changed), params, TOKENS)
  assert np.max(np.abs(found - expected_logits("olmo2"))) > 1e-2


def prune(params, like):
  """The part of the parameters that another configuration has too."""
  return {key: prune(params[key], part) if isinstance(part, dict) else params[key] for key, part in like.items()}


@pytest.mark.parametrize(
  ("name", "change"),
  [
    pytest.param(name, change, id=f"{name}-{i}-{'-'.join(change)}")
    for name, changes in SWITCHES.items()
    for i, change in enumerate(changes)
  ],
)
def test_every_setting_matters(name, change):
  """Were it read wrongly, the logits would be a hundred times as far from torch's as they may be."""
  config, params = cases.loaded(name)
  changed = dataclasses.replace(config, **change)
  assert changed != config
  params = prune(params, models.abstract_params(changed))
  found = cases.whole_logits(models.definition(changed), params, TOKENS)
  assert np.all(np.isfinite(found))
  assert np.max(np.abs(found - expected_logits(name))) > 1e-2
