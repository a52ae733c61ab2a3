"""Accuracy on held-out questions: Avg@k, the mean over k samples of each. It measures, and trains nothing."""

from collections import defaultdict
from collections.abc import Callable, Sequence

import jax
import numpy as np

from rlpr_jax import rewards
from rlpr_jax.data.pipeline import Prompt
from rlpr_jax.evaluation import graders
from rlpr_jax.models import Params
from rlpr_jax.sampling.engine import Engine


def evaluate(
  engine: Engine,
  params: Params,
  prompts: Sequence[Prompt],
  samples: int,
  key: jax.Array,
  progress: Callable[[int, int], None],
  stop: Sequence[str] = (),
) -> dict[str, float]:
  """Avg@samples over the prompts: exact match, but for built-in sentence questions, where what an answer says counts.

  Args:
    progress: called with how many responses have ended, of how many.
    stop: strings that end a response.

  Returns:
    `accuracy`; `accuracy/SOURCE` for each source; `format`: share of well-formed responses; `response_length` (tokens).
  """
  out = engine.sample(params, list(enumerate(prompts)), key, samples, progress, stop=stop)
  right: dict[str, list[bool]] = defaultdict(list)
  for i, text in enumerate(out.texts):
    prompt = prompts[i // samples]
    right[prompt.source].append(graders.verify("builtin", text, prompt.reference, prompt.question))
  return {
    "accuracy": float(np.mean([match for matches in right.values() for match in matches])),
    **{f"accuracy/{source}": float(np.mean(matches)) for source, matches in sorted(right.items())},
    "format": float(np.mean([rewards.format_score(text, engine.template) for text in out.texts])),
    "response_length": float(np.mean(out.lengths)),
  }
