"""Accuracy on held-out questions: Avg@k, the mean over k samples of each. It measures, and trains nothing.

Beside it stands the share of answers with a reference's very text. Where that falls and the accuracy does not, answers
have drifted away from the references' form; where both fall, the policy has lost what it could.
"""

import contextlib
import dataclasses
import pathlib
from collections import defaultdict
from collections.abc import Sequence

import jax
import numpy as np

from rlpr_jax import processes, rewards
from rlpr_jax.grading import graders, mathverify
from rlpr_jax.models import Params
from rlpr_jax.runs import metrics
from rlpr_jax.runs.inputs import digest_rows
from rlpr_jax.runs.interrupt import StopRequest
from rlpr_jax.runs.unfinished import KeptRows
from rlpr_jax.sampling.engine import Engine, SampleOptions, StoppedError
from rlpr_jax.sampling.params import SamplingParams
from rlpr_jax.sampling.scheduler import Request
from rlpr_jax.training.run import Run
from rlpr_jax.types import Prompt

# Folded into the run's key before the step, the draw and the sample; training folds the draw and the sample alone, so
# no key is used twice.
_EVALUATION_STREAM = 1
# What is measured of each sample. Rows of other columns that an evaluation left behind are not read.
_COLUMNS = ("accuracy", "exact", "format", "response_length", "timeouts")


def evaluate_run(run: Run, params: Params, step: int, workdir: pathlib.Path, stop: StopRequest) -> dict[str, float]:
  """Measures Avg@k of a run's policy on its held-out prompts; {} if there are none.

  What was measured before a stop is kept in `workdir`, and not measured again.

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
    kept=KeptRows(workdir, f"held_out-{step}", of=f"{_COLUMNS} {settings} {digest_rows(run.held_out)}"),
    verifier=settings.verifier,
  )
  return {f"held_out/{name}": value for name, value in accuracies.items()}


def evaluate(
  engine: Engine,
  params: Params,
  prompts: Sequence[Prompt],
  samples: int,
  key: jax.Array,
  options: SampleOptions,
  kept: KeptRows | None = None,
  verifier: str = "builtin",
) -> dict[str, float]:
  """Measures Avg@samples. Each process samples and grades its share.

  Args:
    kept: what was measured of some prompts before; that of the others is added. None: of none, and nothing is kept.
    verifier: what counts as right, one of `graders.HELD_OUT_VERIFIERS`.

  Returns:
    `accuracy`; `exact`: share of answers that are a reference, but for case and runs of whitespace; `accuracy/SOURCE`
    and `exact/SOURCE` for each source; `format`: share of well-formed responses; `response_length` (tokens); where the
    verifier may be one of mathematics, `timeouts`: pairs of answer and reference that took it too long, and are wrong.

  Raises:
    StoppedError: on every process, if `options.interrupted` was true on one.
  """
  known = kept.rows if kept else {}
  todo = [(place, prompt) for place, prompt in enumerate(prompts) if place not in known]
  mine, finished = processes.share(todo), False
  found = {place: np.zeros((samples, len(_COLUMNS)), np.float32) for place, _ in mine}
  left = dict.fromkeys(found, samples)

  def grade(requests: list[Request]) -> None:
    for request in requests:
      prompt, place = request.group.prompt, request.group.draw
      before = mathverify.process.timeouts
      right = graders.is_right(verifier, request.text, prompt.references, prompt.question)
      timeouts = mathverify.process.timeouts - before
      exact = graders.is_right("exact", request.text, prompt.references)
      well_formed = rewards.format_score(prompt.opening + request.text, engine.template)
      found[place][request.sample] = right, exact, well_formed, len(request.tokens), timeouts
      left[place] -= 1
      if kept and not left[place]:
        kept.add({place: found[place].ravel()}, seconds=1)

  with contextlib.suppress(StoppedError):
    engine.sample(params, mine, key, samples, dataclasses.replace(options, ended=grade))
    finished = True
  if kept:
    kept.write()
  if processes.any_of(not finished):
    raise StoppedError
  graded = np.zeros((len(prompts), samples, len(_COLUMNS)), np.float32)
  for place, row in known.items():
    graded[place] = row.reshape(graded[place].shape)
  mine_graded = np.array(list(found.values()), np.float32).reshape(len(mine), *graded.shape[1:])
  graded[[place for place, _ in todo]] = processes.gather(mine_graded, len(todo))
  by_source = defaultdict(list)
  for prompt, of_prompt in zip(prompts, graded, strict=True):
    by_source[prompt.source].append(of_prompt)
  values = dict(zip(_COLUMNS, graded.mean(axis=(0, 1), dtype=np.float64).tolist(), strict=True))
  del values["timeouts"]
  if verifier in ("math", "inferred"):
    values["timeouts"] = int(graded[..., _COLUMNS.index("timeouts")].sum())
  for source, of_source in sorted(by_source.items()):
    accuracy, exact = np.stack(of_source).mean(axis=(0, 1), dtype=np.float64)[:2].tolist()
    values |= {f"accuracy/{source}": accuracy, f"exact/{source}": exact}
  return values
