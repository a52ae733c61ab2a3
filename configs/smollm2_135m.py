"""A real pretrained model on real questions: SmolLM2-135M-Instruct, five RLPR steps on two CPU cores.

    make smollm2            # makes the model's directory, once
    python -m rlpr_jax.train --config=configs/smollm2_135m.py --workdir=runs/smollm2 \
      --config.data.path=QUESTIONS.parquet

The questions are yours: the RLPR training file's columns, or question and answer in parquet, JSONL or CSV. The model
never saw the tags, and at this size worked examples in the prompt do not bring it to use them; a few supervised steps
on the built-in demonstrations do. Raise `steps` to train for real.
"""

from rlpr_jax.config import default


def get_config():
  c = default()
  c.steps = 5
  c.prompts_per_step = 8
  c.samples_per_prompt = 4
  c.max_draws = 2
  c.model.path = ".cache/smollm2-135m-instruct"
  c.data.path = "questions.parquet"
  c.data.prompt_limit = 256
  c.data.max_reference_length = 48
  c.rollout.max_response_length = 128
  c.rollout.prompts_per_draw = 8
  c.rollout.slots = 32
  c.rollout.decode_steps = 8
  c.rollout.prefill_prompts = 4
  c.rollout.score_rows = 8
  c.training.micro_batch_rows = 4
  c.training.learning_rate = 1e-5
  c.warm_start.steps = 16
  c.warm_start.batch_size = 8
  c.warm_start.optimizer = "adam"
  c.warm_start.adam_learning_rate = 2e-4
  c.log.checkpoint_every = 1
  return c
