"""From a policy and questions to all that a diagnosis finds, in the form that diagnosis.json has."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlpr_jax import config as configs
from rlpr_jax.diagnosis import findings, reasoning, rows
from rlpr_jax.diagnosis.reasoning import Reasoned
from rlpr_jax.diagnosis.rows import Grader, Row, Sampled
from rlpr_jax.diagnosis.statistics import Interval
from rlpr_jax.models import Params
from rlpr_jax.sampling.params import SamplingParams
from rlpr_jax.training.collect import reference_scorer
from rlpr_jax.training.logprobs import TextScorer
from rlpr_jax.training.run import Run
from rlpr_jax.types import Prompt

_REASONED = 2  # responses of each prompt that are scored again with other reasoning
_SHOWN = ("source", "question", "reference", "response")  # fields of a row


def study(
  run: Run, params: Params, prompts: Sequence[Prompt], earlier: Sequence[Row], grade: Grader, pairs: int
) -> dict[str, Any]:
  """Samples, scores and compares.

  Args:
    params: as the sampler reads them.
    earlier: rollouts that the run has written.
    pairs: prompts behind each of which the reasoning of all of them is scored, at most.

  Returns:
    what diagnosis.json holds of it.
  """
  # 1. Sample at temperature 1 and greedily, and grade.
  seed = run.config.seed
  sampled = rows.sample(with_temperature(run, 1.0), params, prompts)
  greedy = rows.sample_greedily(with_temperature(run, 0.0), params, prompts)
  right = grade(sampled.rows)
  fresh = findings.graded(sampled.rows, right, seed)
  trained = findings.graded(earlier, grade(earlier), seed) if earlier else None

  # 2. Score references and own answers again: with other reasoning, without any, token by token.
  scorer = reference_scorer(run, params)
  by_reasoning = compare_reasoning(run, scorer, sampled)
  information = measure_information(run, scorer, sampled, pairs)
  examples = show_examples(run, scorer, sampled, right)

  # 3. Compare.
  found = {
    "accuracy": {
      "sampled": findings.accuracy(sampled.rows, right, seed),
      "greedy": findings.accuracy(greedy, grade(greedy), seed),
    },
    "likelihood": findings.likelihood(sampled.evidence, seed),
    "sampled": findings.compare_with_verdicts(fresh),
    "trained": findings.compare_with_verdicts(trained) if trained else {},
    "reasoning": by_reasoning,
    "information": information,
    "likes": findings.preferences(fresh),
    "examples": examples,
  }
  return {name: to_json(value) for name, value in found.items()}


def with_temperature(run: Run, temperature: float) -> Run:
  """The run with an engine that samples at another temperature."""
  return run._replace(engine=dataclasses.replace(run.engine, sampling=SamplingParams(temperature)))


def choose_prompts(prompts: Sequence[Prompt], count: int, seed: int) -> list[Prompt]:
  """Draws prompts from all over a data set, in its order; all where there are no more than `count`.

  >>> len(choose_prompts([Prompt(ids=np.array([i])) for i in range(9)], count=4, seed=0))
  4
  """
  if len(prompts) <= count:
    return list(prompts)
  drawn = np.random.default_rng(seed).choice(len(prompts), count, replace=False)
  return [prompts[i] for i in sorted(drawn.tolist())]


def responses_of(sampled: Sampled, most: int) -> tuple[list[Reasoned], list[int]]:
  """The first scorable responses to each prompt, `most` at most, and the numbers of their prompts."""
  rollouts, out, of = sampled.batch.rollouts, [], []
  samples = sampled.evidence.scorable.shape[1]
  taken = [0] * len(sampled.batch.prompts)
  for i in np.flatnonzero(rollouts.scorable).tolist():
    if taken[i // samples] < most:
      taken[i // samples] += 1
      out.append(response(sampled, i))
      of.append(i // samples)
  return out, of


def response(sampled: Sampled, i: int) -> Reasoned:
  """Response i of all."""
  rollouts, samples = sampled.batch.rollouts, sampled.evidence.scorable.shape[1]
  return Reasoned(sampled.batch.prompts[i // samples], rollouts.tokens[i, : rollouts.lengths[i]])


def compare_reasoning(run: Run, scorer: TextScorer, sampled: Sampled) -> dict[str, Any]:
  """The reference by the reasoning before it, as `reasoning.compare_variants` has it; {} if nothing is scorable."""
  some, of = responses_of(sampled, _REASONED)
  if not some:
    return {}
  limit, seed = configs.longest_text(run.config), run.config.seed
  scored = reasoning.score_variants(scorer, run.engine, some, run.reward.aggregate, limit, seed)
  return reasoning.compare_variants(scored, np.unique(of, return_inverse=True)[1], seed)


def measure_information(run: Run, scorer: TextScorer, sampled: Sampled, pairs: int) -> dict[str, Any]:
  """Mutual information of prompts and reasoning, of one scorable response to each of some prompts."""
  # What was sampled at temperature 1 is as probable as it is there, whatever references are scored at.
  scorer = scorer._replace(program=scorer.program._replace(temperature=1.0))
  some = responses_of(sampled, 1)[0][:pairs]
  return reasoning.measure_information(scorer, run.engine, some, configs.longest_text(run.config), run.config.seed)


def show_examples(run: Run, scorer: TextScorer, sampled: Sampled, right: np.ndarray) -> list[dict[str, Any]]:
  """Responses to look at, with what their reasoning adds to each token of the reference and of their own answer."""
  judged = np.flatnonzero(np.isfinite(right))
  chosen = [int(judged[i]) for i in findings.choose(findings.graded(sampled.rows, right, run.config.seed))]
  responses = [response(sampled, i) for i in chosen]
  maps = reasoning.token_maps(scorer, run.engine, responses, configs.longest_text(run.config))
  return [
    {name: sampled.rows[i][name] for name in _SHOWN}
    | {"right": bool(right[i]), "reward": sampled.rows[i]["reward_total"], "tokens": of_tokens}
    for i, of_tokens in zip(chosen, maps, strict=True)
  ]


def to_json(value: Any) -> Any:
  """A value as JSON has it: figures with their intervals as objects, and None for what is no number.

  >>> to_json({"auc": Interval(0.5, low=float("nan"), high=1.0, groups=3)})
  {'auc': {'value': 0.5, 'low': None, 'high': 1.0, 'groups': 3}}
  """
  if isinstance(value, Interval):
    value = value._asdict()
  if isinstance(value, dict):
    return {name: to_json(inner) for name, inner in value.items()}
  if isinstance(value, list):
    return [to_json(inner) for inner in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value
