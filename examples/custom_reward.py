"""A reward of your own, on which the quickstart is trained by

rlpr train --config=quickstart --workdir=runs/brevity --config.reward.custom=examples/custom_reward.py:brevity
"""

import numpy as np


def brevity(evidence, texts, prompts):
  """The mean probability of the reference answer, less a thousandth a character of the response; [P, G]."""
  probability = np.sum(np.exp(evidence.logps) * evidence.mask, axis=-1) / np.maximum(evidence.mask.sum(axis=-1), 1)
  return probability - 0.001 * np.reshape([len(text) for text in texts], probability.shape)
