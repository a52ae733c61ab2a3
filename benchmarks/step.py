"""Whole training steps of SmolLM2-135M-Instruct on the CPU: RLPR by rlpr_jax beside GRPO by TRL, on the same questions.

    make smollm2
    make peers
    PYTHONPATH=. .venv/bin/python -m benchmarks.step --trl=.cache/trl --groups=8 --samples=4

Both sample --samples responses to each of --groups prompts at temperature 1, up to --limit tokens, and take one AdamW
step on all of them: float32, all parameters, no KL term. TRL has no reward of this kind: its own is a number drawn at
random, which costs nothing, while ours scores each reference with and without the reasoning. TRL trains --trl_batch
responses at once, without gradient checkpointing. Every run is a process of its own, the contenders taking turns; the
first --warmup steps, in which programs are compiled, do not count. The last line has the ratio of sampled and trained
tokens a second.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags

from benchmarks.common import MODEL, REPEATS, run, spread
from rlpr_jax import config as configs
from rlpr_jax.data import builtin

CONTENDERS = ("rlpr_jax", "trl")
_GROUPS = flags.DEFINE_integer("groups", 8, "prompts of a step", lower_bound=1)
_SAMPLES = flags.DEFINE_integer("samples", 4, "responses to each", lower_bound=2)
_LIMIT = flags.DEFINE_integer("limit", 128, "most tokens of a response", lower_bound=8)
_STEPS = flags.DEFINE_integer("steps", 3, "steps of a run that count", lower_bound=1)
_WARMUP = flags.DEFINE_integer("warmup", 2, "steps before them", lower_bound=1)
_TRL = flags.DEFINE_string("trl", None, "directory where pip installed trl and accelerate, if not beside torch")
_TRL_BATCH = flags.DEFINE_integer("trl_batch", 8, "responses whose gradients TRL takes at once", lower_bound=1)
_RUN = flags.DEFINE_enum("run", None, CONTENDERS, "only for the program itself: one run, in this process")


class Step(NamedTuple):
  """What a step took and did."""

  tokens: float  # sampled and trained
  seconds: float


def recipe(questions: pathlib.Path) -> configs.ConfigDict:
  """Our side. Rows as long as some groups, so that a micro-batch is about as many tokens as TRL's."""
  c = configs.default()
  c.steps, c.prompts_per_step, c.samples_per_prompt, c.max_draws = (
    _WARMUP.value + _STEPS.value,
    _GROUPS.value,
    _SAMPLES.value,
    1,
  )
  c.model.path, c.data.path = MODEL.value, str(questions)
  c.data.prompt_limit, c.data.max_reference_length, c.rollout.max_response_length = 256, 48, _LIMIT.value
  c.rollout.prompts_per_draw, c.rollout.slots, c.rollout.decode_steps = _GROUPS.value, _GROUPS.value * _SAMPLES.value, 8
  c.rollout.prefill_prompts, c.rollout.score_rows = 4, 8
  c.filter.kind, c.training.minibatches, c.training.row_length = "off", 1, 1024
  c.reward.baseline_when = "first_draw"  # so that steps pay for it
  c.evaluation.prompts, c.log.checkpoint_every = 0, 10**6
  return c


def write_questions(path: pathlib.Path) -> None:
  """Questions in sentences of the built-in set, as a user's file."""
  examples = builtin.examples("train", 256, domains="sentences")
  rows = ({"question": example.messages[0]["content"], "answer": example.reference} for example in examples)
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def with_rlpr_jax(directory: pathlib.Path, config: configs.ConfigDict) -> list[Step]:
  """A run of the program, by the metrics that it writes."""
  from rlpr_jax import train

  train.train(config, directory)
  rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
  return [
    Step(row["tokens_per_second/update"] * row["seconds/update"], row["seconds/step"]) for row in rows if row["step"]
  ]


def with_trl(directory: pathlib.Path, config: configs.ConfigDict) -> list[Step]:
  """A run of its trainer on the prompts as our side renders them."""
  if _TRL.value:
    sys.path.insert(0, _TRL.value)
  import torch
  from datasets import Dataset
  from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
  from trl import GRPOConfig, GRPOTrainer

  from rlpr_jax.training.run import load_prompts

  tokenizer = AutoTokenizer.from_pretrained(MODEL.value)
  prompts, _ = load_prompts(config, config.data, tokenizer, "train", count=0)
  rows = Dataset.from_list([{"prompt": tokenizer.decode(prompt.ids)} for prompt in prompts])
  ends = []

  class Clock(TrainerCallback):
    def on_step_end(self, *_: Any, **__: Any) -> None:
      ends.append(time.perf_counter())

  rng, count = np.random.default_rng(0), _GROUPS.value * _SAMPLES.value
  trainer = GRPOTrainer(
    model=AutoModelForCausalLM.from_pretrained(MODEL.value, dtype=torch.float32),
    processing_class=tokenizer,
    reward_funcs=lambda completions, **_: rng.random(len(completions)).tolist(),
    args=GRPOConfig(
      output_dir=str(directory),
      per_device_train_batch_size=_TRL_BATCH.value,
      gradient_accumulation_steps=count // _TRL_BATCH.value,
      num_generations=_SAMPLES.value,
      max_completion_length=_LIMIT.value,
      max_steps=_WARMUP.value + _STEPS.value,
      beta=0.0,
      learning_rate=1e-6,
      temperature=1.0,
      gradient_checkpointing=False,
      use_cpu=True,
      bf16=False,
      logging_steps=1,
      save_strategy="no",
      report_to=[],
    ),
    train_dataset=rows,
    callbacks=[Clock()],
  )
  begun = time.perf_counter()
  trainer.train()
  lengths = [row["completions/mean_length"] for row in trainer.state.log_history if "completions/mean_length" in row]
  return [Step(count * length, seconds) for length, seconds in zip(lengths, np.diff([begun, *ends]), strict=True)]


def main(argv: list[str]) -> None:
  if _GROUPS.value * _SAMPLES.value % _TRL_BATCH.value:
    raise app.UsageError(f"--trl_batch={_TRL_BATCH.value} does not divide {_GROUPS.value * _SAMPLES.value} responses")
  if _RUN.value:
    with tempfile.TemporaryDirectory() as name:
      questions = pathlib.Path(name, "questions.jsonl")
      write_questions(questions)
      contender = {"rlpr_jax": with_rlpr_jax, "trl": with_trl}[_RUN.value]
      print("\n" + json.dumps(contender(pathlib.Path(name, "run"), recipe(questions))))
    return
  found: dict[str, list[Step]] = {name: [] for name in CONTENDERS}
  for _ in range(REPEATS.value):
    for name in CONTENDERS:
      command = [sys.executable, "-m", "benchmarks.step", *sys.argv[1:], f"--run={name}"]
      done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
      if done.returncode:
        raise SystemExit(f"{name}: status {done.returncode}")
      steps = [Step(*step) for step in json.loads(done.stdout.splitlines()[-1])][_WARMUP.value :]
      found[name] += steps
      print(f"{name}: " + ", ".join(f"{tokens:.0f} tokens in {seconds:.1f} s" for tokens, seconds in steps), flush=True)
  rates = {name: [step.tokens / step.seconds for step in steps] for name, steps in found.items()}
  for name, steps in found.items():
    each = np.mean([step.tokens for step in steps]) / (_GROUPS.value * _SAMPLES.value)
    print(f"{name}: {spread(rates[name])} tokens/s, responses of {each:.0f} tokens")
  print(f"{_GROUPS.value} x {_SAMPLES.value}: ratio {np.median(rates['rlpr_jax']) / np.median(rates['trl']):.2f}")


if __name__ == "__main__":
  run(main)
