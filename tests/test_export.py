"""What comes out of a run: Hugging Face directories of its checkpoints; and LoRA from the first step to the export."""

import dataclasses
import json
import pathlib

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from transformers import AutoModelForCausalLM, AutoTokenizer

import rlpr_jax
from rlpr_jax import export, huggingface, models
from rlpr_jax import train as training_program
from rlpr_jax.config import default, flatten
from rlpr_jax.data import builtin
from rlpr_jax.errors import InputError, MachineError
from rlpr_jax.policy import load_policy
from rlpr_jax.runs.checkpoints import restore_params
from tests.hub_server import HubServer, reach
from tests.models import cases
from tests.tiny_run import ROOT

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


# --- The hub ---


@pytest.fixture
def hub(monkeypatch, tmp_path):
  with HubServer() as server:
    reach(server, monkeypatch, tmp_path / "cache")
    monkeypatch.setenv("HF_TOKEN", HubServer.TOKEN)
    yield server


def leftovers(workdir) -> set[str]:
  return {path.name for path in workdir.iterdir() if path.name.startswith(".")}


def test_what_is_pushed_is_loaded_back_from_the_hub(full_run, hub, tmp_path):
  hub.models["org/tiny"] = {"model-00001-of-00002.safetensors": b"of a push before", "notes.txt": b"somebody's own"}
  export.export(full_run, None, 1, "float32", adapter=False, push="org/tiny")
  assert {"notes.txt", "README.md", "curve.png", "config.json", "model.safetensors", "tokenizer.json"} <= set(
    hub.models["org/tiny"]
  )
  assert "model-00001-of-00002.safetensors" not in hub.models["org/tiny"]
  export.export(full_run, tmp_path / "out", 2, "float32", adapter=False, push="org/tiny")
  assert [message[:6] for _, message in hub.commits] == ["Step 1", "Step 2"]
  for where in ("org/tiny", str(tmp_path / "out")):
    config, params = huggingface.load_pretrained(where)
    theirs = policy_of(full_run, 2)
    assert config.num_layers == theirs[0].num_layers
    for found, expected in zip(jax.tree.leaves(params), jax.tree.leaves(theirs[1]), strict=True):
      np.testing.assert_array_equal(found, expected)
  tokenizer = AutoTokenizer.from_pretrained(huggingface.resolve("org/tiny"))
  assert tokenizer.encode("1+2") == builtin.tokenizer().encode("1+2")
  assert not leftovers(full_run)


def test_who_may_see_what_is_pushed(full_run, hub, monkeypatch):
  for name, public in (("org/mine", False), ("lab/ours", True)):
    export.export(full_run, None, 2, "bfloat16", adapter=False, push=name, public=public)
  assert hub.private == {"org/mine": True, "lab/ours": False}
  export.export(full_run, None, 2, "float32", adapter=False, push="org/mine", public=True)
  assert hub.private["org/mine"]  # one that is there stays as it is
  monkeypatch.delenv("HF_TOKEN")
  with pytest.raises(InputError, match="org/mine"):
    huggingface.load_pretrained("org/mine")
  huggingface.load_pretrained("lab/ours")
  monkeypatch.setenv("HF_TOKEN", HubServer.TOKEN)
  huggingface.load_pretrained("org/mine")


@pytest.mark.parametrize(
  ("name", "token", "faults", "kind", "expected"),
  [
    ("tiny", HubServer.TOKEN, {}, InputError, "--push: 'tiny', expected org/name"),
    ("org/a/b", HubServer.TOKEN, {}, InputError, "--push: 'org/a/b', expected org/name"),
    ("org/x--y", HubServer.TOKEN, {}, InputError, "--push: 'org/x--y', expected org/name"),
    ("org/x", None, {}, InputError, "--push: org/x: no token, expected one that may write to org in HF_TOKEN"),
    ("org/x", "hf_of_nobody", {}, InputError, "--push: org/x: .*Invalid"),
    ("theirs/x", HubServer.TOKEN, {}, InputError, "--push: theirs/x: .*don't have the rights"),
    ("org/x", HubServer.TOKEN, {"/commit/": 403}, InputError, "--push: org/x: .*403"),
    ("org/x", HubServer.TOKEN, {"whoami": 503}, MachineError, "--push: org/x: .*503"),
    ("org/x", HubServer.TOKEN, {"/commit/": 500}, MachineError, "--push: org/x: .*500"),
  ],
)
def test_what_cannot_be_pushed_is_one_line(full_run, hub, monkeypatch, tmp_path, name, token, faults, kind, expected):
  hub.faults = faults
  monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
  with pytest.raises(kind, match=f"^{expected}") as error:
    export.export(full_run, None, 2, "float32", adapter=False, push=name)
  assert "\n" not in str(error.value)
  assert HubServer.TOKEN not in str(error.value)
  assert not leftovers(full_run)
  assert not hub.commits


def test_a_hub_that_is_gone_and_a_directory_that_is_whole(full_run, hub, tmp_path, capsys, monkeypatch):
  hub.faults = {"/commit/": 403}
  command = ["export", f"--workdir={full_run}", "--push=org/x"]
  with pytest.raises(SystemExit) as refused:
    export.main([*command, f"--out={tmp_path / 'out'}"])
  assert refused.value.code == 2
  said = capsys.readouterr().err
  assert said.count("\n") == 1
  assert said.endswith(f"; {tmp_path / 'out'} itself is whole\n")
  huggingface.load_pretrained(str(tmp_path / "out"))
  monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
  with pytest.raises(SystemExit) as gone:
    export.main([*command, f"--out={tmp_path / 'more'}"])
  assert gone.value.code == 75
  assert capsys.readouterr().err.count("\n") == 1
  assert not (tmp_path / "more").exists()


def test_a_run_that_is_to_push_says_at_once_what_is_missing(base, monkeypatch, tmp_path):
  config = tiny()
  config.export.every, config.export.push = 1, "org/tiny"
  monkeypatch.delenv("HF_TOKEN", raising=False)
  with pytest.raises(InputError, match=r"^config\.export\.push: org/tiny: no token"):
    training_program.train(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_exports_while_a_run_goes_on(base, hub, tmp_path, capsys, monkeypatch):
  monkeypatch.setenv("PYTHONPATH", str(ROOT))
  config = tiny()
  config.model.path = str(base)
  config.export.every, config.export.push, config.export.dtype = 2, "org/tiny", "float32"
  training_program.train(config, tmp_path / "run")
  assert "export of step 2: pushed the policy of step 2 to org/tiny" in capsys.readouterr().out
  for where in ("org/tiny", str(tmp_path / "run/exports/step_000002")):
    params = huggingface.load_pretrained(where)[1]
    for found, expected in zip(
      jax.tree.leaves(params), jax.tree.leaves(policy_of(tmp_path / "run", 2)[1]), strict=True
    ):
      np.testing.assert_array_equal(found, expected)
  capsys.readouterr()  # loading from the hub has shown its own progress
  hub.faults = {"/commit/": 403}
  config.steps = 4
  training_program.train(config, tmp_path / "run")  # goes on, and is done
  printed = capsys.readouterr()
  assert "export of step 4: --push: org/tiny: 403" in printed.err
  assert printed.err.count("\n") == 1
  assert {path.name for path in (tmp_path / "run/exports").iterdir()} == {"step_000004", "export.log"}
  assert len(hub.commits) == 1


# --- The card ---

SUMMARY = {
  "models": {
    "policy": {
      "math500": {
        "sampled": {
          "questions": 200, "samples": 4, "rule": {"avg": 0.5, "low": 0.45, "high": 0.55}, "cut_off": 0.01,
          "refused": 0, "tokens": 120.0, "found_by": {}, "categories": {},
        }
      }
    }
  },
  "averages": {"policy": {"sampled": {"benchmarks": 1, "rule": 0.5, "judge": None}}},
  "differences": [
    {"model": "policy", "base": "start", "benchmark": "math500", "mode": "sampled", "difference": 0.1, "low": 0.02,
     "high": 0.18, "p": 0.01}
  ],
}  # fmt: skip


def test_a_card_says_what_was_run(full_run, base, tmp_path):
  (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
  export.export(full_run, tmp_path / "out", 2, "float32", adapter=False, evaluation=tmp_path / "summary.json")
  card = huggingface_hub.ModelCard.load(tmp_path / "out/README.md")
  assert card.data.library_name == "transformers"
  assert card.data.base_model is None  # a directory is no name on the hub
  assert "| base model | `base` |" in card.text
  assert "reward | kind random" in card.text
  assert "50.0% [45.0, 55.0]" in card.text
  assert "+10.0 [+2.0, +18.0]" in card.text
  assert f"rlpr_jax {rlpr_jax.__version__}" in card.text
  assert str(base.parent) not in card.text  # where it was on this machine
  rows = [json.loads(line) for line in (full_run / "metrics.jsonl").read_text().splitlines()]
  assert f"| 2 | {rows[-1]['reward/total']:.4g} |" in card.text
  assert (tmp_path / "out/curve.png").read_bytes().startswith(b"\x89PNG")
  scope: dict = {}
  exec(card.text.partition("```python\n")[2].partition("```")[0], scope)  # the recipe
  ran, found = (flatten(config) for config in (export.read_config(full_run), scope["get_config"]()))
  differing = {name for name in ran if ran[name] != found[name]}
  assert differing == {"model.path", "compilation_cache"}
  assert found["model.path"] == "base"


@pytest.mark.parametrize("content", ["[]", "{}", "not JSON", '{"models": {"policy": 3}}'])
def test_no_summary_of_an_evaluation_is_one_line(full_run, tmp_path, content):
  (tmp_path / "summary.json").write_text(content)
  with pytest.raises(InputError, match=r"^--evaluation: .*summary\.json: expected the summary\.json of rlpr evaluate"):
    export.export(full_run, tmp_path / "out", 2, "float32", adapter=False, evaluation=tmp_path / "summary.json")
  assert not (tmp_path / "out").exists()
