"""The policy of a Hugging Face directory: what is checked of it, in which order, and that its code is never run."""

import io
import json

import pytest

from rlpr_jax import huggingface, models
from rlpr_jax.config import default
from rlpr_jax.data import builtin
from rlpr_jax.errors import InputError
from rlpr_jax.policy import load_policy, load_tokenizer


@pytest.fixture
def directory(tmp_path):
  """A random Qwen3 of the built-in vocabulary."""
  tokenizer = builtin.tokenizer()
  config = models.ModelConfig(len(tokenizer), 8, 12, 1, 2, 1, 4, qk_norm=True, max_length=64)
  huggingface.save_pretrained(tmp_path / "model", config, models.init_params(config, 0), tokenizer)
  return tmp_path / "model"


def change(file, **fields):
  file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def error(directory):
  """The one line that is said when a policy is to be made of a directory."""
  config = default()
  config.model.path = str(directory)
  with pytest.raises(InputError) as caught:
    load_policy(config)
  message = str(caught.value)
  assert "\n" not in message
  return message


# --- code in a directory ---


@pytest.fixture
def marker(directory, monkeypatch):
  """Made by the directory's code, were it run; at the terminal everything is answered with yes."""
  marker = directory.parent / "code was run"
  code = f"open({str(marker)!r}, 'w').close()\nfrom transformers import PreTrainedTokenizerFast, Qwen3Config\n"
  code += "class OwnTokenizer(PreTrainedTokenizerFast): pass\nclass OwnConfig(Qwen3Config): pass\n"
  (directory / "own.py").write_text(code)
  monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
  monkeypatch.setenv("HF_MODULES_CACHE", str(directory.parent / "modules"))
  return marker


AUTO_MAP = {"AutoConfig": "own.OwnConfig", "AutoTokenizer": ["own.OwnTokenizer", None]}


def test_code_for_a_config_is_not_run(directory, marker):
  """transformers reads config.json for the tokenizer, and one of a model that it does not know by such code."""
  change(directory / "config.json", model_type="own", auto_map=AUTO_MAP)
  assert error(directory).startswith(f"{directory}/config.json: model_type is 'own', expected one of ")
  load_tokenizer(str(directory))  # which needs none of it
  assert not marker.exists()


def test_code_for_a_tokenizer_is_not_run(directory, marker):
  change(directory / "config.json", model_type="own")
  change(directory / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=AUTO_MAP)
  with pytest.raises(InputError, match=r"model: no tokenizer \(.* contains custom code which must be executed"):
    load_tokenizer(str(directory))
  assert not marker.exists()


def test_code_beside_a_known_family_is_not_run(directory, marker):
  change(directory / "config.json", auto_map=AUTO_MAP)
  change(directory / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=AUTO_MAP)
  config = default()
  config.model.path = str(directory)
  assert load_policy(config).config.qk_norm
  assert not marker.exists()


# --- config.json is read first ---


@pytest.mark.parametrize(
  ("fields", "expected"),
  [
    ({"hidden_size": "8"}, "hidden_size is '8', expected a positive integer"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0, expected a positive integer"),
    ({"rope_scaling": {"rope_type": "llama3"}}, "rope: factor is missing, expected with rope type 'llama3'"),
    ({"layer_types": 7}, "layer_types is 7, expected a list of 1, each full_attention or sliding_attention"),
  ],
)
def test_field_that_is_wrong(directory, fields, expected):
  """transformers, which reads config.json for the tokenizer, has errors of its own for these."""
  tokenizer = json.loads((directory / "tokenizer_config.json").read_text())
  del tokenizer["tokenizer_class"]  # so that it does
  (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer))
  change(directory / "config.json", **fields)
  assert error(directory) == f"{directory}/config.json: {expected}"


def test_config_that_is_cut_off(directory):
  file = directory / "config.json"
  file.write_text(file.read_text()[:-20])
  assert error(directory).startswith(f"{file}: cannot be read as JSON (")
