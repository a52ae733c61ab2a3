"""The paper's seven benchmarks with its k, prompts and limits; the default of `python -m rlpr_jax.evaluate`.

    python -m rlpr_jax.evaluate --workdir=DIR --config.models.policy.path=RUN_OR_MODEL \
      --config.judge.url=http://127.0.0.1:8001/v1 --config.judge.model=Qwen/Qwen2.5-7B-Instruct

Rows come from the Hugging Face hub, or from files: `--config.benchmarks.math500.path=FILE`.
"""

from rlpr_jax.evaluation.config import benchmark, default, model


def get_config():
  c = default()
  c.models.policy = model(path="", dtype="bfloat16", slots=256)
  for name in ("math500", "aime24", "mmlu_pro", "gpqa_diamond", "theoremqa", "minerva", "webinstruct"):
    c.benchmarks[name] = benchmark()
  c.benchmarks.mmlu_pro.limit = 1000
  return c
