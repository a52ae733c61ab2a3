"""RLPR on a machine that people have: one accelerator or a host of them, and a published model that fits on it.

    rlpr train --config=configs/own_machine.py:v5e:2x4/qwen2.5-1.5b --workdir=DIR --config.data.path=QUESTIONS.jsonl

Behind the recipe's name stand the devices, a slash and the model, one of SETTINGS; docs/planning.md has what each takes
by rlpr_jax.plan. All parameters are trained, or adapters of rank 32 beside a frozen base. Sixteen supervised steps on
built-in demonstrations bring an instruct model to the tags. Questions that ask for long reasoning take a larger
`config.rollout.max_response_length`.
"""

from typing import NamedTuple

from rlpr_jax.config import default, setting_of

MODELS = {
  "gemma-3-270m": "google/gemma-3-270m-it",
  "gemma-3-1b": "google/gemma-3-1b-it",
  "gemma-2-2b": "google/gemma-2-2b-it",
  "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
  "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B-Instruct",
  "qwen2.5-3b": "Qwen/Qwen2.5-3B-Instruct",
  "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
  "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
}


class Settings(NamedTuple):
  """Rows of all devices together, and whether all parameters are trained or adapters alone."""

  slots: int
  micro_batch_rows: int
  full: bool = True
  remat: str = "dots"
  dtype: str = "bfloat16"
  tensor: int = 1  # devices that share each layer's weights, also while they sample


# As rlpr_jax.plan has them (docs/planning.md); none was run.
SETTINGS = {
  "v5e:1x1/qwen2.5-0.5b": Settings(64, 1, full=False),
  "v5e:1x1/gemma-3-270m": Settings(64, 1),
  "v5e:1x1/gemma-3-1b": Settings(64, 1, full=False),
  "v5e:2x4/qwen2.5-1.5b": Settings(256, 8),
  "v5e:2x4/gemma-3-1b": Settings(256, 8),
  "v5e:2x4/gemma-2-2b": Settings(128, 8, remat="full"),
  "v5e:2x4/qwen2.5-7b": Settings(128, 2, full=False, remat="full", tensor=4),
  "v6e:1x1/qwen2.5-0.5b": Settings(128, 1),
  "v6e:1x1/gemma-3-1b": Settings(128, 1, full=False),
  "t4:1/qwen2.5-0.5b": Settings(32, 1, full=False, remat="full", dtype="float32"),
  "t4:2/qwen2.5-1.5b": Settings(64, 2, full=False, remat="full", dtype="float32"),
  "l4:1/qwen2.5-0.5b": Settings(64, 1),
  "l4:1/qwen2.5-1.5b": Settings(64, 1, full=False),
  "l4:2/qwen2.5-1.5b": Settings(128, 2, remat="full"),
  "l4:8/qwen2.5-3b": Settings(256, 8, remat="full"),
  "rtx4090:1/qwen2.5-0.5b": Settings(64, 1),
  "rtx4090:1/qwen2.5-1.5b": Settings(64, 1, full=False),
  "rtx4090:2/qwen2.5-1.5b": Settings(128, 2, remat="full"),
  "rtx4090:8/qwen2.5-3b": Settings(256, 8, remat="full"),
  "a100_40:1/qwen2.5-1.5b": Settings(128, 1),
  "a100_40:1/qwen2.5-7b": Settings(32, 1, full=False, remat="full"),
  "a100_40:2/qwen2.5-3b": Settings(128, 2, remat="full"),
  "a100_40:8/qwen2.5-7b": Settings(256, 8, remat="full"),
  "a100_80:1/qwen2.5-3b": Settings(128, 1, remat="full"),
  "a100_80:1/qwen2.5-7b": Settings(128, 1, full=False),
  "a100_80:2/llama-3.1-8b": Settings(256, 2, full=False),
  "a100_80:8/qwen2.5-7b": Settings(512, 8),
  "h100:1/qwen2.5-3b": Settings(128, 1, remat="full"),
  "h100:1/llama-3.1-8b": Settings(128, 1, full=False),
  "h100:2/llama-3.1-8b": Settings(256, 2, full=False),
  "h100:8/qwen2.5-7b": Settings(512, 8),
}


def get_config(name=""):
  name = name or "v5e:2x4/qwen2.5-1.5b"
  settings = setting_of(SETTINGS, name)
  c = default()
  c.steps = 100
  c.prompts_per_step = 32
  c.samples_per_prompt = 8
  c.max_draws = 4
  c.model.path = MODELS[name.split("/")[1]]
  c.model.compute_dtype = settings.dtype
  c.model.remat = settings.remat
  c.mesh.tensor = settings.tensor
  c.lora.rank = 0 if settings.full else 32
  c.data.path = "questions.jsonl"
  c.data.prompt_limit = 512
  c.data.max_reference_length = 64
  c.rollout.max_response_length = 1024
  c.rollout.prompts_per_draw = 32
  c.rollout.slots = settings.slots
  c.rollout.prefill_prompts = 16
  c.rollout.score_rows = 16
  c.training.minibatches = 1
  c.training.micro_batch_rows = settings.micro_batch_rows
  c.training.learning_rate = 1e-6 if settings.full else 2e-5
  c.warm_start.steps = 16
  c.warm_start.batch_size = 16
  c.warm_start.optimizer = "adam"
  c.warm_start.adam_learning_rate = 1e-5 if settings.full else 2e-4
  c.log.checkpoint_every = 10
  return c
