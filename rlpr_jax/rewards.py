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

AGGREGATES = ("mean_prob", "geometric_mean", "product", "mean_logprob", "weighted_sum")
ANSWER_GRADIENTS = (*AGGREGATES, "log_probability")
REFERENCES = ("best", "mean")
TOKEN_WEIGHTS = (
  "uniform",
  "inverse",
  "base",
  "inverse_base",
  "surprise",
  "spread",
  "logprob_spread",
  "logprob_variance",
)
OF_BASELINE = ("base", "inverse_base", "surprise")
SHAPINGS = (
  "clip",
  "identity",
  "positive",
  "threshold_T",
  "one_minus",
  "sigmoid_K",
  "leaky_T",
  "bins_N",
  "rank",
  "zscore",
)
TEMPLATE_TAGS = {
  "think": ("<think>", "</think>", "<answer>", "</answer>"),
  "answer_only": ("<answer>", "</answer>"),
}
# The score of a response that cannot be scored. Under `mean_logprob` 0 would be the best score there is.
LOWEST_LOGPROB = math.log(1e-9)
STD_FLOOR = 1e-6  # what spreads less does not spread
_RARE = 1e-3  # added to p before 1 / p
_LEAST_KNOWN = 1e-6  # the least that p' is taken for before 1 / p' and log p'
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
  length_difference_coefficient: float = 0.0  # as for `two_sided_length`
  overlong_coefficient: float = 0.0  # the most that a response near its limit costs
  concentration_coefficient: float = 0.0  # the most that a long response of a group of equals costs
  concentration_quantiles: tuple[float, float] = (0.5, 0.5)  # of lengths and gaps, as for `concentration_penalty`
  conditional_weight: float = 0.0  # share of `conditional_expectation` beside the debiased score
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
      being the number of tokens; `mean_logprob` = mean of log p; `weighted_sum` = sum(w p) / n, the weights as they are
      (arXiv 2602.11549): no mean, and as large as these. The mean forgives one improbable token:
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
  if weights is None:
    weights = mask.astype(jnp.float32)
  elif aggregate == "weighted_sum":
    weights = jnp.where(mask, jnp.asarray(weights, jnp.float32), 0.0)
  else:
    weights = _scaled(weights, mask)
  used = weights != 0  # NaN is used, and seen
  values = jnp.where(used, jnp.asarray(logps, jnp.float32), 0.0)
  if aggregate in ("mean_prob", "weighted_sum"):
    values = jnp.exp(values)
  count = jnp.sum(mask, axis=-1)
  if aggregate == "weighted_sum":
    return jnp.sum(jnp.where(used, weights * values, 0.0), axis=-1) / jnp.maximum(count, 1)
  total = jnp.where(count > 0, jnp.sum(weights, axis=-1), 1.0)
  score = jnp.sum(jnp.where(used, weights * values, 0.0), axis=-1) / total
  if aggregate == "product":
    score = count * score
  if aggregate in ("geometric_mean", "product"):
    score = jnp.exp(score)
  return jnp.where(count > 0, score, 0.0)


def answer_gradient(
  logps: Float[ArrayLike, "*B A"],
  mask: Shaped[ArrayLike, "*B A"],
  kind: str,
  weights: Real[ArrayLike, "*#B A"] | None = None,
) -> Float[Array, "*B A"]:
  """Weigh -log p of each token of the reference in the loss, so that its gradient is that of -score.

  A reward R = f(c_1, ..., c_n) of the reference's probabilities changes with the policy in two ways: which reasoning is
  sampled, which `grpo.group_advantages` serves, and how probable the reference is after it, the sum of u_t grad log c_t
  with u_t = (df / dc_t) c_t (arXiv 2602.03979, lemma 1). A baseline belongs to the first alone.

  Args:
    logps, mask, weights: as for `reference_probability`; the weights are constants.
    kind: one of its aggregates: `mean_prob` u = c_t / n, `geometric_mean` R / n, `product` R, `mean_logprob` 1 / n,
      `weighted_sum` w_t c_t / n; or `log_probability`: 1, supervised training on the reference (as in the main runs
      of arXiv 2602.11549).

  Returns:
    float32, constants; 0 off the mask.

  Raises:
    ValueError: unknown kind.

  >>> answer_gradient(jnp.log(jnp.array([0.5, 0.2])), jnp.ones(2, bool), "product").tolist()
  [0.1, 0.1]
  """
  if kind not in ANSWER_GRADIENTS:
    raise ValueError(f"answer gradient {kind!r}: expected one of {', '.join(ANSWER_GRADIENTS)}")
  mask = jnp.asarray(mask, bool)
  if kind == "log_probability":
    return mask.astype(jnp.float32)
  logps = jax.lax.stop_gradient(jnp.where(mask, jnp.asarray(logps, jnp.float32), 0.0))
  # u_t is df / d log c_t, so there is no second table of formulas.
  return jax.grad(lambda logps: jnp.sum(reference_probability(logps, mask, kind, weights)))(logps)


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
    kind: `uniform`: 1. `inverse`: 1 / (mean over the group of p + 1e-3), rare tokens count more. Of p', the probability
      without reasoning, so that what was known anyway counts less: `base`: 1 - p'; `inverse_base`: 1 / p', and
      `surprise`: -log p' (both arXiv 2602.11549, p' at least 1e-6); rows that differ from the baseline in their number
      of tokens, and no others, are uniform. Of the group, so that tokens which the reasoning decides count more:
      `spread`: unbiased standard deviation of p (0 if under 1e-6; uniform if it is of one row); `logprob_spread` and
      `logprob_variance`: standard deviation and variance of log p, as in the reasoning reflection reward of arXiv
      2506.13351, log p at least log 1e-9, since one tiny p would have all the weight.
    baseline_logps, baseline_mask: the reference answer without reasoning, for the three of p'.

  Returns:
    float32, at least 0, and 0 off the mask. The scale of each row means nothing, but to `weighted_sum`.

  Raises:
    ValueError: unknown kind, or one of the three of p' without a baseline.

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
  if kind in OF_BASELINE:
    if baseline_logps is None or baseline_mask is None:
      raise ValueError(f"token weights {kind!r}: expected baseline_logps and baseline_mask")
    known, usual = _answer_tokens(baseline_logps, baseline_mask)
    kth = _baseline_weights(known, kind)
  else:
    answer_logps, counts = _answer_tokens(logps, mask)
    usual = _most_frequent(counts)
    kth = _group_weights(answer_logps, counts == usual[..., None], kind)
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


def _baseline_weights(known: Float[Array, "*P A"], kind: str) -> Float[Array, "*P A"]:
  """Weight of the k-th token, from its log-probability without reasoning."""
  if kind == "base":
    return jnp.maximum(-jnp.expm1(known), 0.0)
  surprise = jnp.clip(-known, 0.0, -math.log(_LEAST_KNOWN))
  return surprise if kind == "surprise" else jnp.exp(surprise)


def _group_weights(logps: Float[Array, "*P G A"], members: Bool[Array, "*P G"], kind: str) -> Float[Array, "*P A"]:
  """Weight of the k-th token, from the members of the group that have one."""
  inside = members[..., None]
  size = jnp.sum(inside, axis=-2)
  if kind == "inverse":
    return 1.0 / (jnp.sum(jnp.exp(logps), axis=-2, where=inside) / size + _RARE)
  _, std = _spread(jnp.exp(logps) if kind == "spread" else jnp.maximum(logps, LOWEST_LOGPROB), -2, inside)
  std = std**2 if kind == "logprob_variance" else std
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
    shaping: of d = score - baseline: `clip` to [0, 1]; `identity`; `positive` (0 where d < 0); `threshold_T` (0 where
      d < T); `one_minus` (1 - d); `sigmoid_K` (1 / (1 + exp(-K (2d - 1))), the plain sigmoid for K = 0); `leaky_T`
      (0.01 d where d < T); `bins_N` (d clipped, to the nearest multiple of 1/N). T, K and N are numbers:
      `threshold_0.05`. Two look at the whole group, which is the last axis: `rank` (from 0 for its lowest d to 1 for
      its highest, equal ones share their mean rank; 0.5 in a group of one) and `zscore` ((d - mean) / (unbiased std +
      1e-6); 0 in a group whose std is under 1e-6, and in a group of one).

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
  if name == "positive":
    return jnp.maximum(difference, 0.0)
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
  if shaping in ("clip", "identity", "positive", "one_minus", "rank", "zscore"):
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


def two_sided_length(
  own: Real[ArrayLike, "*#B"], reference: Real[ArrayLike, "*#B"], coefficient: Real[ArrayLike, ""]
) -> Float[Array, "*#B"]:
  """-coefficient * min(1, |own - reference| / reference): what an answer longer or shorter than the reference costs.

  The length term of arXiv 2506.13351, without its constant, and never more than the coefficient.

  Args:
    own, reference: lengths in any unit; a reference of 0 counts as 1.

  >>> two_sided_length(jnp.array([0, 6, 9, 80]), 8, 0.4).tolist()
  [-0.4, -0.1, -0.05, -0.4]
  """
  own, reference = jnp.asarray(own, jnp.float32), jnp.asarray(reference, jnp.float32)
  return jnp.asarray(coefficient) * -jnp.minimum(1.0, jnp.abs(own - reference) / jnp.maximum(reference, 1.0))


def overlong_penalty(lengths: Real[ArrayLike, "*B"], limit: int, buffer: int) -> Float[Array, "*B"]:
  """0 to -1 over the last `buffer` tokens before the limit, in a line: DAPO's soft overlong penalty (arXiv 2503.14476).

  Args:
    lengths: tokens of responses.
    limit: most tokens of a response.
    buffer: at least 1.

  >>> overlong_penalty(jnp.array([50, 80, 90, 100]), limit=100, buffer=20).tolist()
  [0.0, 0.0, -0.5, -1.0]
  """
  return -jnp.clip((jnp.asarray(lengths, jnp.float32) - (limit - buffer)) / buffer, 0.0, 1.0)


def concentration_penalty(
  scores: Real[ArrayLike, "P G"],
  lengths: Real[ArrayLike, "P G"],
  valid: Shaped[ArrayLike, "P G"],
  length_quantile: float = 0.5,
  gap_quantile: float = 0.5,
) -> Float[Array, "P G"]:
  """-(L - min L) / (max L - min L) in groups of long responses whose scores coincide: there length decides.

  The penalty of RLCPR (arXiv 2610.01458) as one re-implementation has it: a group is concerned where its shortest
  response is longer than a quantile of all lengths, and its range of scores smaller than a quantile of all ranges.

  Args:
    scores, lengths: of a whole batch, since quantiles are over all groups.
    valid: False for a response that has no score: it is left out of all quantiles and ranges and costs nothing.

  Returns:
    float32 from -1 to 0.

  >>> scores, lengths = jnp.array([[0.40, 0.42], [0.1, 0.7]]), jnp.array([[900, 1000], [300, 500]])
  >>> concentration_penalty(scores, lengths, jnp.ones((2, 2), bool)).tolist()
  [[0.0, -1.0], [0.0, 0.0]]
  """
  valid = jnp.asarray(valid, bool)
  some = jnp.any(valid, axis=-1)
  scores, lengths = (jnp.asarray(x, jnp.float32) for x in (scores, lengths))

  def extremes(values: Float[Array, "P G"]) -> tuple[Float[Array, "P"], Float[Array, "P"]]:
    least = jnp.min(values, axis=-1, where=valid, initial=jnp.inf)
    most = jnp.max(values, axis=-1, where=valid, initial=-jnp.inf)
    return jnp.where(some, least, 0.0), jnp.where(some, most, 0.0)

  (lowest, highest), (shortest, longest) = extremes(scores), extremes(lengths)
  long = jnp.nanquantile(jnp.where(valid, lengths, jnp.nan), length_quantile)
  narrow = jnp.nanquantile(jnp.where(some, highest - lowest, jnp.nan), gap_quantile)
  concerned = some & (shortest > long) & (highest - lowest < narrow)
  share = (lengths - shortest[:, None]) / jnp.maximum(longest - shortest, 1.0)[:, None]
  return jnp.where(concerned[:, None] & valid, -share, 0.0)


def conditional_expectation(
  reference_logps: Float[ArrayLike, "*P G"],
  answer_logps: Float[ArrayLike, "*P G G"],
  answered: Shaped[ArrayLike, "*P G"],
  pairs: Shaped[ArrayLike, "*P G G"] | None = None,
) -> Float[Array, "*P G"]:
  """How probable the reference is, averaged over the reasoning that leads to the response's own answer (CER).

      r_j = sum_k q_kj p_k / sum_k q_kj

  with p_k the probability of the reference and q_kj that of response j's own answer, both after the reasoning of
  response k: the group itself is the sample (arXiv 2603.10624). Unlike RLPR's reward it looks at the own answer.
  Sums stay logarithms until the end, so that answers of any length can be compared.

  Args:
    reference_logps: log p_k, of all of the reference's tokens, and of what ends it.
    answer_logps: log q_kj, in row k and column j.
    answered: False for a response without an answer, whose reward is 0. Its reasoning still counts for the others.
    pairs: False where k is no part of r_j: reasoning that has no place for an answer, pairs that were not scored. What
      stands there never matters. None for all.

  Returns:
    float32 between the smallest and the largest p; 0 for a response without an answer or any pair.

  >>> p, q = jnp.array([0.6, 0.3]), jnp.array([[0.6, 0.2], [0.3, 0.4]])
  >>> conditional_expectation(jnp.log(p), jnp.log(q), jnp.array([True, True])).tolist()
  [0.5, 0.4]
  """
  return jnp.exp(_log_conditional_expectation(reference_logps, answer_logps, answered, pairs))


def _log_conditional_expectation(
  reference_logps: Float[ArrayLike, "*P G"],
  answer_logps: Float[ArrayLike, "*P G G"],
  answered: Shaped[ArrayLike, "*P G"],
  pairs: Shaped[ArrayLike, "*P G G"] | None,
) -> Float[Array, "*P G"]:
  """-inf for 0."""
  answer_logps, answered = jnp.asarray(answer_logps), jnp.asarray(answered, bool)
  pairs = jnp.ones(answer_logps.shape, bool) if pairs is None else jnp.asarray(pairs, bool)
  pairs = pairs & answered[..., None, :]
  some = jnp.any(pairs, axis=-2)
  answer_logps = jnp.where(pairs, answer_logps, -jnp.inf)
  both = jnp.where(pairs, answer_logps + jnp.asarray(reference_logps)[..., :, None], -jnp.inf)
  # Where there is no pair -inf less -inf would be NaN.
  whole, weight = (jnp.where(some, jax.nn.logsumexp(x, axis=-2), 0.0) for x in (both, answer_logps))
  return jnp.where(some, whole - weight, -jnp.inf)


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
  length, conditional, judged = _of_lengths(evidence, reference, scoring), None, debiased
  if scoring.conditional_weight:
    if evidence.exchanged is None:
      raise ValueError("conditional_weight: expected evidence with exchanged answers")
    conditional = conditional_expectation(*evidence.exchanged)
    judged = mixture(debiased, conditional, scoring.conditional_weight)
  total = combine(judged, evidence.formats, scoring.format_coefficient, evidence.repetition + length)
  return Rewards(
    reference=reference,
    baseline=baselines,
    debiased=debiased,
    format=evidence.formats,
    repetition=evidence.repetition,
    length=length,
    total=total,
    each_reference=each,
    conditional=conditional,
  )


def _of_lengths(evidence: Evidence, scores: Float[Array, "P G"], scoring: Scoring) -> Float[Array, "P G"]:
  """All that is taken off for lengths, at most 0."""
  length = scoring.length_coefficient * jnp.asarray(evidence.excess)
  if scoring.length_difference_coefficient:
    own = evidence.own
    if own is None:
      raise ValueError("length_difference_coefficient: expected evidence with own answers")
    penalty = two_sided_length(own.lengths, own.reference_lengths, scoring.length_difference_coefficient)
    length += jnp.where(jnp.asarray(own.found, bool), penalty, 0.0)
  if scoring.overlong_coefficient or scoring.concentration_coefficient:
    if evidence.responses is None:
      raise ValueError("overlong_coefficient, concentration_coefficient: expected evidence with lengths of responses")
    lengths, overlong = evidence.responses
    length += scoring.overlong_coefficient * jnp.asarray(overlong)
    if scoring.concentration_coefficient:
      penalty = concentration_penalty(scores, lengths, evidence.scorable, *scoring.concentration_quantiles)
      length += scoring.concentration_coefficient * penalty
  return length
