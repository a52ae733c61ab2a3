"""Reward mathematics of RLPR: how probable the reference answer is after the policy's own reasoning.

Pure functions over arrays (or one text), importing nothing but jax and jaxtyping, so any trainer can call them.
Shapes: P prompts, G responses a prompt, A tokens of a reference answer, M reference answers of a prompt. Section
numbers are those of the paper, arXiv 2506.18254, sections 3.2 to 3.4, and of its appendix for the ablations.
"""

import dataclasses
import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Real, Shaped

from rlpr_jax.types import Evidence, Rewards

AGGREGATES = ("mean_prob", "geometric_mean", "product", "mean_logprob")
REFERENCES = ("best", "mean")
TOKEN_WEIGHTS = ("uniform", "inverse", "base", "spread")
SHAPINGS = ("clip", "identity", "threshold_T", "one_minus", "sigmoid_K", "leaky_T", "bins_N", "rank", "zscore")
TEMPLATE_TAGS = {
  "think": ("<think>", "</think>", "<answer>", "</answer>"),
  "answer_only": ("<answer>", "</answer>"),
}
# The score of a response that cannot be scored. Under `mean_logprob` 0 would be the best score there is.
LOWEST_LOGPROB = math.log(1e-9)
STD_FLOOR = 1e-6  # what spreads less does not spread
_RARE = 1e-3  # added to p before 1 / p
_UNSPACED = (
  "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(r"[^\s_]+")
_WORD_OR_CHARACTER = re.compile(rf"[{_UNSPACED}]|[^\s_{_UNSPACED}]+")


@dataclasses.dataclass(frozen=True)
class Scoring:
  """How `score_groups` makes a reward of the evidence; the defaults are the paper's."""

  aggregate: str = "mean_prob"  # as for `reference_probability`
  shaping: str = "clip"  # as for `debias`
  format_coefficient: float = 0.1  # as for `combine`
  length_coefficient: float = 0.0  # the most that an answer longer than the reference costs
  references: str = "best"  # as for `over_references`, where there are several


def reference_probability(
  logps: Float[ArrayLike, "*B A"],
  mask: Shaped[ArrayLike, "*B A"],
  aggregate: str = "mean_prob",
  weights: Real[ArrayLike, "*#B A"] | None = None,
) -> Float[Array, "*B"]:
  """Measure how probable the policy finds the reference answer (section 3.2).

  Args:
    logps: log-probabilities of the reference answer's tokens, in nats.
    mask: True where a token belongs to the answer; what stands elsewhere never matters.
    aggregate: `mean_prob` = mean of p; `geometric_mean` = exp(mean of log p); `product` = exp(n * mean of log p), n
      being the number of tokens; `mean_logprob` = mean of log p. The mean forgives one improbable token:
      (0.01, 0.7, 0.9) and (0.05, 0.7, 0.9) are close in the mean and five times apart in the product.
    weights: how much each token counts in these means, sum(w x) / sum(w); at least 0, on any scale. A token of weight
      0 does not matter, except that it counts in n. None, and weights that are all 0, are uniform.

  Returns:
    float32 score; 0 where the mask is empty.

  Raises:
    ValueError: unknown aggregate.

  >>> logps, mask = jnp.log(jnp.array([0.01, 0.7, 0.9])), jnp.ones(3, bool)
  >>> print(f"{reference_probability(logps, mask):.3f} {reference_probability(logps, mask, 'product'):.4f}")
  0.537 0.0063
  """
  if aggregate not in AGGREGATES:
    raise ValueError(f"aggregate {aggregate!r}: expected one of {', '.join(AGGREGATES)}")
  mask = jnp.asarray(mask, bool)
  weights = mask.astype(jnp.float32) if weights is None else _scaled(weights, mask)
  used = weights != 0  # NaN is used, and seen
  values = jnp.where(used, jnp.asarray(logps, jnp.float32), 0.0)
  if aggregate == "mean_prob":
    values = jnp.exp(values)
  count = jnp.sum(mask, axis=-1)
  total = jnp.where(count > 0, jnp.sum(weights, axis=-1), 1.0)
  score = jnp.sum(jnp.where(used, weights * values, 0.0), axis=-1) / total
  if aggregate == "product":
    score = count * score
  if aggregate in ("geometric_mean", "product"):
    score = jnp.exp(score)
  return jnp.where(count > 0, score, 0.0)


def over_references(
  scores: Float[ArrayLike, "*B M"], there: Shaped[ArrayLike, "*#B M"], references: str
) -> Float[Array, "*B"]:
  """Make one score of those of several reference answers, any of which is right.

  Args:
    scores: of each reference, on any scale.
    there: True where a reference has a score; what stands elsewhere never matters.
    references: `best` = the largest score; `mean` = their mean.

  Returns:
    0 where no reference has a score.

  Raises:
    ValueError: another name.

  >>> scores, there = jnp.array([0.2, 0.6, 9.0]), jnp.array([True, True, False])
  >>> [over_references(scores, there, references).item() for references in ("best", "mean")]
  [0.6, 0.4]
  """
  if references not in REFERENCES:
    raise ValueError(f"references {references!r}: expected one of {', '.join(REFERENCES)}")
  scores = jnp.asarray(scores)
  there = jnp.broadcast_to(jnp.asarray(there, bool), scores.shape)
  count = jnp.sum(there, axis=-1)
  if references == "best":
    return jnp.where(count > 0, jnp.max(scores, axis=-1, where=there, initial=-jnp.inf), 0.0)
  return jnp.sum(jnp.where(there, scores, 0.0), axis=-1) / jnp.maximum(count, 1)


def _scaled(weights: Real[ArrayLike, "*#B A"], mask: Bool[Array, "*B A"]) -> Float[Array, "*B A"]:
  """Weights with 1 as the largest, so that no sum of them overflows; 1 each if all are 0; 0 off the mask."""
  weights = jnp.where(mask, jnp.asarray(weights, jnp.float32), 0.0)
  # The scale cancels out of every mean, so nothing is lost by keeping it out of the gradient.
  largest = jax.lax.stop_gradient(jnp.max(weights, axis=-1, keepdims=True, initial=0.0))
  none = largest < jnp.finfo(jnp.float32).tiny
  return jnp.where(none, mask, weights / jnp.where(none, 1.0, largest))


def token_weights(
  logps: Float[ArrayLike, "*P G A"],
  mask: Shaped[ArrayLike, "*P G A"],
  kind: str,
  baseline_logps: Float[ArrayLike, "*P A1"] | None = None,
  baseline_mask: Shaped[ArrayLike, "*P A1"] | None = None,
) -> Float[Array, "*P G A"]:
  """Weigh each token of the reference answer: `weights` of `reference_probability`. No gradients pass.

  The k-th tokens of the answer are compared with each other, wherever the masks of the rows begin. Rows that tokenise
  the answer into another number of tokens than most rows of the group do (the smaller number if two are as frequent;
  empty rows have no say) are compared with nothing: they get uniform weights and stay out of means and deviations.

  Args:
    logps, mask: as for `reference_probability`; the mask of a row without a score is empty.
    kind: `uniform`: 1. `inverse`: 1 / (mean over the group of p + 1e-3), rare tokens count more. `base`: 1 - p', p'
      being the probability without reasoning, what was known anyway counts less; rows that differ from the baseline in
      their number of tokens, and no others, are uniform. `spread`: unbiased standard deviation over the group of p
      (0 if under 1e-6; uniform if it is of one row), tokens that the reasoning decides count more, as in the reasoning
      reflection reward of arXiv 2506.13351.
    baseline_logps, baseline_mask: the reference answer without reasoning, for `base`.

  Returns:
    float32, at least 0, and 0 off the mask. The scale of each row means nothing.

  Raises:
    ValueError: unknown kind, or `base` without a baseline.

  Of two responses, the reasoning decides only how likely the second token is:

  >>> token_weights(jnp.log(jnp.array([[0.9, 0.1], [0.9, 0.7]])), jnp.ones((2, 2), bool), "spread").tolist()
  [[0.0, 0.42], [0.0, 0.42]]
  """
  if kind not in TOKEN_WEIGHTS:
    raise ValueError(f"token weights {kind!r}: expected one of {', '.join(TOKEN_WEIGHTS)}")
  mask = jnp.asarray(mask, bool)
  uniform = mask.astype(jnp.float32)
  if kind == "uniform":
    return uniform
  if kind == "base":
    if baseline_logps is None or baseline_mask is None:
      raise ValueError("token weights 'base': expected baseline_logps and baseline_mask")
    known, usual = _answer_tokens(baseline_logps, baseline_mask)
    kth = jnp.maximum(-jnp.expm1(known), 0.0)
  else:
    answer_logps, counts = _answer_tokens(logps, mask)
    usual = _most_frequent(counts)
    kth = _group_weights(jnp.exp(answer_logps), counts == usual[..., None], kind)
  # mask F F T T F T  ->  k 0 0 0 1 1 2
  k = jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0)
  alike = jnp.sum(mask, axis=-1, keepdims=True) == usual[..., None, None]
  return jnp.where(mask & alike, jnp.take_along_axis(kth[..., None, :], k, axis=-1), uniform)


def _answer_tokens(
  logps: Float[ArrayLike, "*B A"], mask: Shaped[ArrayLike, "*B A"]
) -> tuple[Float[Array, "*B A"], Int[Array, "*B"]]:
  """Log-probabilities of the answer's own tokens, moved to the front and 0 behind; their number."""
  mask = jnp.asarray(mask, bool)
  logps = jnp.where(mask, jax.lax.stop_gradient(jnp.asarray(logps, jnp.float32)), 0.0)
  front = jnp.argsort(~mask, axis=-1, stable=True)
  return jnp.take_along_axis(logps, front, axis=-1), jnp.sum(mask, axis=-1)


def _most_frequent(counts: Int[Array, "*P G"]) -> Int[Array, "*P"]:
  """The count above 0 that most rows have, the smallest of several; 0 if there is none."""
  rows = jnp.where(counts > 0, jnp.sum(counts[..., :, None] == counts[..., None, :], axis=-1), 0)
  frequent = rows == jnp.max(rows, axis=-1, keepdims=True)
  return jnp.min(counts, axis=-1, where=frequent, initial=jnp.iinfo(counts.dtype).max)


def _group_weights(probs: Float[Array, "*P G A"], members: Bool[Array, "*P G"], kind: str) -> Float[Array, "*P A"]:
  """Weight of the k-th token, from the members of the group that have one."""
  inside = members[..., None]
  size = jnp.sum(inside, axis=-2)
  if kind == "inverse":
    return 1.0 / (jnp.sum(probs, axis=-2, where=inside) / size + _RARE)
  _, std = _spread(probs, -2, inside)
  return jnp.where(size > 1, jnp.squeeze(std, -2), 1.0)


def _spread(
  values: Float[Array, "..."], axis: int, where: Bool[ArrayLike, "..."] = True
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
  """(values - mean, unbiased std, or 0 where that is under STD_FLOOR), of where `where` holds; the axis is kept."""
  size = jnp.sum(jnp.broadcast_to(where, values.shape), axis=axis, keepdims=True)
  # Twice, for equal values: the first mean may be an ulp off, which would be taken for a spread.
  for _ in range(2):
    values = values - jnp.sum(values, axis=axis, keepdims=True, where=where) / size
  variance = jnp.sum(values**2, axis=axis, keepdims=True, where=where) / jnp.maximum(size - 1, 1)
  flat = variance < STD_FLOOR**2
  return values, jnp.where(flat, 0.0, jnp.sqrt(jnp.where(flat, 1.0, variance)))


def debias(
  score: Real[ArrayLike, "*#B"], baseline: Real[ArrayLike, "*#B"], shaping: str = "clip"
) -> Float[Array, "*#B"]:
  """Measure what the reasoning added to the answer's probability: shaping(score - baseline) (section 3.2).

  Args:
    score: r, after the reasoning.
    baseline: r', without it; broadcast against `score`.
    shaping: of d = score - baseline: `clip` to [0, 1]; `identity`; `threshold_T` (0 where d < T); `one_minus`
      (1 - d); `sigmoid_K` (1 / (1 + exp(-K (2d - 1))), the plain sigmoid for K = 0); `leaky_T` (0.01 d where d < T);
      `bins_N` (d clipped, to the nearest multiple of 1/N). T, K and N are numbers: `threshold_0.05`. Two look at
      the whole group, which is the last axis: `rank` (from 0 for its lowest d to 1 for its highest, equal ones share
      their mean rank; 0.5 in a group of one) and `zscore` ((d - mean) / (unbiased std + 1e-6); 0 in a group whose
      std is under 1e-6, and in a group of one).

  Raises:
    ValueError: unknown shaping, or a parameter that is not a number, or a single number where a group is needed.

  >>> debias(jnp.array([0.8, 0.1]), 0.2).tolist()
  [0.6, 0.0]
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
  if name in ("rank", "zscore"):
    if difference.ndim == 0:
      raise ValueError(f"shaping {shaping!r}: expected groups, not a single score")
    return _rank(difference) if name == "rank" else _zscore(difference)
  if name == "sigmoid":
    return jax.nn.sigmoid(difference if parameter == 0 else parameter * (2 * difference - 1))
  return jnp.round(jnp.clip(difference, 0.0, 1.0) * parameter) / parameter


def _rank(values: Float[Array, "*P G"]) -> Float[Array, "*P G"]:
  """Mean rank of equal values, scaled to [0, 1]; NaN stays NaN."""
  size = values.shape[-1]
  if size == 1:
    return jnp.where(jnp.isnan(values), jnp.nan, 0.5)
  mine, others = values[..., :, None], values[..., None, :]
  rank = jnp.sum(others < mine, axis=-1) + (jnp.sum(others == mine, axis=-1) - 1) / 2
  return jnp.where(jnp.isnan(values), jnp.nan, rank / (size - 1))


def _zscore(values: Float[Array, "*P G"]) -> Float[Array, "*P G"]:
  """(values - mean) / (std + 1e-6); 0 where nothing spreads."""
  centred, std = _spread(values, -1)
  return jnp.where(std == 0, 0.0, centred / (std + STD_FLOOR))


def parse_shaping(shaping: str) -> tuple[str, float]:
  """Split a shaping into its name and number (0 for those without one); ValueError if unknown.

  >>> parse_shaping("threshold_0.05")
  ('threshold', 0.05)
  """
  name, _, number = shaping.rpartition("_")  # from the right: Python would read threshold_0_05 as 5
  if shaping in ("clip", "identity", "one_minus", "rank", "zscore"):
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
  """Score the format: 1.0 when every tag of the template occurs exactly once and in order, else 0.0 (section 3.4).

  Nothing may stand before `<think>`. Text between `</think>` and `<answer>` and after `</answer>` is allowed; the
  `answer_only` template allows text on both sides.

  Raises:
    ValueError: unknown template.

  >>> format_score("<think>6 * 7</think> <answer>42</answer>"), format_score("<answer>42</answer>")
  (1.0, 0.0)
  """
  if template not in TEMPLATE_TAGS:
    raise ValueError(f"template {template!r}: expected one of {', '.join(TEMPLATE_TAGS)}")
  tags = TEMPLATE_TAGS[template]
  if any(text.count(tag) != 1 for tag in tags):
    return 0.0
  places = [text.index(tag) for tag in tags]
  starts_well = template == "answer_only" or places[0] == 0
  return float(starts_well and places == sorted(places))


def repetition_penalty(text: str, window: int = 10, limit: int = 10, characters: bool = True) -> float:
  """-1.0 when any `window` consecutive words occur `limit` times or more, else 0.0.

  Words are split at whitespace and `_`. A text of `window` words or fewer is never penalised.

  Args:
    characters: in scripts that put no spaces between words (Chinese, Japanese, Thai, Lao, Burmese, Khmer) each
      character is a word. False as in the paper's code, to which a paragraph of them is one word.

  >>> repetition_penalty("so it is " * 5, window=3, limit=4), repetition_penalty("三加四得七。" * 20)
  (-1.0, -1.0)
  """
  words = (_WORD_OR_CHARACTER if characters else _WORD).findall(text)
  if len(words) <= window:
    return 0.0
  windows = Counter(tuple(words[i : i + window]) for i in range(len(words) - window + 1))
  return -1.0 if max(windows.values()) >= limit else 0.0


def answer_length_penalty(answer: str | None, reference: str, coefficient: float) -> float:
  """-coefficient * min(1, max(0, len(answer) - len(reference)) / len(reference)), in characters, both stripped.

  0 for an answer that is None, since the format term has that. So an answer of twice the reference's length and any
  longer one cost `coefficient`.

  >>> answer_length_penalty("42 apples", "42", 0.1), answer_length_penalty("42,", "42", 0.1)
  (-0.1, -0.05)
  """
  if answer is None:
    return 0.0
  length = len(reference.strip())
  excess = max(0, len(answer.strip()) - length) / max(length, 1)
  return -coefficient * min(1.0, excess) if excess else 0.0


def mixture(
  reference: Real[ArrayLike, "*B"], verified: Shaped[ArrayLike, "*B"], weight: Real[ArrayLike, ""]
) -> Float[Array, "*B"]:
  """(1 - weight) * reference + weight * verified.

  Args:
    reference: reward from the reference answer's probability.
    verified: reward from a verifier, such as 1 and 0.
    weight: share of the verifier, 0 to 1.

  >>> mixture(jnp.array([0.5, 0.5]), jnp.array([1.0, 0.0]), 0.5).tolist()
  [0.75, 0.25]
  """
  return jnp.asarray((1 - weight) * jnp.asarray(reference) + weight * jnp.asarray(verified))


def moving_average(
  old: Float[ArrayLike, "*B"], new: Float[ArrayLike, "*B"], rate: Real[ArrayLike, ""]
) -> Float[Array, "*B"]:
  """log((1 - rate) * exp(old) + rate * exp(new)): probabilities averaged, given and returned as logarithms.

  Args:
    old: log-probabilities so far; NaN where not known yet, which gives `new`.
    new: log-probabilities now, down to -inf.
    rate: 0 keeps the old, 1 takes the new.

  >>> jnp.exp(moving_average(jnp.log(0.2), jnp.log(0.6), 0.25)).item()
  0.3
  """
  old, new = jnp.asarray(old, jnp.float32), jnp.asarray(new, jnp.float32)
  rate = jnp.asarray(rate, jnp.float32)
  unknown = jnp.isnan(old)
  known_old, known_new = (jnp.where(unknown, 0.0, logps) for logps in (old, new))  # keeps NaN out of gradients
  average = jnp.logaddexp(known_old + jnp.log1p(-rate), known_new + jnp.log(rate))
  return jnp.where(unknown, new, average)


def combine(
  debiased: Real[ArrayLike, "*B"],
  format_score: Real[ArrayLike, "*B"],
  format_coefficient: float = 0.1,
  penalty: Real[ArrayLike, "*#B"] = 0.0,
) -> Float[Array, "*B"]:
  """(1 - c) * debiased + c * format + penalty; with c = -1: debiased where the format is right, else -1, + penalty.

  Args:
    debiased: debiased reference probability.
    format_score: 1 or 0.
    format_coefficient: c, 0.1 in the paper.
    penalty: 0, or -1 from `repetition_penalty`.

  >>> combine(jnp.array([0.6, 0.1]), jnp.array([1.0, 0.0])).tolist()
  [0.64, 0.09]
  """
  if format_coefficient == -1:
    return jnp.where(jnp.asarray(format_score) == 1, debiased, -1.0) + penalty
  debiased, format_score = jnp.asarray(debiased), jnp.asarray(format_score)
  return (1 - format_coefficient) * debiased + format_coefficient * format_score + penalty


def score_groups(
  evidence: Evidence,
  baselines: Float[ArrayLike, "P *M"],
  scoring: Scoring = Scoring(),
  weights: Real[ArrayLike, "P G *M A"] | None = None,
) -> Rewards:
  """Compute every part of the reward of P groups of G responses (sections 3.2 to 3.4).

  Args:
    evidence: a response that could not be spliced, `scorable` False, scores as low as can be. Of several references
      those count that were scored, have a token in the mask; r' is then that of the same ones, and of all where none
      was scored.
    baselines: r' of each prompt, of several references that of each; zeros for no debiasing.
    scoring: which reward it is.
    weights: of `token_weights`; None for uniform ones.

  >>> zeros, ones = jnp.zeros((1, 2)), jnp.ones((1, 2))
  >>> evidence = Evidence(
  ...   logps=jnp.log(jnp.array([[[0.8], [0.3]]])),
  ...   mask=ones[..., None] > 0,
  ...   scorable=ones > 0,
  ...   baseline_logps=jnp.log(jnp.array([[0.2]])),
  ...   formats=ones,
  ...   repetition=zeros,
  ...   excess=zeros,
  ...   verified=zeros,
  ...   noise=zeros,
  ... )
  >>> score_groups(evidence, baselines=jnp.array([0.2])).total.tolist()
  [[0.64, 0.19]]
  """
  lowest = LOWEST_LOGPROB if scoring.aggregate == "mean_logprob" else 0.0
  score = reference_probability(evidence.logps, evidence.mask, scoring.aggregate, weights)
  baselines, each = jnp.asarray(baselines), None
  if score.ndim == 2:
    to_subtract = baselines[:, None]
  else:
    scored, known = jnp.any(evidence.mask, axis=-1), jnp.any(jnp.isfinite(evidence.baseline_logps), axis=-1)[:, None]
    each, same = jnp.where(scored, score, jnp.nan), jnp.where(jnp.any(scored, axis=-1, keepdims=True), scored, True)
    score = over_references(score, scored, scoring.references)
    of_each = jnp.broadcast_to(baselines[:, None], same.shape)
    baselines = to_subtract = over_references(of_each, same & known, scoring.references)
  reference = jnp.where(evidence.scorable, score, lowest)
  debiased = debias(reference, to_subtract, scoring.shaping)
  length = scoring.length_coefficient * jnp.asarray(evidence.excess)
  total = combine(debiased, evidence.formats, scoring.format_coefficient, evidence.repetition + length)
  return Rewards(
    reference=reference,
    baseline=baselines,
    debiased=debiased,
    format=evidence.formats,
    repetition=evidence.repetition,
    length=length,
    total=total,
    each_reference=each,
  )
