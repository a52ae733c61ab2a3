"""From rollouts to rewards: what is known of each response, and the many ways to make one number of it.

The same evidence serves the reward that is trained on and every shadow reward that is only logged, so that the question
which one is better can be asked in one run.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from rlpr_jax import rewards, splicing
from rlpr_jax.errors import InputError
from rlpr_jax.grading import graders, mathverify
from rlpr_jax.types import (
  AnyArray,
  Evidence,
  ExchangedAnswers,
  OwnAnswers,
  Prompt,
  ResponseLengths,
  Rewards,
  Rollouts,
)


@dataclasses.dataclass(frozen=True)
class RewardSettings:
  """How a reward is made of the evidence; the fields of `config.reward` that a shadow may have otherwise."""

  kind: str
  aggregate: str
  token_weights: str
  shaping: str
  references: str  # "first" of several, or as for `rewards.over_references`
  baseline_policy: str  # "none": r' is 0; all others: as the evidence has it
  format_coefficient: float
  answer_length_coefficient: float
  length_difference_coefficient: float
  overlong_coefficient: float
  concentration_coefficient: float
  concentration_length: float
  concentration_gap: float
  rule_weight: float
  conditional_weight: float

  @classmethod
  def of(cls, config: ConfigDict) -> "RewardSettings":
    return cls(**{field.name: config[field.name] for field in dataclasses.fields(cls)})


def gather_evidence(
  config: ConfigDict,
  numbered: Sequence[tuple[int, Prompt]],
  rollouts: Rollouts,
  baseline_logps: np.ndarray,
  exchanged: ExchangedAnswers | None = None,
) -> Evidence:
  """Gathers what a reward can be made of, of a draw.

  Args:
    numbered: the draw's prompts with their numbers, which decide the noise.
    baseline_logps: [P, *M, A], as in `Evidence`.
  """
  settings, shape = config.reward, (len(numbered), config.samples_per_prompt)
  logps, mask = align(rollouts.reference_logps, rollouts.reference_mask)

  def each(function: Callable[[str, Prompt], float]) -> np.ndarray:
    values = [function(text, numbered[i // shape[1]][1]) for i, text in enumerate(rollouts.texts)]
    return np.array(values, np.float32).reshape(shape)

  answers = {text: splicing.extract_answer(text) for text in rollouts.texts}
  lengths = rollouts.lengths.reshape(shape)
  overlong = rewards.overlong_penalty(lengths, config.rollout.max_response_length, settings.overlong_buffer)

  def well_formed(text: str, prompt: Prompt) -> float:
    if settings.empty_answer == "malformed" and answers[text] == "":
      return 0.0
    return rewards.format_score(prompt.opening + text, config.data.template)

  def excess(text: str, prompt: Prompt) -> float:
    return max(rewards.answer_length_penalty(answers[text], reference, 1.0) for reference in prompt.references)

  timeouts: list[int] = []

  def verified(text: str, prompt: Prompt) -> float:
    before = mathverify.process.timeouts
    right = graders.verify_any(settings.verifier, text, prompt.references, prompt.question)
    timeouts.append(mathverify.process.timeouts - before)
    return float(right)

  verdicts = np.zeros(shape, np.float32) if settings.verifier == "none" else each(verified)
  return Evidence(
    logps=logps.reshape(*shape, *logps.shape[1:]),
    mask=mask.reshape(*shape, *mask.shape[1:]),
    scorable=rollouts.scorable.reshape(shape),
    baseline_logps=baseline_logps,
    formats=each(well_formed),
    repetition=each(
      lambda text, _: rewards.repetition_penalty(
        text, settings.repetition_window, settings.repetition_limit, settings.repetition_characters
      )
    ),
    excess=each(excess),
    verified=verdicts,
    noise=np.array([np.random.default_rng([config.seed, n]).random(shape[1]) for n, _ in numbered], np.float32).reshape(
      shape
    ),  # a share may be empty
    own=watch_answers(
      [answers[text] for text in rollouts.texts], [prompt for _, prompt in numbered], config.samples_per_prompt
    ),
    responses=ResponseLengths(lengths, np.asarray(overlong, np.float32)),
    exchanged=exchanged,
    timeouts=np.array(timeouts, np.int32).reshape(shape) if settings.verifier == "math" else None,
  )


def watch_answers(answers: Sequence[str | None], prompts: Sequence[Prompt], samples: int) -> OwnAnswers:
  """What the responses' own answers are beside the references, which no likelihood of a reference says.

  Args:
    answers: stripped, of each response, a prompt's together; None where there is none.
  """
  shape = (len(prompts), samples)
  of = [prompt for prompt in prompts for _ in range(samples)]
  known = [{reference.strip() for reference in prompt.references} for prompt in of]
  return OwnAnswers(
    found=np.array([answer is not None for answer in answers], bool).reshape(shape),
    empty=np.array([answer == "" for answer in answers], bool).reshape(shape),
    exact=np.array([answer in texts for answer, texts in zip(answers, known, strict=True)], bool).reshape(shape),
    lengths=np.array([len(answer or "") for answer in answers], np.int32).reshape(shape),
    reference_lengths=np.array([len(prompt.reference.strip()) for prompt in of], np.int32).reshape(shape),
  )


def align(logps: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Log-probabilities [..., E] and mask of the answer's tokens, moved to the left: column k is the k-th of them.

  >>> align(np.array([[0.0, -0.5, -0.1]]), np.array([[False, True, True]]))[0].tolist()
  [[-0.5, -0.1, 0.0]]
  """
  order = np.argsort(~mask, axis=-1, kind="stable")
  return np.take_along_axis(logps, order, axis=-1), np.take_along_axis(mask, order, axis=-1)


@functools.partial(jax.jit, static_argnames=("settings",))
def compute_rewards(evidence: Evidence, settings: RewardSettings) -> Rewards:
  """Computes every part of a reward (RLPR, sections 3.2 to 3.4)."""
  several = evidence.logps.ndim == 4  # references of each prompt
  if several and settings.references == "first":
    evidence, several = first_reference(evidence), False
  known = jnp.isfinite(evidence.baseline_logps)
  weights = weigh_tokens(evidence, settings.token_weights)
  # The baseline's tokens weigh as those of a response with as many, and alike where there is none.
  same = jnp.sum(evidence.mask, axis=-1) == jnp.sum(known, axis=-1)[:, None]
  scored = jnp.any(evidence.mask, axis=-1) if several else evidence.scorable
  alike = (same & scored)[..., None]
  of_baseline = jnp.max(jnp.where(alike, weights, 0.0), axis=1)
  of_baseline = jnp.where(jnp.any(alike, axis=1), of_baseline, known)
  baselines = rewards.reference_probability(evidence.baseline_logps, known, settings.aggregate, of_baseline)
  if settings.baseline_policy == "none":
    baselines = jnp.zeros_like(baselines)
  scoring = rewards.Scoring(
    aggregate=settings.aggregate,
    shaping=settings.shaping,
    format_coefficient=settings.format_coefficient,
    length_coefficient=settings.answer_length_coefficient,
    length_difference_coefficient=settings.length_difference_coefficient,
    overlong_coefficient=settings.overlong_coefficient,
    concentration_coefficient=settings.concentration_coefficient,
    concentration_quantiles=(settings.concentration_length, settings.concentration_gap),
    conditional_weight=settings.conditional_weight,
    references=settings.references,
  )
  parts = rewards.score_groups(evidence, baselines, scoring, weights)
  match settings.kind:
    case "rule":
      return parts._replace(total=evidence.verified)
    case "mixture":
      return parts._replace(total=rewards.mixture(parts.total, evidence.verified, settings.rule_weight))
    case "random":  # spread as a reward is, and knows nothing
      return parts._replace(total=evidence.noise)
  return parts


def obstacle_to_parts(config: ConfigDict) -> str | None:
  """What would have to change for the reward's parts to be told apart; None if they can be credited as they are."""
  if (gradient := config.training.answer_gradient) != "none":
    return f"config.training.answer_gradient none, found {gradient}, which trains on no own answers"
  if config.reward.custom:
    return "no config.reward.custom, whose parts are not known"
  if config.reward.kind == "mixture" and config.reward.normalization == "separate":
    return "config.reward.normalization joint, found separate"
  return None


def credits_parts(config: ConfigDict) -> bool:
  """Whether tokens have the advantage of those parts of the reward alone that depend on them.

  >>> from rlpr_jax.config import default
  >>> config = default()
  >>> credits_parts(config)
  True
  >>> config.training.answer_gradient = "verifree"
  >>> credits_parts(config)
  False
  """
  choice = config.training.credit
  return choice == "parts" or (choice == "auto" and obstacle_to_parts(config) is None)


def credit_of_answer(evidence: Evidence, parts: Rewards, settings: RewardSettings) -> Float[AnyArray, "P G"]:
  """The part of the reward that depends on a response's own answer: all but the reference's probability.

  That one is a function of the reasoning alone. With a format coefficient of -1 the two are not apart.
  """
  if settings.kind in ("rule", "random") or settings.format_coefficient == -1:
    return parts.total
  judged = 0.0 if parts.conditional is None else settings.conditional_weight * parts.conditional
  rest = rewards.combine(judged, evidence.formats, settings.format_coefficient, parts.repetition + parts.length)
  return rewards.mixture(rest, evidence.verified, settings.rule_weight) if settings.kind == "mixture" else rest


def unalign(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """Puts the answer's k-th value back where `mask` has its k-th token; 0 elsewhere: the reverse of `align`.

  >>> unalign(np.array([[-0.5, -0.1, 0.0]]), np.array([[False, True, True]])).tolist()
  [[0.0, -0.5, -0.1]]
  """
  kth = np.maximum(np.cumsum(mask, axis=-1) - 1, 0)
  return np.where(mask, np.take_along_axis(values, kth, axis=-1), 0.0)


def first_reference(evidence: Evidence) -> Evidence:
  """Takes the first of several references out of the evidence, as if it were the only one that was scored."""
  mask = evidence.mask[:, :, 0]
  return evidence._replace(
    logps=evidence.logps[:, :, 0],
    mask=mask,
    scorable=jnp.any(mask, axis=-1),
    baseline_logps=evidence.baseline_logps[:, 0],
  )


def weigh_tokens(evidence: Evidence, kind: str) -> Float[Array, "P G *M A"]:
  """Weighs the tokens of the evidence's references, those of each reference by themselves."""
  logps, mask, baseline_logps = evidence.logps, evidence.mask, evidence.baseline_logps
  known = jnp.isfinite(baseline_logps)
  if logps.ndim == 3:
    return rewards.token_weights(logps, mask, kind, baseline_logps, known)
  logps, mask = (jnp.moveaxis(x, 2, 1) for x in (logps, mask))  # the responses to a prompt beside each other
  return jnp.moveaxis(rewards.token_weights(logps, mask, kind, baseline_logps, known), 1, 2)


def looks_at_answers(config: ConfigDict) -> bool:
  """Whether the reward or a shadow asks how probable own answers are behind each other's reasoning."""
  shadows = (parse_shadow(config, text)[1] for text in config.reward.shadow)
  return any(settings.conditional_weight > 0 for settings in (RewardSettings.of(config.reward), *shadows))


def parse_shadow(config: ConfigDict, text: str) -> tuple[str, RewardSettings]:
  """Parses a shadow reward's name and settings, "name: field=value, field=value".

  Raises:
    InputError: no name, or a field or value that `config.reward` could not have.
  """
  fields: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(RewardSettings)}
  name, colon, overrides = text.partition(":")
  values = {}
  for override in filter(None, map(str.strip, overrides.split(","))):
    field, equals, value = (part.strip() for part in override.partition("="))
    if not equals or field not in fields:
      raise InputError(f"config.reward.shadow: {override!r}, expected field=value with one of {', '.join(fields)}")
    try:
      values[field] = fields[field](value)
    except ValueError:
      raise InputError(f"config.reward.shadow: {override!r}, expected a number") from None
  if not colon or not name.strip() or not values:
    raise InputError(f"config.reward.shadow: {text!r}, expected 'name: field=value, ...'")
  return name.strip(), dataclasses.replace(RewardSettings.of(config.reward), **values)
