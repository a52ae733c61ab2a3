"""What comes out of a run: Hugging Face directories of its checkpoints; and LoRA from the first step to the export."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlpr_jax import export, huggingface, models
from rlpr_jax import train as training_program
from rlpr_jax.config import default
from rlpr_jax.data import builtin
from rlpr_jax.errors import InputError
from rlpr_jax.policy import load_policy
from rlpr_jax.runs.checkpoints import restore_params
from tests.models import cases

TOKENS = np.random.default_rng(1).integers(2, 60, (2, 20))


def tiny():
  c = default()
  c.compilation_cache = ""
  c.steps = 2
  c.prompts_per_step = 2
  c.samples_per_prompt = 2
  c.max_draws = 1
  c.data.count = 6
  c.data.instruction = ""
  c.data.prompt_limit = 14
  c.data.max_reference_length = 16
  c.rollout.max_response_length = 16
  c.rollout.prompts_per_draw = 2
  c.rollout.slots = 4
  c.rollout.decode_steps = 4
  c.rollout.prefill_prompts = 2
  c.rollout.score_rows = 4
  c.filter.kind = "off"
  c.training.minibatches = 1
  c.training.learning_rate = 1e-2
  c.reward.kind = "random"  # a random policy earns nothing else, and something is to be learned
  c.log.checkpoint_every = 1
  c.log.keep_checkpoints = 3
  return c


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> pathlib.Path:
  """A random Qwen3 of the built-in vocabulary."""
  directory = tmp_path_factory.mktemp("model") / "base"
  tokenizer = builtin.tokenizer()
  config = models.ModelConfig(len(tokenizer), 32, 48, 2, 4, 2, 8, qk_norm=True, max_length=64)
  huggingface.save_pretrained(directory, config, models.init_params(config, 0), tokenizer)
  return directory


@pytest.fixture(scope="module")
def full_run(tmp_path_factory, base) -> pathlib.Path:
  workdir = tmp_path_factory.mktemp("full")
  config = tiny()
  config.model.path = str(base)
  training_program.train(config, workdir)
  return workdir


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory, base) -> pathlib.Path:
  workdir = tmp_path_factory.mktemp("lora")
  config = tiny()
  config.model.path = str(base)
  config.lora.rank = 2
  config.lora.base_dtype = "float32"  # so that peft's sums can be compared with ours
  training_program.train(config, workdir)
  return workdir


def our_logits(config: models.ModelConfig, params: models.Params) -> np.ndarray:
  decoder = nnx.merge(models.definition(config), params)
  positions = np.broadcast_to(np.arange(TOKENS.shape[1]), TOKENS.shape)
  return np.asarray(decoder.logits(decoder(TOKENS, positions, np.ones_like(TOKENS))))


def load_torch(directory: pathlib.Path):
  cases.import_torch()
  return AutoModelForCausalLM.from_pretrained(directory)


def their_logits(model) -> np.ndarray:
  """Of a module of torch."""
  torch = cases.import_torch()
  with torch.no_grad():
    return model.eval()(torch.tensor(TOKENS)).logits.float().numpy()


def policy_of(workdir: pathlib.Path, step: int) -> tuple[models.ModelConfig, models.Params]:
  policy = load_policy(export.read_config(workdir))
  return policy.config, policy.merged_params(restore_params(workdir, step, policy.trained)[1])


def test_a_checkpoint_is_a_model_that_transformers_loads(full_run, base, tmp_path):
  export.export(full_run, tmp_path / "out", step=2, dtype="float32", adapter=False)
  theirs = their_logits(load_torch(tmp_path / "out"))
  np.testing.assert_allclose(theirs, our_logits(*policy_of(full_run, 2)), atol=1e-5)
  assert np.abs(theirs - their_logits(load_torch(base))).max() > 1e-2  # it has learned
  assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"eos_token_id": 1}
  assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("1+2") == builtin.tokenizer().encode("1+2")


def test_steps_are_told_apart_and_bfloat16_is_a_choice(full_run, tmp_path):
  for name, step, dtype in (("first", 1, "float32"), ("newest", None, "float32"), ("half", None, "bfloat16")):
    export.export(full_run, tmp_path / name, step, dtype, adapter=False)
  first, newest, half = (huggingface.load_pretrained(str(tmp_path / name))[1] for name in ("first", "newest", "half"))
  gap = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), first, newest)
  assert max(jax.tree.leaves(gap)) > 1e-3
  for full, rounded in zip(jax.tree.leaves(newest), jax.tree.leaves(half), strict=True):
    np.testing.assert_array_equal(full.astype(jnp.bfloat16).astype(jnp.float32), rounded)


@pytest.mark.slow
def test_lora_trains_adapters_alone(lora_run, base):
  config, params = policy_of(lora_run, 2)
  _, start = huggingface.load_pretrained(str(base))
  frozen = dataclasses.replace(config, lora=None)
  assert models.adapters(start) == {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    keys = [key.key for key in path]
    if keys[-1] == "lora_b":
      assert float(jnp.abs(leaf).max()) > 1e-3, keys  # began at zero
    elif keys[-1] != "lora_a":
      was = start
      for key in keys:
        was = was[key]
      np.testing.assert_array_equal(was, leaf)
  zero = policy_of(lora_run, 0)[1]
  np.testing.assert_allclose(our_logits(config, zero), our_logits(frozen, start), atol=1e-5)  # begin as nothing
  on_disk = {path.name for path in (lora_run / "checkpoints/2/params").rglob("*")}
  assert not any("weight" in name for name in on_disk)


@pytest.mark.slow
def test_merged_and_separate_adapters_are_the_policy(lora_run, base, tmp_path):
  peft = pytest.importorskip("peft", reason="peft is not installed")
  ours = our_logits(*policy_of(lora_run, 2))
  export.export(lora_run, tmp_path / "merged", 2, "float32", adapter=False)
  np.testing.assert_allclose(their_logits(load_torch(tmp_path / "merged")), ours, atol=1e-5)
  export.export(lora_run, tmp_path / "adapter", 2, "float32", adapter=True)
  with_adapter = peft.PeftModel.from_pretrained(load_torch(base), tmp_path / "adapter")
  np.testing.assert_allclose(their_logits(with_adapter), ours, atol=1e-5)
  assert np.abs(ours - their_logits(load_torch(base))).max() > 1e-2


@pytest.mark.slow
def test_lora_resumes(lora_run, base, tmp_path):
  config = tiny()
  config.model.path = str(base)
  config.lora.rank = 2
  config.lora.base_dtype = "float32"
  config.steps = 1
  training_program.train(config, tmp_path)
  config.steps = 2
  training_program.train(config, tmp_path)
  for whole, resumed in zip(*(jax.tree.leaves(policy_of(run, 2)[1]) for run in (lora_run, tmp_path)), strict=True):
    np.testing.assert_array_equal(whole, resumed)


def test_what_cannot_be_exported_is_one_line(full_run, tmp_path):
  with pytest.raises(InputError, match=r"no checkpoint of step 7, it has 0, 1, 2$"):
    export.export(full_run, tmp_path / "out", 7, "float32", adapter=False)
  with pytest.raises(InputError, match=r"--adapter: .* trained all parameters"):
    export.export(full_run, tmp_path / "out", 2, "float32", adapter=True)
  with pytest.raises(InputError, match=r"config\.json: missing"):
    export.export(tmp_path, tmp_path / "out", 2, "float32", adapter=False)
  (tmp_path / "config.json").write_text(json.dumps({"stepps": 3}))
  with pytest.raises(InputError, match=r"config\.json: config.*stepps: there is no such field"):
    export.export(tmp_path, tmp_path / "out", 2, "float32", adapter=False)
  assert not (tmp_path / "out").exists()


def test_lora_targets_are_checked(base, tmp_path):
  config = tiny()
  config.model.path = str(base)
  config.lora.rank = 2
  config.lora.targets = "query,q_proj"
  with pytest.raises(InputError, match=r"config\.lora\.targets: 'q_proj', expected some of query, key"):
    training_program.train(config, tmp_path)
  config.lora.targets = "query"
  config.rollout.max_response_length = 64
  with pytest.raises(InputError, match=r"94 tokens, expected at most the model's context of 64"):
    training_program.train(config, tmp_path)
