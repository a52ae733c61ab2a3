"""Other remedies for a drifting answer, of which one seed each is asked for.

python launch/sweep.py --sweep=configs/sweeps/drift_others.py --config=quickstart --workdir=runs/drift_others \
  --seeds=0 --config.steps=500 --config.prompts_per_step=32 --config.rollout.prompts_per_draw=32 \
  --config.evaluation.every=100
"""


def get_sweep():
  """Names and what each changes in the recipe."""
  return {
    "answer_gradient": {"training.answer_gradient": "likelihood", "training.answer_coefficient": 0.01},
    "rule_cer": {"reward.kind": "mixture", "reward.verifier": "builtin", "reward.conditional_weight": 1.0},
    "nrt": {
      "reward.aggregate": "weighted_sum",
      "reward.token_weights": "surprise",
      "reward.shaping": "positive",
      "reward.baseline_policy": "current",
      "training.answer_gradient": "likelihood",
    },
    "verifree": {
      "reward.aggregate": "product",
      "reward.baseline_policy": "none",
      "training.answer_gradient": "verifree",
      "training.advantages": "leave_one_out",
      "filter.kind": "off",
    },
    "rule": {"reward.kind": "rule", "reward.verifier": "builtin"},
  }
