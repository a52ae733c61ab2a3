"""A real pretrained model on real questions: SmolLM2-135M-Instruct, five RLPR steps on two CPU cores.

    make smollm2            # fetches the model, once
    python -m rlpr_jax.train --config=configs/smollm2_135m.py --workdir=runs/smollm2 \
      --config.data.path=QUESTIONS.parquet

The questions are yours: the RLPR training file's columns, or question and answer in parquet, JSONL or CSV. The model
does not know the tags, so two worked examples stand before each question; raise `steps` to train for real.
"""

from rlpr_jax.config import default

EXAMPLES = (
  (
    "A train covers 120 km in 2 hours. What is its average speed?",
    "<think> Speed is distance over time: 120 km / 2 h = 60 km/h. </think> <answer> 60 km/h </answer>",
  ),
  (
    "Which gas do plants take in for photosynthesis?",
    "<think> Plants build sugar from water and carbon dioxide. </think> <answer> carbon dioxide </answer>",
  ),
)


def get_config():
  c = default()
  c.steps = 5
  c.prompts_per_step = 8
  c.samples_per_prompt = 4
  c.max_draws = 2
  c.model.path = ".cache/smollm2-135m-instruct"
  c.data.path = "questions.parquet"
  c.data.instruction = "Think inside <think> </think>, then give the final answer inside <answer> </answer>."
  c.data.examples = EXAMPLES
  c.data.prompt_limit = 320
  c.data.max_reference_length = 48
  c.rollout.max_response_length = 128
  c.rollout.prompts_per_draw = 8
  c.training.micro_batch_rows = 4
  c.training.learning_rate = 1e-5
  c.log.checkpoint_every = 1
  return c
