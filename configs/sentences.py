"""The quickstart's policy on questions whose answers are sentences: which reward tells right from wrong there?

A reference is one of dozens of right wordings, drawn at random. A few of its tokens (a name, a number, a unit) say what
the answer is, the others how it is said. Held-out accuracy counts what an answer says, in whatever words.
"""

from rlpr_jax.config import default


def get_config():
  c = default()
  c.steps = 40
  c.prompts_per_step = 64
  c.data.domains = "sentences"
  c.data.instruction = ""
  c.data.prompt_limit = 24
  c.data.max_reference_length = 24
  c.rollout.max_response_length = 56
  c.rollout.prompts_per_draw = 64
  c.rollout.slots = 256
  c.rollout.decode_steps = 8
  c.rollout.prefill_prompts = 32
  c.rollout.score_rows = 64
  c.reward.verifier = "builtin"  # only looks on: the AUC of the reward in the metrics
  c.reward.shadow = (
    "geometric_mean: aggregate=geometric_mean",
    "product: aggregate=product",
    "no_debiasing: baseline_policy=none",
  )
  c.training.row_length = 896
  c.training.learning_rate = 3e-4
  c.warm_start.steps = 1000
  c.evaluation.prompts = 300
  c.evaluation.every = 10
  c.log.checkpoint_every = 20
  return c
