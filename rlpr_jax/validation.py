"""Checks of a config beyond types: choices and bounds of its fields, and how they fit each other."""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from rlpr_jax import rewards
from rlpr_jax.config import FIELDS, Field, flatten, longest_sequence
from rlpr_jax.errors import InputError
from rlpr_jax.training import reward


def validate(config: ConfigDict) -> None:
  """Checks a config, before anything is written or compiled.

  Raises:
    InputError: naming the field, its value and what was expected.
  """
  values = flatten(config)
  if missing := [path for path in FIELDS if path not in values]:
    raise InputError(f"config.{missing[0]}: missing, expected the config of a run, made by rlpr_jax.config.default()")
  if unknown := [path for path in values if path not in FIELDS]:
    raise InputError(f"config.{unknown[0]}: there is no such field")
  for path, field in FIELDS.items():
    value = values[path]
    if field.choices and value not in field.choices:
      raise InputError(f"config.{path}: {value!r}, expected one of {', '.join(field.choices)}")
    if not is_within(field, value):
      raise InputError(f"config.{path}: {value!r}, expected {bounds(field)}")
  _expect(values, "evaluation.stop", lambda texts: all(isinstance(x, str) and x for x in texts), "texts, none empty")
  _expect(values, "training.dual_clip", lambda value: value == 0 or value > 1, "0, or more than 1")
  _expect(values, "training.warmup_steps", lambda value: value < (config.steps or value + 1), "fewer than config.steps")
  _expect(values, "filter.start", lambda value: value >= config.filter.collect_from, "at least filter.collect_from")
  check_reward("config.reward", reward.RewardSettings.of(config.reward), config.reward.verifier)
  names = set()
  for text in config.reward.shadow:
    if not isinstance(text, str):
      raise InputError(f"config.reward.shadow: {text!r}, expected texts, 'name: field=value, ...'")
    name, settings = reward.parse_shadow(config, text)
    check_reward(f"config.reward.shadow {name}", settings, config.reward.verifier)
    if name in names:
      raise InputError(f"config.reward.shadow: {name!r} twice, expected names of their own")
    names.add(name)
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
  if config.training.answer_gradient == "jepo" and (config.reward.kind != "reference" or config.reward.custom):
    raise InputError(
      "config.training.answer_gradient: jepo takes its advantages from the bound, expected config.reward.kind reference"
      " and no config.reward.custom"
    )
  if config.filter.kind == "accuracy" and config.reward.verifier == "none":
    raise InputError("config.filter.kind: accuracy needs a verifier, expected config.reward.verifier")
  if not all(_is_pair(pair, str, int | float) and pair[1] >= 0 for pair in config.filter.source_scales):
    raise InputError("config.filter.source_scales: expected pairs of a source's name and its scale")
  if not all(_is_pair(pair, str, str) for pair in config.data.examples):
    raise InputError("config.data.examples: expected pairs of question and response texts")
  minibatches, row_length = config.training.minibatches, config.training.row_length
  if config.prompts_per_step % minibatches:
    raise InputError(
      f"config.training.minibatches: {minibatches} does not divide config.prompts_per_step {config.prompts_per_step}"
    )
  if 0 < row_length < longest_sequence(config):
    raise InputError(
      f"config.training.row_length: {row_length}, expected 0 or room for the longest sequence,"
      f" {longest_sequence(config)} tokens"
    )


def is_within(field: Field, value: Any) -> bool:
  """Whether a value is within the bounds of a field; NaN is within none.

  >>> alpha = Field(0.01, "weight", above=0, at_most=1)
  >>> is_within(alpha, 1), is_within(alpha, 0)
  (True, False)
  """
  return (
    (field.at_least is None or value >= field.at_least)
    and (field.above is None or value > field.above)
    and (field.at_most is None or value <= field.at_most)
  )


def bounds(field: Field) -> str:
  """The bounds of a field in words.

  >>> bounds(Field(0.01, "weight", above=0, at_most=1))
  'more than 0 and at most 1'
  """
  named = (("at least", field.at_least), ("more than", field.above), ("at most", field.at_most))
  return " and ".join(f"{words} {bound}" for words, bound in named if bound is not None)


def check_reward(where: str, settings: reward.RewardSettings, verifier: str) -> None:
  """Checks what a reward and a shadow reward have in common; `where` begins the message."""
  for field in ("kind", "aggregate", "token_weights", "references", "baseline_policy"):
    value, choices = getattr(settings, field), FIELDS[f"reward.{field}"].choices
    if value not in choices:
      raise InputError(f"{where}.{field}: {value!r}, expected one of {', '.join(choices)}")
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
  return isinstance(value[0], first) and isinstance(value[1], second)


def _expect(values: dict[str, Any], field: str, holds: Callable[[Any], bool], expected: str) -> None:
  if not holds(values[field]):
    raise InputError(f"config.{field}: {values[field]!r}, expected {expected}")
