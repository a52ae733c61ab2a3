"""A reward of the user's own, in the place of what `config.reward` makes of the evidence: FILE.py:FUNCTION."""

import pathlib
import runpy
from collections.abc import Callable, Sequence

import numpy as np

from rlpr_jax.errors import InputError, user_code
from rlpr_jax.types import Evidence, Prompt

# The evidence, the responses' texts [P * G] and the prompts [P] -> rewards [P, G]. Of many processes each asks it about
# its share of the prompts.
CustomReward = Callable[[Evidence, Sequence[str], Sequence[Prompt]], np.ndarray]


def load(text: str) -> CustomReward:
  """Loads the function that `config.reward.custom` names.

  Raises:
    InputError: there is none.
  """
  where = f"config.reward.custom: {text}"
  file, _, name = text.rpartition(":")
  if not pathlib.Path(file).is_file():
    raise InputError(f"{where}: {file or text}: no such file, expected FILE.py:FUNCTION")
  with user_code(where, file):
    function = runpy.run_path(file).get(name)
  if not callable(function):
    raise InputError(f"{where}: no function {name} in the file")
  return function


def compute(function: CustomReward, evidence: Evidence, texts: Sequence[str], prompts: Sequence[Prompt]) -> np.ndarray:
  """Computes the rewards, float32[P, G], that a function of the user's own gives.

  Raises:
    InputError: it gave anything but a number for each prompt and sample.
  """
  shape = evidence.formats.shape
  if not prompts:  # of many processes this one has none
    return np.zeros(shape, np.float32)
  given = function(evidence, texts, prompts)
  try:
    rewards = np.asarray(given, np.float32)
  except (TypeError, ValueError):
    rewards = None
  if given is None or rewards is None or rewards.shape != shape:
    got = type(given).__name__ if rewards is None or rewards.ndim == 0 else f"an array of shape {rewards.shape}"
    raise InputError(f"config.reward.custom: gave {got}, expected an array of shape {shape}, prompts by samples")
  return rewards
