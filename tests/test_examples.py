"""The examples say what they promise."""

import json
import os
import pathlib
import re
import runpy
import subprocess
import sys
import types
from typing import NamedTuple

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlpr_jax import export
from rlpr_jax import train as training_program
from rlpr_jax.data import builtin
from rlpr_jax.errors import InputError
from tests.tiny_run import rows, tiny

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
QUESTIONS = builtin.examples("train", 20)


def test_the_mathematics_work_outside_the_trainer():
  done = subprocess.run(
    [sys.executable, str(EXAMPLES / "in_another_trainer.py")], capture_output=True, text=True, check=True
  )
  numbers = [float(number) for number in re.findall(r"-?\d+\.\d*", done.stdout)]
  # 0.9 * (mean p - r') + 0.1 * format: (0.85, 0.6, 0.15) - 0.25, the last below 0; then 0.5 - 0.4. The last of
  # each group has no tags.
  expected = np.array([[0.64, 0.415, 0.0], [0.19, 0.19, 0.09]])
  np.testing.assert_allclose(numbers[:6], expected.ravel(), atol=1e-3)
  advantages = (expected - expected.mean(axis=1, keepdims=True)) / expected.std(axis=1, ddof=1, keepdims=True)
  np.testing.assert_allclose(numbers[6:], advantages.ravel(), atol=1e-3)
  assert "[ True  True]" in done.stdout


@pytest.mark.slow
def test_the_reward_in_trl_is_that_of_our_own_trainer(tmp_path, monkeypatch):
  """Of the responses of a run of ours, scored again as TRL would have them scored."""
  found = trained_and_exported(tmp_path)
  expected = [row["reward_total"] - row["reward_repetition"] for row in found]
  assert np.std(expected) > 0.01
  np.testing.assert_allclose(in_trl(tmp_path / "model", found, monkeypatch).rewards, expected, atol=1e-4)


def trained_and_exported(directory):
  """The rollouts of one step of ours; the policy that wrote them is `model` of the directory."""
  config, workdir = tiny(), directory / "run"
  config.steps, config.log.rollouts = 1, 10**6
  training_program.train(config, workdir)
  export.export(workdir, directory / "model", 0, "float32", adapter=False)
  return [json.loads(line) for line in (workdir / "rollouts/step_000001.jsonl").read_text().splitlines()]


class InTRL(NamedTuple):
  """What examples/in_trl.py gives rollouts, and what it is asked."""

  prompts: list[str]
  answers: list[str]
  rewards: list[float]


def in_trl(directory, found, monkeypatch) -> InTRL:
  """By a model of Hugging Face; TRL itself is not needed."""
  torch = pytest.importorskip("torch")
  trl = types.ModuleType("trl")
  trl.GRPOConfig = trl.GRPOTrainer = None
  monkeypatch.setitem(sys.modules, "trl", trl)
  example = runpy.run_path(str(EXAMPLES / "in_trl.py"))
  tokenizer = AutoTokenizer.from_pretrained(directory)
  reward = example["reward_function"](AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), tokenizer)
  chats = [[{"role": "user", "content": row["question"]}] for row in found]
  prompts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
  ids = [tokenizer(row["response"], add_special_tokens=False)["input_ids"] for row in found]
  answers = [row["reference"] for row in found]
  return InTRL(prompts, answers, reward(prompts, completion_ids=ids, answer=answers))


@pytest.mark.slow
def test_tunix_trains_by_it_and_it_is_that_of_trl(tmp_path, monkeypatch):
  """Of the responses of a run of ours, scored by tunix's model and by torch's; then two steps of tunix's own.

  tunix computes any Qwen3 with a theta of its own, so that the model is another one than the run's.
  """
  where = ROOT / ".cache/tunix"
  if not (where / "tunix").is_dir():
    pytest.skip("no tunix: run make peers")
  found = trained_and_exported(tmp_path)
  settings = json.loads((tmp_path / "model/config.json").read_text())
  (tmp_path / "model/config.json").write_text(json.dumps(settings | {"rope_theta": 1e6}))
  expected = in_trl(tmp_path / "model", found, monkeypatch)
  assert np.std(expected.rewards) > 0.01
  rows = [{"question": example.messages[0]["content"], "answer": example.reference} for example in QUESTIONS]
  (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  (tmp_path / "asked.json").write_text(
    json.dumps([expected.prompts, [row["response"] for row in found], expected.answers])
  )
  done = subprocess.run(
    [
      sys.executable, "-c", IN_TUNIX, str(EXAMPLES), str(tmp_path / "asked.json"), f"--model={tmp_path / 'model'}",
      f"--questions={tmp_path / 'questions.jsonl'}", "--steps=2", "--prompts=2", "--samples=4", "--prompt_length=64",
      "--length=32",
    ],
    capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": f"{ROOT}:{where}"},
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-2000:]
  scores, steps = json.loads(done.stdout.splitlines()[-1])
  np.testing.assert_allclose(scores, expected.rewards, atol=1e-4)
  assert steps == 2


# Scores what it is asked before the first step, by the model as it was read, and then trains.
IN_TUNIX = """
import json, pathlib, runpy, sys
directory, asked, *arguments = sys.argv[1:]
example = runpy.run_path(str(pathlib.Path(directory) / "in_tunix.py"))
scores, own = [], example["reward_function"]

def reward_function(*arguments):
  reward = own(*arguments)
  prompts, completions, answer = json.loads(pathlib.Path(asked).read_text())
  scores.extend(reward(prompts, completions, answer))
  return reward

example["main"].__globals__["reward_function"] = reward_function
learner = example["main"](arguments)
print(json.dumps([scores, learner.rl_cluster.global_steps]))
"""


@pytest.mark.slow
def test_verl_rewards_by_it_and_it_is_that_of_trl(tmp_path, monkeypatch):
  """Of the responses of a run of ours, by verl's own worker of rewards, which asks our server, and by torch."""
  where = ROOT / ".cache/verl"
  if not (where / "verl").is_dir():
    pytest.skip("no verl: run make peers")
  found = trained_and_exported(tmp_path)
  expected = in_trl(tmp_path / "model", found, monkeypatch)
  assert np.std(expected.rewards) > 0.01
  tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
  prompts, responses = (
    tokenizer(texts, add_special_tokens=False)["input_ids"]
    for texts in (expected.prompts, [row["response"] for row in found])
  )
  (tmp_path / "asked.json").write_text(json.dumps([prompts, responses, expected.answers]))
  serving = [
    sys.executable, "-m", "rlpr_jax.serve", f"--model={tmp_path / 'model'}", "--port=0", "--prompt_limit=128",
    "--response_limit=8", "--slots=8",
  ]  # fmt: skip
  with subprocess.Popen(serving, stdout=subprocess.PIPE, text=True) as server:
    try:
      url = next(line for line in server.stdout if line.startswith("serving ")).split()[-1]
      address = url.removeprefix("http://").removesuffix("/v1")
      arguments = [str(EXAMPLES / "in_verl.py"), str(tmp_path / "model"), address, str(tmp_path / "asked.json")]
      environment = os.environ | {"PYTHONPATH": f"{ROOT}:{where}"}
      done = subprocess.run(
        [sys.executable, "-c", IN_VERL, *arguments], capture_output=True, text=True, check=False, env=environment
      )
    finally:
      server.terminate()
  assert done.returncode == 0, done.stderr[-2000:]
  scores, nowhere = json.loads(done.stdout.splitlines()[-1])
  np.testing.assert_allclose(scores, expected.rewards, atol=1e-4)
  assert nowhere.startswith("no server: expected reward.reward_model.enable or ")


# verl's own config, worker and batch: prompts are padded in front, responses behind.
IN_VERL = """
import asyncio, json, pathlib, sys
import hydra, numpy as np, torch, verl
from verl import DataProto
from verl.experimental.reward_loop.reward_loop import RewardLoopWorker
example, model, address, asked = sys.argv[1:]
prompts, responses, answers = json.loads(pathlib.Path(asked).read_text())
settings = [
  f"actor_rollout_ref.model.path={model}",
  "reward.reward_manager.source=importlib",
  "reward.reward_manager.name=ReferenceRewardManager",
  f"reward.reward_manager.module.path={example}",
  f"reward.custom_reward_function.path={example}",
  "reward.custom_reward_function.name=log_probabilities",
]
named = f"+reward.custom_reward_function.reward_kwargs.address='{address}'"
with hydra.initialize_config_dir(str(pathlib.Path(verl.__file__).parent / "trainer/config"), version_base=None):
  config, own = (hydra.compose("ppo_trainer", settings + more) for more in ([], [named]))

def padded(rows, side):
  tokens, ones = [torch.tensor(row) for row in rows], [torch.ones(len(row), dtype=int) for row in rows]
  pad = torch.nn.utils.rnn.pad_sequence
  return (pad(rows, batch_first=True, padding_side=side) for rows in (tokens, ones))

before, seen = padded(prompts, "left")
after, written = padded(responses, "right")
data = DataProto.from_dict(
  {"prompts": before, "responses": after, "attention_mask": torch.cat([seen, written], dim=1)},
  non_tensors={
    "data_source": np.array(["own"] * len(answers), object),
    "reward_model": np.array([{"style": "rule", "ground_truth": answer} for answer in answers], object),
  },
)

async def scores(config, address):
  found = await RewardLoopWorker(config, address).compute_score_batch(data)
  return [row["reward_score"] for row in found]

def run(config, address):
  return asyncio.get_event_loop().run_until_complete(scores(config, address))

asyncio.set_event_loop(asyncio.new_event_loop())
served = run(config, address)
assert run(own, "127.0.0.1:1") == served
try:
  run(config, None)
except ValueError as error:
  print(json.dumps([served, str(error)]))
"""


@pytest.mark.slow
def test_trl_trains_by_it(tmp_path):
  where = ROOT / ".cache/trl"
  if not (where / "trl").is_dir():
    pytest.skip("no TRL: run make peers")
  config = tiny()
  config.steps = 1
  training_program.train(config, tmp_path / "run")
  export.export(tmp_path / "run", tmp_path / "model", 1, "float32", adapter=False)
  rows = [{"question": example.messages[0]["content"], "answer": example.reference} for example in QUESTIONS]
  (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  arguments = [f"--model={tmp_path / 'model'}", f"--questions={tmp_path / 'questions.jsonl'}", f"--out={tmp_path}"]
  done = subprocess.run(
    [sys.executable, str(EXAMPLES / "in_trl.py"), *arguments, "--steps=2", "--samples=4", "--length=32"],
    capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": f"{ROOT}:{where}"},
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-2000:]
  assert len(re.findall(r"'rewards/reward/mean'", done.stdout)) == 2


@pytest.mark.slow
def test_the_whole_method_in_one_file():
  path = EXAMPLES / "minimal_rlpr.py"
  assert len(path.read_text().splitlines()) <= 300
  done = subprocess.run(
    [sys.executable, str(path), "--steps=1", "--warm_start=4"], capture_output=True, text=True, check=True
  )
  assert re.search(r"^held-out accuracy before RLPR: \d+\.\d%$", done.stdout, re.MULTILINE)
  # The ratio of the trainer's probability to the sampler's, after three small steps.
  step = re.search(r"^step 1/1  reward -?0\.\d+  kept 64/64  ratio (\d\.\d+)$", done.stdout, re.MULTILINE)
  assert abs(float(step[1]) - 1) < 0.02


@pytest.mark.slow
def test_a_custom_reward_is_what_is_trained_on(tmp_path):
  brevity = runpy.run_path(str(EXAMPLES / "custom_reward.py"))["brevity"]
  config = tiny()
  config.steps, config.warm_start.steps, config.evaluation.prompts = 1, 20, 0
  seen = []

  def recorded(evidence, texts, prompts):
    assert len(texts) == evidence.logps.shape[0] * evidence.logps.shape[1]
    assert len(prompts) == evidence.logps.shape[0]
    seen.append(brevity(evidence, texts, prompts))
    return seen[-1]

  training_program.train(config, tmp_path, recorded)
  assert json.loads((tmp_path / "config.json").read_text())["reward"]["custom"].endswith("recorded")
  with pytest.raises(InputError, match=r"another run: config\.reward\.custom is '.*recorded' there, '.*brevity'"):
    training_program.train(config, tmp_path, brevity)
  np.testing.assert_allclose(rows(tmp_path)[-1]["reward/total"], np.mean(seen), rtol=1e-5)


@pytest.mark.slow
def test_a_custom_reward_on_the_command_line(tmp_path):
  file = EXAMPLES / "custom_reward.py"
  arguments = [
    f"--workdir={tmp_path}", f"--config.reward.custom={file}:brevity", "--config.steps=1",
    "--config.warm_start.steps=2", "--config.evaluation.prompts=0", "--config.data.count=64",
  ]  # fmt: skip
  training_program.main(["train", "--config=quickstart", *arguments])
  assert json.loads((tmp_path / "config.json").read_text())["reward"]["custom"] == f"{file}:brevity"
  written = [json.loads(line) for line in next((tmp_path / "rollouts").iterdir()).read_text().splitlines()]
  for row in written:
    mean = float(np.mean(row["reference_probs"])) if row["reference_probs"] else 0.0
    assert row["reward_total"] == pytest.approx(mean - 0.001 * len(row["response"]), abs=1e-4)
