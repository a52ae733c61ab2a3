"""Responses with their rewards, as a run writes them to disk: read from there, or sampled anew; and their grades."""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rlpr_jax import custom_reward, splicing
from rlpr_jax.errors import MachineError
from rlpr_jax.grading import graders
from rlpr_jax.judging import judge
from rlpr_jax.judging.client import Cache, Client
from rlpr_jax.judging.judge import JudgeItem
from rlpr_jax.models import Params
from rlpr_jax.runs.metrics import Progress
from rlpr_jax.runs.records import rollout_rows
from rlpr_jax.sampling.engine import SampleOptions
from rlpr_jax.training.collect import compute_advantages, exchange
from rlpr_jax.training.reward import compute_rewards, gather_evidence
from rlpr_jax.training.run import Run
from rlpr_jax.types import Evidence, Prompt, RolloutBatch

Row = dict[str, Any]  # a line of WORKDIR/rollouts, as `records.rollout_rows` makes it
Grader = Callable[[Sequence[Row]], np.ndarray]  # gives float64[N] 1 right, 0 wrong, NaN not judged

_STREAM = 2  # folded into the run's key: no number that training or an evaluation draws with is used again


class Sampled(NamedTuple):
  """Responses to P prompts, G each, and what is known of them."""

  batch: RolloutBatch
  rows: list[Row]  # [P * G]

  @property
  def evidence(self) -> Evidence:
    return self.batch.evidence


def sample(run: Run, params: Params, prompts: Sequence[Prompt]) -> Sampled:
  """Samples responses with the run's engine, and rewards them as the run does.

  The reference is scored by the policy itself, with reasoning and without: r' is not that of a policy before it.

  Args:
    params: as the sampler reads them.
    prompts: of any data set; their `row` is kept and not used.
  """
  numbered, samples = list(enumerate(prompts)), run.config.samples_per_prompt
  options = SampleOptions(progress=Progress("sampled and scored, response"))
  rollouts = run.engine.rollout(params, numbered, jax.random.fold_in(run.key, _STREAM), samples, options)
  baselines = run.engine.baseline(params, prompts)
  exchanged = exchange(run, params, numbered, rollouts)
  evidence = gather_evidence(run.config, numbered, rollouts, baselines, exchanged)
  parts = jax.device_get(compute_rewards(evidence, run.reward))
  if run.custom_reward is not None:
    parts = parts._replace(total=custom_reward.compute(run.custom_reward, evidence, rollouts.texts, prompts))
  batch = RolloutBatch(
    prompts=list(prompts),
    rollouts=rollouts,
    evidence=evidence,
    rewards=parts,
    shadows={name: jax.device_get(compute_rewards(evidence, shadow)) for name, shadow in run.shadows.items()},
    advantages=compute_advantages(run, evidence, parts),
    keep=np.ones(len(prompts), bool),
    baselines=baselines,
  )
  return Sampled(batch, rollout_rows(batch, step=0, count=len(rollouts.lengths), engine=run.engine))


def sample_greedily(run: Run, params: Params, prompts: Sequence[Prompt]) -> list[Row]:
  """Takes the most probable token each time, one response a prompt; of a row only what a grade asks for.

  Args:
    run: with an engine of temperature 0.
    params, prompts: as for `sample`.
  """
  options = SampleOptions(progress=Progress("greedy, response"))
  rollouts = run.engine.sample(params, list(enumerate(prompts)), run.key, 1, options)
  return [
    {
      "question": prompt.question,
      "reference": prompt.reference,
      "references": list(prompt.references),
      "source": prompt.source,
      "response": text,
    }
    for prompt, text in zip(prompts, rollouts.texts, strict=True)
  ]


def read_rollouts(directory: pathlib.Path, most: int) -> list[Row]:
  """Reads what a run has written of its rollouts, newest step first, `most` responses at most.

  Lines that are not whole are left out, and so are those without a reward.
  """
  rows: list[Row] = []
  for path in sorted(directory.glob("*.jsonl"), reverse=True):
    if len(rows) >= most:
      break
    for line in path.read_bytes().splitlines():
      try:
        row = json.loads(line)
      except (ValueError, RecursionError):  # half a line, of a step that is being written
        continue
      if isinstance(row, dict) and {"response", "reference", "reward_total"} <= row.keys():
        rows.append(row)
  return rows[:most]


def number_groups(rows: Sequence[Row]) -> np.ndarray:
  """int[N], from 0: rows of one prompt in one step are a group.

  >>> number_groups([{"step": 4, "row": 7}, {"step": 4, "row": 2}, {"step": 4, "row": 7}]).tolist()
  [0, 1, 0]
  """
  numbers: dict[tuple[Any, Any], int] = {}
  return np.array([numbers.setdefault((row.get("step"), row.get("row")), len(numbers)) for row in rows], int)


def grade_by_rule(rows: Sequence[Row], verifier: str) -> np.ndarray:
  """Grades as `graders.verify_any` does, float64[N].

  >>> grade_by_rule([{"response": "<answer>42</answer>", "reference": "42"}], "exact").tolist()
  [1.0]
  """
  right = [
    graders.verify_any(verifier, row["response"], row.get("references") or [row["reference"]], row.get("question", ""))
    for row in rows
  ]
  return np.array(right, np.float64)


def grade_by_judge(rows: Sequence[Row], client: Client, cache: Cache) -> np.ndarray:
  """Grades as a language model does that is shown the answers; NaN where it gave no verdict.

  Args:
    cache: of verdicts, so that the same command asks only for what is missing.

  Raises:
    MachineError: it gave a verdict of none that it was asked about.
  """
  items = [
    JudgeItem(row.get("question", ""), row["reference"], splicing.extract_answer(row["response"])) for row in rows
  ]
  verdicts = judge.judge_all(items, client, cache, Progress("judged, response"))
  asked = [verdict for item, verdict in zip(items, verdicts, strict=True) if item.answer]
  if asked and all(verdict.right is None for verdict in asked):
    raise MachineError(f"the judge: no verdict of {len(asked)} responses ({asked[0].why}); the same command asks again")
  return np.array([np.nan if verdict.right is None else float(verdict.right) for verdict in verdicts])
