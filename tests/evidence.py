"""Evidence of which a test gives only what it is about."""

import numpy as np

from rlpr_jax.types import Evidence, OwnAnswers


def make_evidence(*, logps: np.ndarray, mask: np.ndarray, **fields: np.ndarray) -> Evidence:
  """Evidence with zeros where nothing is given, and every response scorable."""
  shape = mask.shape[:2]
  zeros = dict.fromkeys(("formats", "repetition", "excess", "verified", "noise"), np.zeros(shape, np.float32))
  known = {"scorable": np.ones(shape, bool), "baseline_logps": np.zeros((shape[0], mask.shape[2]), np.float32)}
  own = OwnAnswers(*(np.zeros(shape, int),) * len(OwnAnswers._fields))
  return Evidence(logps=logps, mask=mask, **(zeros | known | {"own": own} | fields))
