"""Does the own answer drift, and what holds it? Long runs of the method, and of what was built against the drift.

python launch/sweep.py --sweep=configs/sweeps/drift.py --config=quickstart --workdir=runs/drift --config.steps=500 \
  --config.prompts_per_step=32 --config.rollout.prompts_per_draw=32 --config.evaluation.every=100

Three seeds each, in hours. `drift_others.py` has what one seed is enough for.
"""


def get_sweep():
  """Names and what each changes in the recipe; the first one is what the others are compared with."""
  return {
    "published": {"reward.empty_answer": "allowed", "training.credit": "response"},
    "parts": {},
    "cer": {"reward.conditional_weight": 1.0},
    "random": {"reward.kind": "random"},
  }
