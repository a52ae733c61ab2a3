"""Minutes on a laptop, nothing to download: a tiny policy learns to reason from reference answers alone.

A warm start on demonstrations, careful and careless ones, gives a policy that answers in the right format and is often
wrong. RLPR then rewards the thoughts that make the reference answer probable. Exact match on held-out questions
measures it before and after; no verifier takes part in training.
"""

from rlpr_jax.config import default


def get_config():
  c = default()
  c.steps = 40
  c.prompts_per_step = 64
  c.data.instruction = ""
  c.data.prompt_limit = 14
  c.data.max_reference_length = 16
  c.rollout.max_response_length = 32
  c.rollout.prompts_per_draw = 64
  c.rollout.slots = 256
  c.rollout.decode_steps = 8
  c.rollout.prefill_prompts = 32
  c.rollout.score_rows = 64
  c.reward.verifier = "builtin"  # only looks on: the AUC of the reward in the metrics
  c.training.row_length = 640
  c.training.learning_rate = 3e-4
  c.warm_start.steps = 800
  c.evaluation.prompts = 400
  c.evaluation.every = 10
  c.log.checkpoint_every = 20
  return c
