"""RLPR on Qwen2.5-7B as the paper runs it: every value that is not written here is the paper's already.

    python -m rlpr_jax.train --config=configs/rlpr_qwen2_5_7b.py --workdir=/mnt/rlpr_jax/qwen \
      --config.data.path=rlpr_train.parquet

The base model, not the instruct one; the questions of openbmb/RLPR-Train-Dataset hold the R1 instruction themselves.
"""

from rlpr_jax.config import default


def get_config():
  c = default()
  c.model.path = "Qwen/Qwen2.5-7B"
  c.model.compute_dtype = "bfloat16"
  c.data.path = "rlpr_train.parquet"
  return c
