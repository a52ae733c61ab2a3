"""RLPR on Llama 3.1 8B as the paper runs it: no <think> tags, a lower temperature, a stricter filter, smaller batches.

    python -m rlpr_jax.train --config=configs/rlpr_llama3_1_8b.py:v5p:2x4x4 --workdir=DIR \
      --config.data.path=rlpr_train.parquet

After the recipe stands what it is to run on, one of SLICES; for other devices nothing, as in rlpr_qwen2_5_7b.py.
"""

from rlpr_jax.config import SliceSettings, default, set_slice

# What rlpr_jax.plan chose (docs/planning.md): none of them was run.
SLICES = {
  "v5p:2x4x4": SliceSettings(tensor=4, micro_batch_rows=8, slots=384, prefill_prompts=32, score_rows=32),
}


def get_config(slice_name=""):
  c = default()
  c.prompts_per_step = 256
  c.model.path = "meta-llama/Llama-3.1-8B-Instruct"
  c.model.compute_dtype = "bfloat16"
  c.data.path = "rlpr_train.parquet"
  c.data.template = "answer_only"
  c.data.prompt_limit = 2048
  c.rollout.temperature = 0.6
  c.rollout.prompts_per_draw = 256
  c.filter.scale = 0.9
  c.evaluation.temperature = 0.6
  c.evaluation.top_p = 0.95
  c.reward.empty_answer, c.training.credit = "allowed", "response"  # as published
  set_slice(c, SLICES, slice_name)
  return c
