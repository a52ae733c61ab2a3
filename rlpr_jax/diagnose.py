"""What a reward sees, and whether the reasoning matters: `rlpr diagnose --workdir=RUN [--config.field=value ...]`.

Of a run its newest checkpoint, on its held-out questions, and the rollouts that it wrote; of any model that
`--config=RECIPE --config.model.path=MODEL --config.data.path=QUESTIONS --workdir=DIR` names, fresh rollouts alone. Says
how well each reward tells right from wrong, how probable the reference is with other reasoning and with none, how much
the reasoning says about its prompt, and what the reward likes. Writes diagnosis.json and diagnosis.html there; the
report of a run has the same as a section.
"""

import dataclasses
import json
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from rlpr_jax import command_line, custom_reward, entry, validation
from rlpr_jax import config as configs
from rlpr_jax.compilation import keep_programs
from rlpr_jax.config import FIELDS
from rlpr_jax.diagnosis import findings, reasoning, rows
from rlpr_jax.diagnosis.reasoning import Reasoned
from rlpr_jax.diagnosis.rows import Grader, Sampled
from rlpr_jax.diagnosis.statistics import Interval
from rlpr_jax.errors import InputError, exit_with_one_line, setting_names
from rlpr_jax.grading import graders
from rlpr_jax.judging.client import Cache, Client, Endpoint
from rlpr_jax.models import Params
from rlpr_jax.policy import initial_params
from rlpr_jax.report import diagnosis, page, write_report
from rlpr_jax.runs import metrics
from rlpr_jax.runs.checkpoints import restore_params
from rlpr_jax.runs.storage import write_result
from rlpr_jax.sampling.params import SamplingParams
from rlpr_jax.training import settings
from rlpr_jax.training.collect import reference_scorer
from rlpr_jax.training.logprobs import TextScorer
from rlpr_jax.training.run import Run, set_up
from rlpr_jax.types import Prompt

_TRAINED = 2000  # responses of a run's rollouts that are looked at, newest first
_REASONED = 2  # responses of each prompt that are scored again with other reasoning


@dataclasses.dataclass(frozen=True)
class Options:
  """Settings of a diagnosis; the flags of the program explain them."""

  prompts: int = 32
  samples: int = 8
  pairs: int = 16
  verifier: str = ""
  judge: Endpoint | None = None


class Subject(NamedTuple):
  """A policy that is diagnosed."""

  config: ConfigDict  # of its run, or with the model and its questions
  run: pathlib.Path | None  # directory of its run; None for a model that no run here has trained
  step: int | None  # of the run's checkpoint; None for the newest


def main(argv: Sequence[str] | None = None) -> None:
  """The program: `argv` is its name and its arguments, those of this process if None."""
  with exit_with_one_line():
    program, *words = sys.argv if argv is None else argv
    own, overrides = command_line.split_overrides(words)
    given = command_line.parse(define_flags(), [program, *own], __doc__)
    if not given.workdir:
      raise InputError("--workdir: missing, expected the directory of a run, or one for what is written")
    options, workdir = read_options(given), pathlib.Path(given.workdir)
    subject = find_subject(workdir, given.config, overrides, given.step)
    with setting_names(settings.NAMES):
      diagnose(subject, workdir, options)


def read_options(given: flags.FlagValues) -> Options:
  """The options that the command line gives.

  Raises:
    InputError: one makes no sense without another.
  """
  for name, needed in (("judge_url", "judge_model"), ("judge_model", "judge_url")):
    if given[name].value and not given[needed].value:
      raise InputError(f"--{name}: given without --{needed}, expected both or neither")
  judge = Endpoint(given.judge_url, given.judge_model, given.judge_key_variable) if given.judge_url else None
  if judge and given.verifier:
    raise InputError("--verifier: given with --judge_url, expected one of the two")
  return Options(
    prompts=given.prompts, samples=given.samples, pairs=given.pairs, verifier=given.verifier or "", judge=judge
  )


def find_subject(workdir: pathlib.Path, recipe: str | None, overrides: Sequence[str], step: int | None) -> Subject:
  """Finds what is to be diagnosed.

  Args:
    recipe: of a model; None for the run in `workdir`.
    overrides: arguments that set fields of the config.

  Raises:
    InputError: there is neither, or both.
  """
  has_run = (workdir / "config.json").exists()
  if recipe is None:
    if not has_run:
      raise InputError(
        f"--workdir: {workdir} holds no run, expected one, or --config=RECIPE with --config.model.path=MODEL"
      )
    config = configs.read(workdir / "config.json")
    config.mesh = configs.default().mesh  # of the devices that are here
    return Subject(command_line.override(config, overrides), workdir, step)
  if has_run:
    raise InputError(f"--config: {workdir} holds a run, whose config is taken; expected --config.FIELD=VALUE alone")
  if step is not None:
    raise InputError("--step: a checkpoint of a run, expected no --config with it")
  config = command_line.override(command_line.load_recipe(recipe), overrides)
  if not config.model.path:
    raise InputError("--config.model.path: missing, expected the model: one that is new has nothing to be looked at")
  return Subject(config, None, None)


def diagnose(subject: Subject, workdir: pathlib.Path, options: Options) -> None:
  """Diagnoses a policy, and writes what was found to `workdir`.

  Raises:
    InputError: wrong input.
  """
  if jax.process_count() > 1:
    raise InputError("diagnose: many processes, expected one; it uses all devices of its own host")
  config = with_options(subject.config, options)
  validation.validate(config)
  verifier = options.verifier or (config.reward.verifier if config.reward.verifier != "none" else "builtin")
  if verifier == "math":
    graders.check_installed()
  entry.open_workdir(workdir)
  keep_programs(config.compilation_cache)
  run = set_up(config, custom_reward.load(config.reward.custom) if config.reward.custom else None)
  run = run._replace(engine=dataclasses.replace(run.engine, sampling=SamplingParams(1.0)))
  prompts = choose_prompts(run.held_out or run.prompts, options.prompts, config.seed)
  step, params = load_params(subject, run)

  # 1. Sample, greedily too, and grade.
  sampled = rows.sample(run, params, prompts)
  greedy_engine = dataclasses.replace(run.engine, sampling=SamplingParams(0.0))
  greedy = rows.sample_greedily(greedy_engine, params, prompts, run.key)
  trained = rows.read_rollouts(workdir / "rollouts", _TRAINED) if subject.run else []
  grade = grader(options.judge, verifier, workdir)
  right = grade(sampled.rows)

  # 2. Score references and own answers again, with the reasoning and without.
  scorer, limit = reference_scorer(run, params), configs.longest_text(config)
  fresh = findings.graded(sampled.rows, right, config.seed)
  by_reasoning, information = score_again(run, scorer, sampled, limit, options.pairs)
  examples = show_examples(run, scorer, sampled, right, limit)

  # 3. Put it together.
  found = to_json(
    {
      "policy": config.model.path or workdir.resolve().name,
      "when": f"step {step}" if subject.run else "as it was found",
      "prompts": len(prompts),
      "samples": options.samples,
      "verdicts": f"the judge {options.judge.model}" if options.judge else f"the rule {verifier}",
      "accuracy": {
        "sampled": findings.accuracy(sampled.rows, right, config.seed),
        "greedy": findings.accuracy(greedy, grade(greedy), config.seed),
      },
      "likelihood": findings.likelihood(sampled.evidence, config.seed),
      "sampled": findings.compare_with_verdicts(fresh),
      "trained": findings.compare_with_verdicts(findings.graded(trained, grade(trained), config.seed))
      if trained
      else {},
      "reasoning": by_reasoning,
      "information": information,
      "likes": findings.preferences(fresh),
      "examples": examples,
    }
  )
  write(found, workdir)


def with_options(config: ConfigDict, options: Options) -> ConfigDict:
  """The config with the questions that are asked: held-out ones where there are any, else those of training."""
  config = config.copy_and_resolve_references()
  config.samples_per_prompt = options.samples
  config.evaluation.prompts = 0
  if config.evaluation.path:
    config.data.path, config.data.split = config.evaluation.path, config.evaluation.split
  elif not config.data.path:
    config.evaluation.prompts, config.data.count = options.prompts, 1
  return config


def choose_prompts(prompts: Sequence[Prompt], count: int, seed: int) -> list[Prompt]:
  """Draws prompts from all over a data set, in its order; all where there are no more than `count`.

  >>> len(choose_prompts([Prompt(ids=np.array([i])) for i in range(9)], count=4, seed=0))
  4
  """
  if len(prompts) <= count:
    return list(prompts)
  drawn = np.random.default_rng(seed).choice(len(prompts), count, replace=False)
  return [prompts[i] for i in sorted(drawn.tolist())]


def load_params(subject: Subject, run: Run) -> tuple[int, Params]:
  """Reads the policy's parameters as the sampler has them, and the step that they are of; 0 of no run."""
  with metrics.announced("reading the policy"):
    if subject.run:
      step, params = restore_params(subject.run, subject.step, run.policy.trained)
    else:
      step, params = 0, initial_params(run.config, run.policy)
    return step, run.policy.sampling_params(params)


def grader(judge: Endpoint | None, verifier: str, workdir: pathlib.Path) -> Grader:
  """What says which responses are right: a judge, or else a rule."""
  if judge is None:
    return lambda some: rows.grade_by_rule(some, verifier)
  return lambda some: rows.grade_by_judge(some, Client(judge), Cache(workdir / "verdicts"))


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


def score_again(
  run: Run, scorer: TextScorer, sampled: Sampled, limit: int, pairs: int
) -> tuple[dict[str, Any], dict[str, Any]]:
  """The reference by the reasoning before it, and the mutual information of prompts and reasoning."""
  seed = run.config.seed
  some, of = responses_of(sampled, _REASONED)
  scored = reasoning.score_variants(scorer, run.engine, some, run.reward.aggregate, limit, seed)
  groups = np.unique(np.array(of, int), return_inverse=True)[1]
  # What was sampled at temperature 1 is as probable as it is there, whatever references are scored at.
  at_one = scorer._replace(program=scorer.program._replace(temperature=1.0))
  one_a_prompt = responses_of(sampled, 1)[0][:pairs]
  return (
    reasoning.compare_variants(scored, groups, seed) if some else {},
    reasoning.measure_information(at_one, run.engine, one_a_prompt, limit, seed),
  )


def show_examples(
  run: Run, scorer: TextScorer, sampled: Sampled, right: np.ndarray, limit: int
) -> list[dict[str, Any]]:
  """Responses to look at, with what their reasoning adds to each token of the reference and of their own answer."""
  numbers = np.flatnonzero(np.isfinite(right))
  chosen = [int(numbers[i]) for i in findings.choose(findings.graded(sampled.rows, right, run.config.seed))]
  maps = reasoning.token_maps(scorer, run.engine, [response(sampled, i) for i in chosen], limit)
  fields = {"source": "source", "question": "question", "reference_text": "reference", "response": "response"}
  return [
    {name: sampled.rows[i][field] for name, field in fields.items()}
    | {"right": bool(right[i]), "reward": sampled.rows[i]["reward_total"], **of_tokens}
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


def write(found: dict[str, Any], workdir: pathlib.Path) -> None:
  """Writes all that was found, prints the most of it, and renews the report of a run."""
  write_result(workdir / "diagnosis.json", json.dumps(found, indent=2))
  write_result(workdir / "diagnosis.html", page.render_diagnosis(workdir.resolve().name, found))
  print("\n".join(summary_lines(found)))
  print(f"diagnosis: {workdir / 'diagnosis.html'}")
  if (workdir / "metrics.jsonl").exists():
    print(f"report: {write_report(workdir)}", flush=True)


def summary_lines(found: dict[str, Any]) -> list[str]:
  """What was found, in a few lines for the screen."""
  lines = [
    ("accuracy at temperature 1", found["accuracy"]["sampled"]["all"]),
    ("accuracy, greedy", found["accuracy"]["greedy"]["all"]),
    ("reference after the reasoning, nats a token", found["likelihood"]["token"]),
    ("reference without, nats a token", found["likelihood"]["token_without"]),
  ]
  for name, of_score in found["sampled"]["scores"].items():
    lines += [(f"AUC of {name}, {pairs}", of_score[pairs]) for pairs in ("within", "between")]
  lines += [(f"r, {what}", found["reasoning"].get(name, {}).get("r")) for name, what in diagnosis.EXPLAINED.items()]
  lines.append(("mutual information of prompt and reasoning", found["information"].get("information")))
  width = max(len(label) for label, _ in lines)
  return [f"{label:{width}}  {diagnosis.number(interval)}" for label, interval in lines]


def define_flags() -> flags.FlagValues:
  """The flags of the program."""
  given = flags.FlagValues()
  command_line.define_config(given, default=None)
  flags.DEFINE_string("workdir", None, "Directory of the run; of a model where to write.", flag_values=given)
  flags.DEFINE_integer("step", None, "Checkpoint of the run to take; the newest if not given.", flag_values=given)
  flags.DEFINE_integer("prompts", 32, "Questions to ask.", lower_bound=2, flag_values=given)
  flags.DEFINE_integer("samples", 8, "Responses to each.", lower_bound=2, flag_values=given)
  flags.DEFINE_integer(
    "pairs",
    16,
    "Prompts, behind each of which the reasoning of all is scored.",
    lower_bound=2,
    flag_values=given,
  )
  flags.DEFINE_enum(
    "verifier",
    None,
    [choice for choice in FIELDS["reward.verifier"].choices if choice != "none"],
    "Rule that says which responses are right, instead of config.reward.verifier; builtin where that is none.",
    flag_values=given,
  )
  flags.DEFINE_string(
    "judge_url", None, "OpenAI-compatible endpoint, up to and with /v1, of a model that says it.", flag_values=given
  )
  flags.DEFINE_string("judge_model", None, "Name of that model.", flag_values=given)
  flags.DEFINE_string(
    "judge_key_variable", "", "Environment variable that holds the endpoint's key, if it needs one.", flag_values=given
  )
  return given


if __name__ == "__main__":
  main()
