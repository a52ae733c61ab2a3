"""What a reward sees, and whether the reasoning matters: `rlpr diagnose --workdir=RUN [--config.field=value ...]`.

Of a run its newest checkpoint, on its held-out questions, and the rollouts that it wrote; of any model that
`--config=RECIPE --config.model.path=MODEL --config.data.path=QUESTIONS --workdir=DIR` names, fresh rollouts alone. Says
how well each reward tells right from wrong, how probable the reference is with other reasoning and with none, how much
the reasoning says about its prompt, and what the reward likes. Writes diagnosis.json and diagnosis.html there; the
report of a run has the same as a section.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from absl import flags
from ml_collections import ConfigDict

from rlpr_jax import command_line, custom_reward, entry, validation
from rlpr_jax import config as configs
from rlpr_jax.compilation import keep_programs
from rlpr_jax.config import FIELDS
from rlpr_jax.diagnosis import rows
from rlpr_jax.diagnosis.rows import Grader
from rlpr_jax.diagnosis.study import choose_prompts, study
from rlpr_jax.errors import InputError, exit_with_one_line, setting_names
from rlpr_jax.grading import mathverify
from rlpr_jax.judging.client import Cache, Client, Endpoint
from rlpr_jax.models import Params
from rlpr_jax.policy import initial_params
from rlpr_jax.report import diagnosis, page, write_report
from rlpr_jax.runs import metrics
from rlpr_jax.runs.checkpoints import restore_params
from rlpr_jax.runs.storage import write_result
from rlpr_jax.training import settings
from rlpr_jax.training.run import Run, set_up

_TRAINED = 2000  # responses of a run's rollouts that are looked at, newest first


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
  configs.check_fields(config)  # of an evaluation's recipe nothing here is there
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
    mathverify.check_installed()
  client = Client(options.judge) if options.judge else None
  entry.open_workdir(workdir)
  keep_programs(config.compilation_cache)
  run = set_up(config, custom_reward.load(config.reward.custom) if config.reward.custom else None)
  prompts = choose_prompts(run.held_out or run.prompts, options.prompts, config.seed)
  step, params = load_params(subject, run)
  earlier = rows.read_rollouts(workdir / "rollouts", _TRAINED) if subject.run else []
  found = study(run, params, prompts, earlier, grader(client, verifier, workdir), options.pairs)
  about = {
    "policy": workdir.resolve().name if subject.run else config.model.path,
    "when": f"step {step}" if subject.run else "as it was found",
    "prompts": len(prompts),
    "samples": options.samples,
    "verdicts": f"the judge {options.judge.model}" if options.judge else f"the rule {verifier}",
  }
  write(about | found, workdir)


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


def load_params(subject: Subject, run: Run) -> tuple[int, Params]:
  """Reads the policy's parameters as the sampler has them, and the step that they are of; 0 of no run."""
  with metrics.announced("reading the policy"):
    if subject.run:
      step, params = restore_params(subject.run, subject.step, run.policy.trained)
    else:
      step, params = 0, initial_params(run.config, run.policy)
    return step, run.policy.sampling_params(params)


def grader(judge: Client | None, verifier: str, workdir: pathlib.Path) -> Grader:
  """What says which responses are right: a judge, or else a rule."""
  if judge is None:
    return lambda some: rows.grade_by_rule(some, verifier)
  return lambda some: rows.grade_by_judge(some, judge, Cache(workdir / "verdicts"))


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
