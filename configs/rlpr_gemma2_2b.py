"""RLPR on Gemma 2 2B as the paper runs it: no <think> tags, a lower temperature, a stricter filter, smaller batches.

python -m rlpr_jax.train --config=configs/rlpr_gemma2_2b.py --workdir=DIR --config.data.path=rlpr_train.parquet
"""

from rlpr_jax.config import default


def get_config():
  c = default()
  c.prompts_per_step = 256
  c.model.path = "google/gemma-2-2b-it"
  c.model.compute_dtype = "bfloat16"
  c.data.path = "rlpr_train.parquet"
  c.data.template = "answer_only"
  c.data.prompt_limit = 1024
  c.rollout.temperature = 0.6
  c.rollout.prompts_per_draw = 256
  c.filter.scale = 1.0
  c.reward.empty_answer, c.training.credit = "allowed", "response"  # as published
  c.evaluation.temperature = 0.6
  c.evaluation.top_p = 0.95
  return c
