"""Prompts worth training on: those whose rewards spread (RLPR, section 3.3).

A group whose rewards are all alike teaches nothing. The threshold follows the policy: an exponential moving average of
the mean spread, so that it tightens and loosens with training. Imports nothing but jax and jaxtyping.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Real, Shaped

KINDS = ("ema", "fixed", "accuracy", "share", "off")


@dataclasses.dataclass(frozen=True)
class FilterConfig:
  """Settings of the filter; the defaults are the paper's for Qwen2.5."""

  kind: str = "ema"  # ema | fixed | accuracy | share | off; non-finite spreads are dropped by all of them
  scale: Real[ArrayLike, ""] = 0.5  # ema: a prompt is kept from scale * average on (Qwen 0.5, Llama 0.9, Gemma 1.0)
  alpha: Real[ArrayLike, ""] = 0.01  # ema: weight of the newest step in the average
  collect_from: Int[ArrayLike, ""] = 6  # ema: steps (counted from 1) before this one ignore the spread
  start: Int[ArrayLike, ""] = 11  # ema: first step that filters; its average starts as the mean of those collected
  threshold: Real[ArrayLike, ""] = 0.0  # fixed: smallest spread that is kept
  share: Real[ArrayLike, ""] = 0.9  # share: of the sum of a draw's spreads, that the prompts kept have


class FilterState(NamedTuple):
  """Memory of the filter between steps; part of the checkpoint."""

  step: Int[Array, ""]  # training steps finished
  average: Float[Array, ""]  # beta; during the warm-up the mean of what was collected
  collected: Int[Array, ""]  # how many steps the average has seen in the warm-up


def init(config: FilterConfig) -> FilterState:
  """Make the state before the first step.

  >>> init(FilterConfig()).step.item()
  0
  """
  if config.kind not in KINDS:
    raise ValueError(f"filter kind {config.kind!r}: expected one of {', '.join(KINDS)}")
  return FilterState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32))


def update(state: FilterState, stds: Float[ArrayLike, "P"], config: FilterConfig) -> FilterState:
  """Take in the spreads of one training step; call it once a step, after the step's last draw.

  beta <- (1 - alpha) beta + alpha * mean(stds). While collecting, beta is the running mean instead.

  Args:
    stds: spreads of all prompts sampled in the step, dropped ones included; non-finite ones are left out.

  >>> config = FilterConfig(collect_from=1, start=2)
  >>> update(init(config), jnp.array([0.1, 0.3, jnp.nan]), config).average.item()
  0.2
  """
  finite = jnp.isfinite(stds)
  known = jnp.any(finite)
  mean = jnp.sum(jnp.where(finite, stds, 0.0)) / jnp.maximum(jnp.sum(finite), 1)
  this_step = state.step + 1
  collecting = (this_step >= config.collect_from) & (this_step < config.start)
  # A step that starts filtering with nothing collected (every spread was non-finite) takes its own mean.
  averaging = collecting | ((this_step >= config.start) & (state.collected == 0))
  running = (state.average * state.collected + mean) / (state.collected + 1)
  moving = (1 - config.alpha) * state.average + config.alpha * mean
  average = jnp.where(averaging, running, jnp.where(this_step >= config.start, moving, state.average))
  return FilterState(
    step=this_step,
    average=jnp.where(known, average, state.average).astype(jnp.float32),
    collected=state.collected + (averaging & known).astype(jnp.int32),
  )


def threshold(
  state: FilterState, config: FilterConfig, scales: Real[ArrayLike, "P"] | None = None
) -> Float[Array, ""] | Float[Array, "P"]:
  """Smallest spread that the step under way keeps, -inf while nothing is filtered.

  Args:
    scales: in the place of `config.scale`, for each prompt its own; so is the threshold then. `ema` only.

  >>> threshold(FilterState(jnp.array(20), jnp.array(0.3), jnp.array(5)), FilterConfig(scale=0.5)).item()
  0.15
  """
  if config.kind == "fixed":
    return jnp.full((), config.threshold, jnp.float32)
  if config.kind != "ema":
    return jnp.full((), -jnp.inf)
  filtering = (state.step + 1 >= config.start) & (state.collected > 0)
  scale = config.scale if scales is None else jnp.asarray(scales, jnp.float32)
  return jnp.where(filtering, scale * state.average, -jnp.inf)


def keep_mixed(correct: Shaped[ArrayLike, "*P G"]) -> Bool[Array, "*P"]:
  """Prompts whose responses are neither all right nor all wrong: the accuracy filter of DAPO (arXiv 2503.14476).

  Args:
    correct: rewards of a verifier, right above 0.

  Returns:
    True where a prompt is kept; never for a group of one.

  >>> keep_mixed(jnp.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])).tolist()
  [True, False, False]
  """
  right = jnp.asarray(correct) > 0
  return jnp.any(right, axis=-1) & ~jnp.all(right, axis=-1)


def keep_by_share(
  spreads: Float[ArrayLike, "P"], share: Real[ArrayLike, ""] = 0.9, eps: float = 0.01
) -> Bool[Array, "P"]:
  """Prompts that spread most, as many as together have a share of all spread (RAGEN-2, arXiv 2604.06268).

  Args:
    spreads: of the prompts of one draw; those that are not finite, or at most 1e-10, are dropped.
    share: the largest are taken until their sum reaches share * (sum of all) - eps.

  Returns:
    True where a prompt is kept; nowhere if the sum of all is that small.

  >>> keep_by_share(jnp.array([0.1, 0.5, 0.0, 0.4])).tolist()
  [False, True, False, True]
  """
  spreads = jnp.asarray(spreads, jnp.float32)
  some = jnp.isfinite(spreads) & (spreads > 1e-10)
  spreads = jnp.where(some, spreads, 0.0)
  order = jnp.argsort(-spreads, stable=True)
  before = jnp.cumsum(spreads[order]) - spreads[order]
  needed = before < share * jnp.sum(spreads) - eps
  return some & jnp.zeros(spreads.shape, bool).at[order].set(needed)


def keep(
  state: FilterState,
  stds: Float[ArrayLike, "P"],
  config: FilterConfig,
  correct: Shaped[ArrayLike, "P G"] | None = None,
  scales: Real[ArrayLike, "P"] | None = None,
) -> Bool[Array, "P"]:
  """Prompts worth training on: those whose rewards spread at least as far as usual.

  Args:
    state: what the steps before this one left; the step's own spreads are not known yet when it refills.
    stds: unbiased standard deviation of each prompt's rewards.
    config: `scale` multiplies the average; 0.5 in the paper for Qwen2.5.
    correct: as for `keep_mixed`, which decides in the place of the spread; `accuracy` only, and needed there.
    scales: in the place of `config.scale`, for each prompt its own (by source, say); `ema` only.

  Returns:
    True where a prompt is kept. All finite prompts are kept until the warm-up is over (section 3.3).

  >>> config = FilterConfig(kind="fixed", threshold=0.1)
  >>> keep(init(config), jnp.array([0.3, 0.05, jnp.nan]), config).tolist()
  [True, False, False]
  """
  finite = jnp.isfinite(stds)
  if config.kind == "share":
    return keep_by_share(stds, config.share)
  if config.kind == "accuracy":
    if correct is None:
      raise ValueError('filter kind "accuracy": expected correct [P, G], what a verifier says of each response')
    return finite & keep_mixed(correct)
  return finite & (stds >= threshold(state, config, scales))
