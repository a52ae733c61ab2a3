"""The reward mathematics without our trainer: arrays in, arrays out, from whatever made the log-probabilities.

python examples/in_another_trainer.py
"""

import numpy as np

from rlpr_jax import filtering, grpo, rewards

# Two prompts, three responses each. Your trainer puts the reference answer in the place of each response's own, runs
# one teacher-forced pass, and hands over the log-probabilities of the reference's tokens; here made up.
logps = np.log(np.array([[[0.9, 0.8], [0.3, 0.9], [0.2, 0.1]], [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]], np.float32))
mask = np.ones_like(logps, bool)
without_reasoning = np.array([0.25, 0.4], np.float32)
texts = ["<think>a</think><answer>7</answer>", "<think>b</think><answer>7</answer>", "8"] * 2
formats = np.reshape([rewards.format_score(text) for text in texts], (2, 3))

probability = rewards.reference_probability(logps, mask)  # [P, G] mean over the answer's tokens
gained = rewards.debias(probability, without_reasoning[:, None])
total = rewards.combine(gained, formats, format_coefficient=0.1)
advantages, stds = grpo.group_advantages(total)

settings = filtering.FilterConfig(scale=0.5)
state = filtering.init(settings)  # part of your checkpoint
kept = filtering.keep(state, stds, settings)
state = filtering.update(state, stds, settings)  # once a step

np.set_printoptions(precision=3, suppress=True)
print("reward", np.asarray(total), "advantage", np.asarray(advantages), "kept", np.asarray(kept), sep="\n")
