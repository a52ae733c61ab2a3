"""A reward of your own: `python examples/custom_reward.py runs/brevity` trains the quickstart with it."""

import pathlib
import runpy
import sys

import numpy as np

from rlpr_jax.train import train


def brevity(evidence, texts, prompts):
  """The mean probability of the reference answer, less a thousandth a character of the response; [P, G]."""
  probability = np.sum(np.exp(evidence.logps) * evidence.mask, axis=-1) / np.maximum(evidence.mask.sum(axis=-1), 1)
  return probability - 0.001 * np.reshape([len(text) for text in texts], probability.shape)


if __name__ == "__main__":
  recipe = pathlib.Path(__file__).parents[1] / "configs" / "quickstart.py"
  train(runpy.run_path(str(recipe))["get_config"](), pathlib.Path(sys.argv[1]), brevity)
