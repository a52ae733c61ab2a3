"""Which reward? The full method, each part of it taken away, and other rewards, on one recipe.

python launch/sweep.py --sweep=configs/sweeps/rewards.py --config=configs/quickstart.py --workdir=runs/rewards
"""


def get_sweep():
  """Names and what each changes in the recipe; the first one is what the others are compared with."""
  verifier = {"reward.verifier": "builtin"}
  return {
    "mean": verifier,
    "product": verifier | {"reward.aggregate": "product"},
    "no_debiasing": verifier | {"reward.baseline_policy": "none"},
    "no_filter": verifier | {"filter.kind": "off"},
    "verifree": verifier | {"training.answer_gradient": "verifree"},
    "rule": verifier | {"reward.kind": "rule"},
    "random": verifier | {"reward.kind": "random"},
  }
