"""From rollouts to rewards: what is known of each response, and the many ways to make one number of it.

The same evidence serves the reward that is trained on and every shadow reward that is only logged, so that the question
which one is better can be asked in one run.
"""

import dataclasses
import functools
import pathlib
import runpy
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from rlpr_jax import rewards, splicing
from rlpr_jax.errors import InputError, user_code
from rlpr_jax.grading import graders
from rlpr_jax.types import Evidence, Prompt, Rewards, Rollouts


@dataclasses.dataclass(frozen=True)
class RewardSettings:
  """How a reward is made of the evidence; the fields of `config.reward` that a shadow may have otherwise."""

  kind: str
  aggregate: str
  token_weights: str
  shaping: str
  baseline_policy: str  # "none": r' is 0; all others: as the evidence has it
  format_coefficient: float
  answer_length_coefficient: float
  rule_weight: float

  @classmethod
  def of(cls, config: ConfigDict) -> "RewardSettings":
    return cls(**{field.name: config[field.name] for field in dataclasses.fields(cls)})


# A reward of the user's own: the evidence, the responses' texts [P * G] and the prompts -> rewards [P, G]. Of many
# processes each asks it about its share of the prompts.
CustomReward = Callable[[Evidence, Sequence[str], Sequence[Prompt]], np.ndarray]


def load_custom_reward(text: str) -> CustomReward:
  """The function that `config.reward.custom` names: FILE.py:FUNCTION.

  Raises:
    InputError: there is none.
  """
  where = f"config.reward.custom: {text}"
  file, _, name = text.rpartition(":")
  if not pathlib.Path(file).is_file():
    raise InputError(f"{where}: {file or text}: no such file, expected FILE.py:FUNCTION")
  with user_code(where, file):
    function = runpy.run_path(file).get(name)
  if not callable(function):
    raise InputError(f"{where}: no function {name} in the file")
  return function


def custom_rewards(
  function: CustomReward, evidence: Evidence, texts: Sequence[str], prompts: Sequence[Prompt]
) -> Float[np.ndarray, "P G"]:
  """The rewards that a function of the user's own gives.

  Raises:
    InputError: it gave anything but a number for each prompt and sample.
  """
  shape = evidence.formats.shape
  if not prompts:  # of many processes this one has none
    return np.zeros(shape, np.float32)
  given = function(evidence, texts, prompts)
  try:
    rewards = np.asarray(given, np.float32)
  except (TypeError, ValueError):
    rewards = None
  if given is None or rewards is None or rewards.shape != shape:
    found = type(given).__name__ if rewards is None or rewards.ndim == 0 else f"an array of shape {rewards.shape}"
    raise InputError(f"config.reward.custom: gave {found}, expected an array of shape {shape}, prompts by samples")
  return rewards


def gather_evidence(
  config: ConfigDict, numbered: Sequence[tuple[int, Prompt]], rollouts: Rollouts, baseline_logps: np.ndarray
) -> Evidence:
  """The evidence of a draw.

  Args:
    numbered: the draw's prompts with their numbers, which decide the noise.
    baseline_logps: [P, A], as in `Evidence`.
  """
  settings, shape = config.reward, (len(numbered), config.samples_per_prompt)
  logps, mask = align(rollouts.reference_logps, rollouts.reference_mask)

  def each(function: Callable[[str, Prompt], float]) -> np.ndarray:
    values = [function(text, numbered[i // shape[1]][1]) for i, text in enumerate(rollouts.texts)]
    return np.array(values, np.float32).reshape(shape)

  def excess(text: str, prompt: Prompt) -> float:
    return rewards.answer_length_penalty(splicing.extract_answer(text), prompt.reference, 1.0)

  def verified(text: str, prompt: Prompt) -> float:
    return graders.verify(settings.verifier, text, prompt.reference, prompt.question)

  return Evidence(
    logps=logps.reshape(*shape, logps.shape[1]),
    mask=mask.reshape(*shape, mask.shape[1]),
    scorable=rollouts.scorable.reshape(shape),
    baseline_logps=baseline_logps,
    formats=each(lambda text, _: rewards.format_score(text, config.data.template)),
    repetition=each(
      lambda text, _: rewards.repetition_penalty(text, settings.repetition_window, settings.repetition_limit)
    ),
    excess=each(excess),
    verified=np.zeros(shape, np.float32) if settings.verifier == "none" else each(verified),
    noise=np.array([np.random.default_rng([config.seed, n]).random(shape[1]) for n, _ in numbered], np.float32).reshape(
      shape
    ),  # a share may be empty
  )


def align(logps: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Log-probabilities [B, E] and mask of the answer's tokens, moved to the left: column k is the k-th of them."""
  order = np.argsort(~mask, axis=1, kind="stable")
  return np.take_along_axis(logps, order, axis=1), np.take_along_axis(mask, order, axis=1)


@functools.partial(jax.jit, static_argnames=("settings",))
def assess(evidence: Evidence, settings: RewardSettings) -> Rewards:
  """Every part of a reward (RLPR, sections 3.2 to 3.4)."""
  known = jnp.isfinite(evidence.baseline_logps)
  weights = rewards.token_weights(evidence.logps, evidence.mask, settings.token_weights, evidence.baseline_logps, known)
  # The baseline's tokens weigh as those of a response with as many.
  same = jnp.sum(evidence.mask, axis=-1) == jnp.sum(known, axis=-1)[:, None]
  of_baseline = jnp.max(jnp.where((same & evidence.scorable)[..., None], weights, 0.0), axis=1)
  baselines = rewards.reference_probability(evidence.baseline_logps, known, settings.aggregate, of_baseline)
  if settings.baseline_policy == "none":
    baselines = jnp.zeros_like(baselines)
  parts = rewards.assess(
    evidence.logps,
    evidence.mask,
    evidence.scorable,
    baselines,
    evidence.formats,
    evidence.repetition,
    aggregate=settings.aggregate,
    shaping=settings.shaping,
    format_coefficient=settings.format_coefficient,
    token_weights=weights,
    length_penalty=settings.answer_length_coefficient * evidence.excess,
  )
  match settings.kind:
    case "rule":
      return parts._replace(total=evidence.verified)
    case "mixture":
      return parts._replace(total=rewards.mixture(parts.total, evidence.verified, settings.rule_weight))
    case "random":  # spread as a reward is, and knows nothing
      return parts._replace(total=evidence.noise)
  return parts


def parse_shadow(config: ConfigDict, text: str) -> tuple[str, RewardSettings]:
  """A shadow reward's name and settings, of "name: field=value, field=value".

  Raises:
    InputError: no name, or a field or value that `config.reward` could not have.
  """
  fields = {field.name: field.type for field in dataclasses.fields(RewardSettings)}
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


def auc(scores: np.ndarray, right: np.ndarray) -> float | None:
  """Area under the ROC curve: how often a right response scores above a wrong one, ties half; None without both.

  Non-finite scores are left out.
  """
  finite, right = np.isfinite(scores), right.astype(bool)
  good, bad = scores[finite & right], np.sort(scores[finite & ~right])
  if not good.size or not bad.size:
    return None
  below, up_to = np.searchsorted(bad, good, "left"), np.searchsorted(bad, good, "right")
  return float(np.mean(below + up_to) / 2 / bad.size)


def group_auc(scores: np.ndarray, right: np.ndarray) -> float | None:
  """`auc` over the pairs within each group of [P, G] alone, which are all that an advantage compares."""
  finite, right = np.isfinite(scores), right.astype(bool)
  pairs = (finite & right)[:, :, None] & (finite & ~right)[:, None, :]
  p, good, bad = np.nonzero(pairs)
  return float((np.sign(scores[p, good] - scores[p, bad]) + 1).mean() / 2) if p.size else None


def within_group_correlation(totals: np.ndarray, others: np.ndarray) -> float | None:
  """Pearson correlation of two rewards [P, G] after each group's means are taken off; None if one does not vary."""
  one, other = (x - x.mean(axis=1, keepdims=True) for x in (totals, others))
  norm = np.sqrt((one**2).sum() * (other**2).sum())
  return float((one * other).sum() / norm) if norm > 0 else None
