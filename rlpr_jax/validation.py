"""Checks of a config beyond each value by itself: how its fields fit each other."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from rlpr_jax import rewards
from rlpr_jax.config import FIELDS, check_fields, flatten, longest_sequence
from rlpr_jax.errors import InputError
from rlpr_jax.fields import bounds, check_value, is_within
from rlpr_jax.runs.trackers import PACKAGES
from rlpr_jax.training import reward
from rlpr_jax.training.packing import shortest_row


def validate(config: ConfigDict) -> None:
  """Checks a config, before anything is written or compiled.

  Raises:
    InputError: naming the field, its value and what was expected.
  """
  check_fields(config)
  values = flatten(config)
  _expect(values, "model.head_dim", lambda value: value % 2 == 0, "an even number: pairs of dimensions are rotated")
  _expect(values, "evaluation.stop", lambda texts: all(isinstance(x, str) and x for x in texts), "texts, none empty")
  _expect(
    values,
    "log.trackers",
    lambda names: all(isinstance(x, str) and x in PACKAGES for x in names) and len(set(names)) == len(names),
    f"different ones of {', '.join(PACKAGES)}: ({', '.join(map(repr, tuple(PACKAGES)[:2]))})",
  )
  _expect(values, "log.project", lambda text: bool(re.fullmatch(r"[\w.-]+", text)), "letters, digits, '_', '-' and '.'")
  _expect(values, "training.dual_clip", lambda value: value == 0 or value > 1, "0, or more than 1")
  _expect(values, "training.warmup_steps", lambda value: value < (config.steps or value + 1), "fewer than config.steps")
  _expect(values, "filter.start", lambda value: value >= config.filter.collect_from, "at least filter.collect_from")
  check_reward("config.reward", reward.RewardSettings.of(config.reward), config.reward.verifier)
  names, all_rewards = set(), [reward.RewardSettings.of(config.reward)]
  for text in config.reward.shadow:
    if not isinstance(text, str):
      raise InputError(f"config.reward.shadow: {text!r}, expected texts, 'name: field=value, ...'")
    name, settings = reward.parse_shadow(config, text)
    check_reward(f"config.reward.shadow {name}", settings, config.reward.verifier)
    if name in names:
      raise InputError(f"config.reward.shadow: {name!r} twice, expected names of their own")
    names.add(name)
    all_rewards.append(settings)
    if settings.baseline_policy not in ("none", config.reward.baseline_policy):
      raise InputError(f"config.reward.shadow {name}: baselines of the run itself or none, there are no others")
    if config.reward.references == "first" != settings.references:
      raise InputError(
        f"config.reward.shadow {name}.references: {settings.references}, but the run scores the first reference alone,"
        " expected config.reward.references best or mean"
      )
  if config.training.answer_gradient != "none" and config.reward.references != "first":
    raise InputError(
      f"config.training.answer_gradient: {config.training.answer_gradient} goes through one reference answer, expected"
      f" config.reward.references first, found {config.reward.references}"
    )
  if config.training.credit == "parts" and (obstacle := reward.obstacle_to_parts(config)):
    raise InputError(f"config.training.credit: parts, expected {obstacle}")
  of_baseline = [settings.token_weights for settings in all_rewards if settings.token_weights in rewards.OF_BASELINE]
  if of_baseline and config.reward.baseline_policy == "none":
    raise InputError(
      f"config.reward.baseline_policy: none, but token weights {of_baseline[0]} are made of the probability without"
      " reasoning, expected another"
    )
  if config.reward.references != "first" and any(settings.conditional_weight for settings in all_rewards):
    raise InputError(
      "config.reward.conditional_weight: of one reference answer, expected config.reward.references first, found"
      f" {config.reward.references}"
    )
  if config.training.answer_gradient == "jepo" and (
    config.reward.kind != "reference" or config.reward.custom or config.reward.conditional_weight
  ):
    raise InputError(
      "config.training.answer_gradient: jepo takes its advantages from the bound, expected config.reward.kind"
      " reference, no config.reward.custom and config.reward.conditional_weight 0"
    )
  carries, training = config.rollout.carry == "partial", config.training
  if carries and training.old_logprobs != "sampler" and not training.importance_cap:
    raise InputError(
      "config.training.importance_cap: 0, but config.rollout.carry partial trains on tokens of earlier policies,"
      " expected more than 0 (2, say), or config.training.old_logprobs sampler"
    )
  if config.filter.kind == "accuracy" and config.reward.verifier == "none":
    raise InputError("config.filter.kind: accuracy needs a verifier, expected config.reward.verifier")
  scale = FIELDS["filter.scale"]
  if not all(_is_pair(pair, str, int | float) and is_within(scale, pair[1]) for pair in config.filter.source_scales):
    raise InputError(f"config.filter.source_scales: expected pairs of a source's name and its scale, {bounds(scale)}")
  if not all(_is_pair(pair, str, str) for pair in config.data.examples):
    raise InputError("config.data.examples: expected pairs of question and response texts")
  minibatches, row_length = config.training.minibatches, config.training.row_length
  if config.prompts_per_step % minibatches:
    raise InputError(
      f"config.training.minibatches: {minibatches} does not divide config.prompts_per_step {config.prompts_per_step}"
    )
  needed = shortest_row(longest_sequence(config))
  if 0 < row_length < needed:
    raise InputError(
      f"config.training.row_length: {row_length}, expected 0 or room for the longest sequence, {needed} tokens"
    )


def check_reward(where: str, settings: reward.RewardSettings, verifier: str) -> None:
  """Checks what a reward and a shadow reward have in common; `where` begins the message."""
  for field, value in dataclasses.asdict(settings).items():
    check_value(f"{where}.{field}", FIELDS[f"reward.{field}"], value)
  if settings.kind in ("rule", "mixture") and verifier == "none":
    raise InputError(f"{where}.kind: {settings.kind} needs a verifier, expected config.reward.verifier")
  if settings.format_coefficient != -1 and not 0 <= settings.format_coefficient <= 1:
    raise InputError(f"{where}.format_coefficient: {settings.format_coefficient}, expected -1, or between 0 and 1")
  try:
    rewards.parse_shaping(settings.shaping)
  except ValueError as error:
    raise InputError(f"{where}.shaping: {error}") from None


def _is_pair(value: Any, first: Any, second: Any) -> bool:
  """Whether a value is a pair of these types."""
  if not isinstance(value, tuple | list) or len(value) != 2:
    return False
  return isinstance(value[0], first) and isinstance(value[1], second) and not isinstance(value[1], bool)


def _expect(values: dict[str, Any], field: str, holds: Callable[[Any], bool], expected: str) -> None:
  if not holds(values[field]):
    raise InputError(f"config.{field}: {values[field]!r}, expected {expected}")
