"""The quickstart's policy on questions whose answers report several facts: does a reward hear the facts or the wording?

A reference has 34 to 41 tokens and is one of hundreds of right wordings, drawn at random. Names, numbers and units
depend on whether the sums are right; the order of the facts and the voice go as the reasoning went. Held-out accuracy
counts what an answer reports, in whatever words.
"""

from rlpr_jax.config import default


def get_config():
  c = default()
  c.steps = 40
  c.prompts_per_step = 32
  c.data.domains = "facts"
  c.data.instruction = ""
  c.data.prompt_limit = 36
  c.data.max_reference_length = 48
  c.rollout.max_response_length = 88
  c.rollout.prompts_per_draw = 32
  c.rollout.slots = 256
  c.rollout.decode_steps = 8
  c.rollout.prefill_prompts = 32
  c.rollout.score_rows = 64
  c.reward.verifier = "builtin"  # only looks on: the AUC of the reward in the metrics
  c.reward.shadow = (
    "geometric_mean: aggregate=geometric_mean",
    "product: aggregate=product",
    "spread: token_weights=spread",
    "no_debiasing: baseline_policy=none",
  )
  c.training.row_length = 768
  c.training.learning_rate = 3e-4
  c.warm_start.steps = 2400
  c.warm_start.batch_size = 32
  c.evaluation.prompts = 200
  c.evaluation.every = 10
  c.log.checkpoint_every = 20
  return c
