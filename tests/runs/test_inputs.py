"""What stands behind the paths of a run may not change under it, unless that is accepted."""

import json

import numpy as np
import pytest

from rlpr_jax import config as configs
from rlpr_jax import huggingface, models, sft, train
from rlpr_jax.data import builtin
from rlpr_jax.errors import InputError
from rlpr_jax.runs import inputs
from tests.tiny_run import final_state, tiny

ROWS = [{"question": f"{n}+{n}?", "answer": str(2 * n)} for n in range(8)]


def write(path, rows):
  path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  directory = tmp_path_factory.mktemp("model") / "base"
  tokenizer = builtin.tokenizer()
  config = models.ModelConfig(len(tokenizer), 32, 48, 2, 4, 2, 8, qk_norm=True)
  huggingface.save_pretrained(directory, config, models.init_params(config, 0), tokenizer)
  return directory


def config_of(tmp_path, steps):
  c = tiny()
  c.steps, c.warm_start.steps, c.evaluation.prompts = steps, 0, 0
  c.filter.kind = "off"
  c.data.path = str(tmp_path / "rows.jsonl")
  return c


@pytest.mark.slow
def test_rows_edited_in_place_are_refused_and_when_accepted_keep_their_own_baselines(tmp_path):
  write(tmp_path / "rows.jsonl", ROWS)
  train.train(config_of(tmp_path, 1), tmp_path / "run")
  before = final_state(tmp_path / "run", config_of(tmp_path, 1))

  new = {"question": "9+8?", "answer": "17"}
  write(tmp_path / "rows.jsonl", [new, *ROWS[:0:-1]])  # one replaced, the others the other way round
  with pytest.raises(InputError, match="holds a run that began with other data rows: expected the same, or --accept"):
    train.train(config_of(tmp_path, 2), tmp_path / "run")
  train.train(config_of(tmp_path, 2), tmp_path / "run", accept_changes=True)
  after = final_state(tmp_path / "run", config_of(tmp_path, 2))
  assert after.step == 2
  np.testing.assert_array_equal(after.baselines[1:], before.baselines[:0:-1])
  assert np.isfinite(after.baselines[0]).any()  # measured anew
  assert not np.array_equal(after.baselines[0], before.baselines[0], equal_nan=True)

  write(tmp_path / "rows.jsonl", [new, *ROWS])  # of another number
  train.train(config_of(tmp_path, 3), tmp_path / "run", accept_changes=True)
  assert final_state(tmp_path / "run", config_of(tmp_path, 3)).baselines.shape[0] == 9


@pytest.mark.slow
def test_a_run_killed_after_its_changes_were_accepted_and_before_it_saved(tmp_path, monkeypatch):
  """Its checkpoint still knows the old rows, although the new ones were accepted."""
  write(tmp_path / "rows.jsonl", ROWS)
  train.train(config_of(tmp_path, 1), tmp_path / "run")
  before = final_state(tmp_path / "run", config_of(tmp_path, 1))
  write(tmp_path / "rows.jsonl", ROWS[::-1])
  with monkeypatch.context() as patch:
    patch.setattr(train, "train_steps", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      train.train(config_of(tmp_path, 2), tmp_path / "run", accept_changes=True)
  train.train(config_of(tmp_path, 2), tmp_path / "run")
  after = final_state(tmp_path / "run", config_of(tmp_path, 2))
  np.testing.assert_array_equal(after.baselines, before.baselines[::-1])


def test_a_custom_reward_that_was_edited(tmp_path):
  write(tmp_path / "rows.jsonl", ROWS)
  c = config_of(tmp_path, 1)
  reward = tmp_path / "rewards.py"
  reward.write_text("def noise(evidence, texts, prompts):\n  return evidence.noise\n")
  c.reward.custom = f"{reward}:noise"
  train.train(c, tmp_path / "run")
  reward.write_text("def noise(evidence, texts, prompts):\n  return 1 - evidence.noise\n")
  c.steps = 2
  with pytest.raises(InputError, match="began with other custom reward"):
    train.train(c, tmp_path / "run")


def test_a_directory_of_another_program(tmp_path, model):
  c = config_of(tmp_path, 1)
  c.data.path = ""
  c.warm_start.steps = 1
  sft.sft(c, tmp_path / "run")
  with pytest.raises(InputError, match=r"run holds a run of rlpr sft, expected one of rlpr train"):
    train.train(c, tmp_path / "run")


@pytest.mark.parametrize("part", ["tokenizer", "chat template", "weights"])
def test_each_part_of_a_model_is_known(model, tmp_path, part):
  c = configs.default()
  c.model.path = str(tmp_path / "model")
  files = {file.name: file.read_bytes() for file in model.iterdir()}
  (tmp_path / "model").mkdir()
  for name, content in files.items():
    (tmp_path / "model" / name).write_bytes(content)
  tokenizer = builtin.tokenizer()
  before = inputs.model_digests(c, tokenizer)
  assert inputs.model_digests(c, builtin.tokenizer()) == before
  if part == "chat template":
    tokenizer.chat_template += " "
  else:
    name = {"tokenizer": "tokenizer.json", "weights": "model.safetensors"}[part]
    changed = bytearray(files[name])
    changed[-1] ^= 1  # one bit, at the end of the last tensor
    (tmp_path / "model" / name).write_bytes(bytes(changed))
  after = inputs.model_digests(c, tokenizer)
  assert {name for name in before if before[name] != after[name]} == {part}


def test_weights_of_other_values_are_others(model, tmp_path):
  config = huggingface.load_config(model)
  huggingface.save_pretrained(tmp_path / "other", config, models.init_params(config, 1), builtin.tokenizer())
  assert inputs.digest_weights(model) != inputs.digest_weights(tmp_path / "other")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"program": "train", "parts": 1, "rows": []}'])
def test_a_file_of_something_else_is_one_line(tmp_path, text):
  (tmp_path / "inputs.json").write_text(text)
  with pytest.raises(InputError, match=r"inputs\.json: expected the inputs of this directory's run"):
    inputs.read_inputs(tmp_path)


def test_a_directory_of_an_older_version_has_none(tmp_path):
  assert inputs.read_inputs(tmp_path) is None
