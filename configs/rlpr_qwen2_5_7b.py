"""RLPR on Qwen2.5-7B as the paper runs it: every value that is not written here is the paper's already.

    python -m rlpr_jax.train --config=configs/rlpr_qwen2_5_7b.py:v5p:4x4x4 --workdir=/mnt/rlpr_jax/qwen \
      --config.data.path=rlpr_train.parquet

The base model, not the instruct one; the questions of openbmb/RLPR-Train-Dataset hold the R1 instruction themselves.
After the recipe stands what it is to run on, one of SLICES; for other devices nothing, and --config.mesh and the rows
of --config.rollout and --config.training by hand.
"""

from rlpr_jax.config import SliceSettings, default, set_slice

# What rlpr_jax.plan chose (docs/planning.md): none of them was run.
SLICES = {
  "v5e:16x16": SliceSettings(tensor=4, micro_batch_rows=64, slots=2560, prefill_prompts=256, score_rows=256, data=4),
  "v5p:2x4x4": SliceSettings(tensor=4, micro_batch_rows=8, slots=960, prefill_prompts=32, score_rows=32),
  "v5p:4x4x4": SliceSettings(tensor=4, micro_batch_rows=16, slots=1408, prefill_prompts=64, score_rows=64),
  "v6e:8x8": SliceSettings(tensor=4, micro_batch_rows=16, slots=1280, prefill_prompts=64, score_rows=64),
  "v6e:16x16": SliceSettings(tensor=4, micro_batch_rows=64, slots=2560, prefill_prompts=256, score_rows=256, data=4),
  "h100:8": SliceSettings(tensor=4, micro_batch_rows=2, slots=528, prefill_prompts=8, score_rows=16),
  "h100:4x8": SliceSettings(tensor=1, micro_batch_rows=128, slots=1792, prefill_prompts=32, score_rows=32),
  "h200:8": SliceSettings(tensor=4, micro_batch_rows=2, slots=560, prefill_prompts=8, score_rows=16),
  "h200:4x8": SliceSettings(tensor=1, micro_batch_rows=128, slots=1792, prefill_prompts=32, score_rows=32),
}


def get_config(slice_name=""):
  c = default()
  c.model.path = "Qwen/Qwen2.5-7B"
  c.model.compute_dtype = "bfloat16"
  c.data.path = "rlpr_train.parquet"
  c.reward.empty_answer, c.training.credit = "allowed", "response"  # as published
  set_slice(c, SLICES, slice_name)
  return c
