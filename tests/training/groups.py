"""Groups made by hand, packed one sequence a row, and their log-probabilities: for tests of what packs and updates."""

import functools

import jax
import numpy as np

from rlpr_jax.training import packing
from rlpr_jax.training.logprobs import row_logprobs
from rlpr_jax.training.packing import Piece
from rlpr_jax.types import Groups

PROMPT, RESPONSE, SAMPLES = 6, 7, 2  # tokens of a padded prompt, of a response; responses to a prompt
TEMPERATURE = 0.8


def make_groups(count=3, seed=0):
  """Groups of all lengths; the first response is EOS alone and the padding looks like it."""
  rng = np.random.default_rng(seed)
  prompt_lengths = rng.integers(1, PROMPT + 1, count).astype(np.int32)
  lengths = rng.integers(1, RESPONSE + 1, (count, SAMPLES)).astype(np.int32)
  prompt_lengths[-1], lengths[-1] = PROMPT, RESPONSE
  prompts = rng.integers(0, 64, (count, PROMPT)).astype(np.int32)
  tokens = rng.integers(0, 64, (count, SAMPLES, RESPONSE)).astype(np.int32)
  lengths[0, 0] = 1
  for k, g in np.ndindex(count, SAMPLES):
    tokens[k, g, lengths[k, g] - 1] = 0  # EOS, which is the token that pads
    tokens[k, g, lengths[k, g] :] = 0
  return Groups(
    prompt_tokens=prompts,
    prompt_lengths=prompt_lengths,
    tokens=tokens,
    lengths=lengths,
    logprobs=-rng.exponential(3.0, tokens.shape).astype(np.float32),
    advantages=rng.normal(size=(count, SAMPLES)).astype(np.float32),
  )


def padded(groups, size, aggregate):
  """One row a sequence, for `size` groups."""
  trees = packing.to_trees(groups, packing.sequence_weights(groups, aggregate, size * SAMPLES))
  pieces = [
    Piece(tree=k, row=SAMPLES * k + g, start=0, branches=[(g, trees[k].stem.size)])
    for k, g in np.ndindex(groups.lengths.shape)
  ]
  width = PROMPT + RESPONSE + (groups.answers.mask.shape[2] if groups.answers else 0)
  return packing.lay(trees, pieces, size * SAMPLES, width)


@functools.partial(jax.jit, static_argnums=0)
def trainer_logprobs(model, params, rows):
  return row_logprobs(model, params, rows, TEMPERATURE)
