"""Which reward? The full method, each part of it taken away, and other rewards, on one recipe.

python launch/sweep.py --sweep=configs/sweeps/rewards.py --config=configs/sentences.py --workdir=runs/rewards
"""


def get_sweep():
  """Names and what each changes in the recipe; the first one is what the others are compared with."""
  verifier = {"reward.verifier": "builtin", "training.credit": "response"}  # all of them as they were published
  return {
    "mean": verifier,
    "geometric_mean": verifier | {"reward.aggregate": "geometric_mean"},
    "product": verifier | {"reward.aggregate": "product"},
    "no_debiasing": verifier | {"reward.baseline_policy": "none"},
    "no_filter": verifier | {"filter.kind": "off"},
    # VeriFree (arXiv 2505.21493): the probability of the whole answer, its gradient, leave-one-out, nothing filtered.
    "verifree": verifier
    | {
      "reward.aggregate": "product",
      "reward.baseline_policy": "none",
      "training.answer_gradient": "verifree",
      "training.advantages": "leave_one_out",
      "filter.kind": "off",
    },
    "rule": verifier | {"reward.kind": "rule"},
    "random": verifier | {"reward.kind": "random"},
  }
