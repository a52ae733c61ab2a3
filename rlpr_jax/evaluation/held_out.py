"""Exact match on held-out questions: Avg@k, the mean over k samples of each. It measures, and trains nothing."""

from collections import defaultdict
from collections.abc import Callable, Sequence

import jax
import numpy as np

from rlpr_jax import rewards, splicing
from rlpr_jax.data.pipeline import Prompt
from rlpr_jax.models import Params
from rlpr_jax.sampling.engine import Engine


def exact_match(text: str, reference: str) -> bool:
  """Whether the content of `<answer>` is the reference, but for case and runs of whitespace."""
  answer = splicing.extract_answer(text)
  return answer is not None and " ".join(answer.lower().split()) == " ".join(reference.lower().split())


def evaluate(
  engine: Engine,
  params: Params,
  prompts: Sequence[Prompt],
  samples: int,
  batch: int,
  key: jax.Array,
  progress: Callable[[int, int], None],
) -> dict[str, float]:
  """Avg@samples over the prompts.

  Args:
    batch: prompts sampled at once; the last batch is filled up with prompts that do not count.
    progress: called with how many prompts are done, of how many.

  Returns:
    `accuracy`; `accuracy/SOURCE` for each source; `format`: share of well-formed responses; `response_length` (tokens).
  """
  right: dict[str, list[bool]] = defaultdict(list)
  formats, lengths = [], []
  for first in range(0, len(prompts), batch):
    progress(first, len(prompts))
    part = list(prompts[first : first + batch])
    draws = list(enumerate(part + [prompts[0]] * (batch - len(part)), first))
    out = jax.device_get(engine.sample(params, draws, key, samples)[0])
    texts = engine.decode_texts(out)[: len(part) * samples]
    for i, text in enumerate(texts):
      prompt = part[i // samples]
      right[prompt.source].append(exact_match(text, prompt.reference))
      formats.append(rewards.format_score(text, engine.template))
    lengths.extend(out.lengths[: len(texts)])
  progress(len(prompts), len(prompts))
  return {
    "accuracy": float(np.mean([match for matches in right.values() for match in matches])),
    **{f"accuracy/{source}": float(np.mean(matches)) for source, matches in sorted(right.items())},
    "format": float(np.mean(formats)),
    "response_length": float(np.mean(lengths)),
  }
