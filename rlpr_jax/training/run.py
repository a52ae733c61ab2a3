"""From a config to a run: policy, data, engine and update, with everything checked before anything compiles."""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerBase

from rlpr_jax import config as configs
from rlpr_jax import filtering, splicing
from rlpr_jax.custom_reward import CustomReward
from rlpr_jax.data import builtin
from rlpr_jax.data.pipeline import PromptSettings, prepare
from rlpr_jax.data.sources import DroppedRow, read_examples
from rlpr_jax.data.templates import own_system_message
from rlpr_jax.errors import InputError
from rlpr_jax.grading import mathverify
from rlpr_jax.grading.inference import infer
from rlpr_jax.policy import Policy, load_policy
from rlpr_jax.runs import inputs
from rlpr_jax.runs.dropped_rows import describe_dropped_rows
from rlpr_jax.runs.metrics import Progress
from rlpr_jax.sampling.decode import DecodeSettings
from rlpr_jax.sampling.device import Device
from rlpr_jax.sampling.engine import Engine
from rlpr_jax.sampling.params import SamplingParams
from rlpr_jax.training import settings
from rlpr_jax.training.optimizer import create_optimizer
from rlpr_jax.training.packing import PackingSettings
from rlpr_jax.training.reward import RewardSettings, parse_shadow
from rlpr_jax.training.update import Update, UpdateProgram
from rlpr_jax.types import Prompt


class Run(NamedTuple):
  """Everything that stays the same from the first step to the last."""

  config: ConfigDict
  policy: Policy
  engine: Engine
  prompts: list[Prompt]
  held_out: list[Prompt]
  update: Update
  packing: PackingSettings
  filter: filtering.FilterConfig
  key: jax.Array
  reward: RewardSettings
  shadows: dict[str, RewardSettings]  # by name
  custom_reward: CustomReward | None
  dropped_rows: dict[str, list[DroppedRow]]  # that cannot be used, by the field of the config that names their files


def set_up(config: ConfigDict, custom_reward: CustomReward | None = None) -> Run:
  """Sets up a run.

  Raises:
    InputError: naming the field, file or row that is wrong.
  """
  if config.reward.verifier == "math" or (config.evaluation.verifier == "math" and config.evaluation.prompts):
    mathverify.check_installed()
  policy = load_policy(config)
  settings.check_rows(config, policy.sharding)
  settings.check_lengths(config, policy.config.max_length)
  tokenizer = policy.tokenizer
  assert tokenizer is not None
  assert policy.turn_end is not None
  splicing.check_tokenizer(tokenizer)
  empty = config.data.instruction == "" and not config.data.system
  if empty and (own := own_system_message(tokenizer)):
    print(f"config.data.instruction: empty, and the chat template begins with a system message of its own: {own}")
  dropped_rows: dict[str, list[DroppedRow]] = {}
  prompts, dropped_rows["config.data.path"] = load_prompts(
    config,
    config.data,
    tokenizer,
    builtin_split="train",
    count=config.data.count,
    max_references=configs.max_references(config),
  )
  held_out: list[Prompt] = []
  if count := config.evaluation.prompts:
    held_out, dropped_rows["config.evaluation.path"] = load_prompts(
      config, config.evaluation, tokenizer, builtin_split="held_out", count=count
    )
    held_out = held_out[:count]
  if config.evaluation.verifier == "inferred" and any(map(_is_mathematical, held_out)):
    mathverify.check_installed()
  for field, of_field in (("config.data", prompts), ("config.evaluation", held_out)):
    check_vocabulary(field, of_field, policy.config.vocab_size)
  device = Device(
    model=policy.sampler,
    settings=DecodeSettings(config.rollout.decode_steps, policy.turn_end.eos_ids),
    shapes=settings.rollout_shapes(config, jax.process_count(), policy.sampling),
    score_temperature=config.reward.score_temperature,
  )
  engine = Engine(
    device=device,
    tokenizer=tokenizer,
    template=config.data.template,
    baseline_prefix=config.reward.baseline_prefix,
    sampling=SamplingParams(config.rollout.temperature),
    eos_id=policy.turn_end.eos_id,
    max_references=configs.max_references(config),
  )
  program = UpdateProgram(policy.model, create_optimizer(config), settings.update_settings(config, policy.sharding))
  return Run(
    config=config,
    policy=policy,
    engine=engine,
    prompts=prompts,
    held_out=held_out,
    update=Update(program, policy.frozen),
    packing=settings.packing_settings(config, policy.sharding),
    filter=settings.filter_config(config),
    key=jax.random.key(config.seed),
    reward=RewardSettings.of(config.reward),
    shadows=dict(parse_shadow(config, text) for text in config.reward.shadow),
    custom_reward=custom_reward,
    dropped_rows=dropped_rows,
  )


def digest_inputs(run: Run) -> inputs.Inputs:
  """Digests what stands behind the paths of a run's config."""
  config = run.config
  parts = inputs.model_digests(config, run.engine.tokenizer)
  file = pathlib.Path(config.reward.custom.rpartition(":")[0])
  if file.is_file():
    parts["custom reward"] = inputs.digest_text(file.read_text())
  return inputs.Inputs("train", parts, inputs.digest_rows(run.prompts))


def _is_mathematical(prompt: Prompt) -> bool:
  """Whether a reference of a prompt is taken for mathematics where nothing says what it is."""
  return any(infer(prompt.question, reference)[0] == "math" for reference in prompt.references)


def check_vocabulary(field: str, prompts: Sequence[Prompt], vocab_size: int) -> None:
  """Checks that the model knows all tokens of the prompts: a tokenizer may have more, such as one for images.

  >>> import numpy as np
  >>> check_vocabulary("config.data", [Prompt(ids=np.array([5, 8]), row=3)], vocab_size=8)
  Traceback (most recent call last):
  rlpr_jax.errors.InputError: config.data: prompt 3 holds token 8, expected tokens of the model, under 8
  """
  for prompt in prompts:
    if prompt.ids.max(initial=0) >= vocab_size:
      raise InputError(
        f"{field}: prompt {prompt.row} holds token {prompt.ids.max()}, expected tokens of the model, under {vocab_size}"
      )


def load_prompts(
  config: ConfigDict,
  source: ConfigDict,
  tokenizer: PreTrainedTokenizerBase,
  builtin_split: str,
  count: int,
  max_references: int | None = None,
) -> tuple[list[Prompt], list[DroppedRow]]:
  """Loads questions of files, or of the built-in set, as prompts; says how many were dropped.

  Args:
    source: `config.data` or `config.evaluation`.
    count: how many of the built-in ones there are to be.
    max_references: most reference answers of a row; None for any number, of which all may be right and none is scored.

  Returns:
    prompts, and the rows that cannot be used.
  """
  data = config.data
  name = source.path or f"built-in {builtin_split} questions"
  if source.path:
    print(f"{name}: reading", flush=True)
    examples, unusable = read_examples(source.path, source.split or None, data.max_dropped, max_references)
  else:
    examples, unusable = builtin.examples(builtin_split, count, config.seed, data.domains), []
  prompts, dropped = prepare(
    examples,
    tokenizer,
    PromptSettings(
      template=data.template,
      instruction=None if data.instruction == "default" else data.instruction,
      worked_examples=data.examples,
      prompt_limit=data.prompt_limit,
      max_reference_length=data.max_reference_length,
      system=data.system,
      seed=config.seed,
      several_references=config.reward.references != "first",
    ),
    Progress(f"{name}: tokenised"),
  )
  print(f"{name}: {len(prompts)} prompts, dropped: {dropped}{describe_dropped_rows(unusable)}", flush=True)
  if several := sum(bool(example.other_references) for example in examples):
    counts = "the first of each counts; config.reward.references=best or mean takes all"
    if config.reward.references != "first":
      counts = f"all of each count ({config.reward.references})" if max_references else "any of each is right"
    print(f"{name}: {several} rows have several references, {counts}", flush=True)
  return prompts, unusable
