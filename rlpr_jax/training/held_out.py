"""Accuracy on held-out questions: Avg@k, the mean over k samples of each. It measures, and trains nothing."""

import contextlib
import dataclasses
from collections import defaultdict
from collections.abc import Sequence

import jax
import numpy as np

from rlpr_jax import processes, rewards
from rlpr_jax.grading import graders
from rlpr_jax.models import Params
from rlpr_jax.runs import metrics
from rlpr_jax.runs.interrupt import StopRequest
from rlpr_jax.sampling.engine import Engine, SampleOptions, StoppedError
from rlpr_jax.sampling.params import SamplingParams
from rlpr_jax.training.run import Run
from rlpr_jax.types import Prompt

# Folded into the run's key before the step, the draw and the sample; training folds the draw and the sample alone, so
# no key is used twice.
_EVALUATION_STREAM = 1


def evaluate_run(run: Run, params: Params, step: int, stop: StopRequest) -> dict[str, float]:
  """Measures Avg@k of a run's policy on its held-out prompts; {} if there are none.

  Raises:
    StoppedError: `stop` was asked for.
  """
  if not run.held_out:
    return {}
  settings = run.config.evaluation
  sampling = SamplingParams(settings.temperature, settings.top_k, settings.top_p, settings.min_p)
  accuracies = evaluate(
    engine=dataclasses.replace(run.engine, sampling=sampling),
    params=run.policy.sampling_params(params),
    prompts=run.held_out,
    samples=settings.samples,
    key=jax.random.fold_in(jax.random.fold_in(run.key, _EVALUATION_STREAM), step),
    options=SampleOptions(
      stop=settings.stop, progress=metrics.Progress("held-out, response"), interrupted=stop.__bool__
    ),
  )
  return {f"held_out/{name}": value for name, value in accuracies.items()}


def evaluate(
  engine: Engine,
  params: Params,
  prompts: Sequence[Prompt],
  samples: int,
  key: jax.Array,
  options: SampleOptions,
) -> dict[str, float]:
  """Measures Avg@samples: exact match, but for built-in sentence questions, where what an answer says counts.

  Each process samples and grades its share.

  Returns:
    `accuracy`; `accuracy/SOURCE` for each source; `format`: share of well-formed responses; `response_length` (tokens).

  Raises:
    StoppedError: on every process, if `options.interrupted` was true on one.
  """
  mine, out = processes.share(list(enumerate(prompts))), None
  with contextlib.suppress(StoppedError):
    out = engine.sample(params, mine, key, samples, options)
  if processes.any_of(out is None) or out is None:
    raise StoppedError
  graded = np.zeros((len(mine) * samples, 3), np.float32)  # right, well-formed, length
  for i, (text, length) in enumerate(zip(out.texts, out.lengths, strict=True)):
    prompt = mine[i // samples][1]
    right = graders.verify("builtin", text, prompt.reference, prompt.question)
    graded[i] = right, rewards.format_score(prompt.opening + text, engine.template), length
  graded = processes.gather(graded.reshape(len(mine), samples, 3), len(prompts))
  by_source = defaultdict(list)
  for prompt, of_prompt in zip(prompts, graded, strict=True):
    by_source[prompt.source].append(of_prompt[:, 0])
  accuracy, well_formed, length = graded.mean(axis=(0, 1), dtype=np.float64)
  return {
    "accuracy": float(accuracy),
    **{f"accuracy/{source}": float(np.mean(matches)) for source, matches in sorted(by_source.items())},
    "format": float(well_formed),
    "response_length": float(length),
  }
