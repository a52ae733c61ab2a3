"""Reward mathematics of RLPR: how probable the reference answer is after the policy's own reasoning.

Pure functions over arrays (or one text), importing nothing but jax, so any trainer can call them. Shapes: P prompts,
G responses a prompt, A tokens of a reference answer. Section numbers are those of the paper, arXiv 2506.18254,
sections 3.2 to 3.4, and of its appendix for the ablations.
"""

import math
import re
from collections import Counter
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

AGGREGATES = ("mean_prob", "geometric_mean", "product", "mean_logprob")
SHAPINGS = ("clip", "identity", "threshold_T", "one_minus", "sigmoid_K", "leaky_T", "bins_N")
TEMPLATE_TAGS = {
  "think": ("<think>", "</think>", "<answer>", "</answer>"),
  "answer_only": ("<answer>", "</answer>"),
}
# The score of a response that cannot be scored. Under `mean_logprob` 0 would be the best score there is.
LOWEST_LOGPROB = math.log(1e-9)


class Rewards(NamedTuple):
  """Every part of the reward, so that each can be logged and none is recomputed."""

  reference: jax.Array  # [P, G] r: the reference answer's probability after the reasoning
  baseline: jax.Array  # [P]    r': the same without reasoning
  debiased: jax.Array  # [P, G] shaping(r - r')
  format: jax.Array  # [P, G] 1 where the tags of the template are all there, in order
  repetition: jax.Array  # [P, G] -1 where the response repeats itself, else 0
  total: jax.Array  # [P, G] what the policy is trained on


def reference_probability(logps: ArrayLike, mask: ArrayLike, aggregate: str = "mean_prob") -> jax.Array:
  """How probable the policy finds the reference answer (section 3.2).

  Args:
    logps: [..., A] float32 log-probabilities of the reference answer's tokens, in nats.
    mask: [..., A] True where a token belongs to the answer; what stands elsewhere never matters.
    aggregate: `mean_prob` = mean of p; `geometric_mean` = exp(mean of log p); `product` = exp(sum of log p);
      `mean_logprob` = mean of log p. The mean forgives one improbable token: (0.01, 0.7, 0.9) and (0.05, 0.7, 0.9)
      are close in the mean and five times apart in the product.

  Returns:
    [...] float32 score; 0 where the mask is empty.

  Raises:
    ValueError: unknown aggregate.
  """
  mask = jnp.asarray(mask, bool)
  logps = jnp.where(mask, jnp.asarray(logps, jnp.float32), 0.0)
  count = jnp.sum(mask, axis=-1)
  tokens = jnp.maximum(count, 1)
  if aggregate == "mean_prob":
    score = jnp.sum(jnp.where(mask, jnp.exp(logps), 0.0), axis=-1) / tokens
  elif aggregate == "geometric_mean":
    score = jnp.exp(jnp.sum(logps, axis=-1) / tokens)
  elif aggregate == "product":
    score = jnp.exp(jnp.sum(logps, axis=-1))
  elif aggregate == "mean_logprob":
    score = jnp.sum(logps, axis=-1) / tokens
  else:
    raise ValueError(f"aggregate {aggregate!r}: expected one of {', '.join(AGGREGATES)}")
  return jnp.where(count > 0, score, 0.0)


def debias(score: ArrayLike, baseline: ArrayLike, shaping: str = "clip") -> jax.Array:
  """What the reasoning added to the answer's probability: shaping(score - baseline) (section 3.2).

  Args:
    score: [...] r, after the reasoning.
    baseline: [...] r', without it; broadcast against `score`.
    shaping: of d = score - baseline: `clip` to [0, 1]; `identity`; `threshold_T` (0 where d < T); `one_minus`
      (1 - d); `sigmoid_K` (1 / (1 + exp(-K (2d - 1))), the plain sigmoid for K = 0); `leaky_T` (0.01 d where d < T);
      `bins_N` (d clipped, to the nearest multiple of 1/N). T, K and N are numbers: `threshold_0.05`.

  Raises:
    ValueError: unknown shaping, or a parameter that is not a number.
  """
  difference = jnp.asarray(score) - jnp.asarray(baseline)
  name, parameter = parse_shaping(shaping)
  if name == "clip":
    return jnp.clip(difference, 0.0, 1.0)
  if name == "identity":
    return difference
  if name == "one_minus":
    return 1.0 - difference
  if name == "threshold":
    return jnp.where(difference < parameter, 0.0, difference)
  if name == "leaky":
    return jnp.where(difference < parameter, 0.01 * difference, difference)
  if name == "sigmoid":
    return jax.nn.sigmoid(difference if parameter == 0 else parameter * (2 * difference - 1))
  return jnp.round(jnp.clip(difference, 0.0, 1.0) * parameter) / parameter


def parse_shaping(shaping: str) -> tuple[str, float]:
  """Splits `threshold_0.05` into its name and number (0 for those without one); ValueError if unknown."""
  name, _, number = shaping.rpartition("_")  # from the right: Python would read threshold_0_05 as 5
  if shaping in ("clip", "identity", "one_minus"):
    return shaping, 0.0
  try:
    parameter = float(number)
  except ValueError:
    parameter = math.nan
  known = name in ("threshold", "leaky", "sigmoid") or (name == "bins" and parameter >= 1 and parameter.is_integer())
  if not known or not math.isfinite(parameter):
    raise ValueError(f"shaping {shaping!r}: expected one of {', '.join(SHAPINGS)}, with a number for T, K or N")
  return name, parameter


def format_score(text: str, template: str = "think") -> float:
  """1.0 when every tag of the template occurs exactly once and in order, else 0.0 (section 3.4).

  Nothing may stand before `<think>`. Text between `</think>` and `<answer>` and after `</answer>` is allowed; the
  `answer_only` template allows text on both sides.
  """
  tags = TEMPLATE_TAGS[template]
  if any(text.count(tag) != 1 for tag in tags):
    return 0.0
  places = [text.index(tag) for tag in tags]
  starts_well = template == "answer_only" or places[0] == 0
  return float(starts_well and places == sorted(places))


def repetition_penalty(text: str, window: int = 10, limit: int = 10) -> float:
  """-1.0 when any `window` consecutive words occur `limit` times or more, else 0.0.

  Words are split at whitespace and `_`. A text of `window` words or fewer is never penalised.
  """
  words = [word for word in re.split(r"[\s_]+", text) if word]
  if len(words) <= window:
    return 0.0
  windows = Counter(tuple(words[i : i + window]) for i in range(len(words) - window + 1))
  return -1.0 if max(windows.values()) >= limit else 0.0


def combine(
  debiased: ArrayLike, format_score: ArrayLike, format_coefficient: float = 0.1, penalty: ArrayLike = 0.0
) -> jax.Array:
  """(1 - c) * debiased + c * format + penalty; with c = -1: debiased where the format is right, else -1, + penalty.

  Args:
    debiased: [...] debiased reference probability.
    format_score: [...] 1 or 0.
    format_coefficient: c, 0.1 in the paper.
    penalty: [...] 0, or -1 from `repetition_penalty`.
  """
  if format_coefficient == -1:
    return jnp.where(jnp.asarray(format_score) == 1, debiased, -1.0) + penalty
  debiased, format_score = jnp.asarray(debiased), jnp.asarray(format_score)
  return (1 - format_coefficient) * debiased + format_coefficient * format_score + penalty


def assess(
  reference_logps: ArrayLike,
  reference_mask: ArrayLike,
  scorable: ArrayLike,
  baselines: ArrayLike,
  format_scores: ArrayLike,
  repetition: ArrayLike,
  *,
  aggregate: str = "mean_prob",
  shaping: str = "clip",
  format_coefficient: float = 0.1,
) -> Rewards:
  """The whole reward of P groups of G responses.

  Args:
    reference_logps, reference_mask: [P, G, A] as for `reference_probability`.
    scorable: [P, G] False where the response could not be spliced; it scores as low as can be.
    baselines: [P] r' of each prompt; zeros for no debiasing.
    format_scores, repetition: [P, G].
  """
  lowest = LOWEST_LOGPROB if aggregate == "mean_logprob" else 0.0
  reference = jnp.where(scorable, reference_probability(reference_logps, reference_mask, aggregate), lowest)
  debiased = debias(reference, jnp.asarray(baselines)[:, None], shaping)
  total = combine(debiased, format_scores, format_coefficient, repetition)
  return Rewards(reference, baselines, debiased, format_scores, repetition, total)
