"""Word problems with answers such as "8 paintings": does a real model of half a billion parameters learn from them?

    python -m rlpr_jax.train --config=configs/word_problems.py --workdir=runs/word_problems \
      --config.model.path=MODEL --config.data.path=ROWS.jsonl:train --config.evaluation.path=ROWS.jsonl:test

MODEL is Qwen2.5-0.5B-Instruct, or another of that size; rows have a question and an answer, ASDiv's for instance.
Sixteen supervised steps on examples with other numbers, names and things (configs/word_problems.jsonl, made from
templates) bring the model to the tags; then rank-16 adapters learn by RLPR. Every step is saved, so that a run of many
hours on a small machine goes on where it was stopped.
"""

import pathlib

from rlpr_jax.config import default


def get_config():
  c = default()
  c.steps = 100
  c.prompts_per_step = 16
  c.samples_per_prompt = 8
  c.max_draws = 2
  c.model.path = "Qwen/Qwen2.5-0.5B-Instruct"
  c.lora.rank = 16
  c.data.path = "word_problems.jsonl:train"
  c.data.prompt_limit = 256
  c.data.max_reference_length = 24
  c.rollout.max_response_length = 96
  c.rollout.prompts_per_draw = 16
  c.rollout.slots = 64
  c.rollout.decode_steps = 8
  c.rollout.prefill_prompts = 8
  c.rollout.score_rows = 16
  c.reward.baseline_when = "first_draw"  # the first step comes at once, and what is never drawn costs nothing
  c.training.minibatches = 1
  c.training.micro_batch_rows = 1
  c.training.learning_rate = 3e-5  # at 2e-4 steps of 64 responses moved the policy so far that it lost what it could
  c.warm_start.path = str(pathlib.Path(__file__).with_name("word_problems.jsonl"))
  c.warm_start.steps = 16
  c.warm_start.batch_size = 12
  c.warm_start.optimizer = "adam"
  c.warm_start.adam_learning_rate = 2e-4
  c.evaluation.path = "word_problems.jsonl:test"
  c.evaluation.verifier = "inferred"
  c.evaluation.prompts = 200
  c.log.checkpoint_every = 1
  return c
