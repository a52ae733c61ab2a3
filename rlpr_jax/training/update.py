"""One optimiser step on one minibatch: log-probabilities, clipped loss, gradients, AdamW."""

import dataclasses
import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from rlpr_jax import grpo
from rlpr_jax.models import Decoder, Params, combine, place
from rlpr_jax.sharding import Sharding
from rlpr_jax.types import PackedRows

Carry = TypeVar("Carry")


@dataclasses.dataclass(frozen=True)
class UpdateSettings:
  """What the compiled update depends on, beside its shapes."""

  temperature: float  # of the sampling distribution
  clip_low: float
  clip_high: float
  entropy_coefficient: float
  micro_batch_rows: int  # rows whose gradients are taken at once
  loss: str = "clip"  # clip | truncated
  dual_clip: float = 0.0  # 0 for none
  ratio_cap: float = 2.0  # of truncated
  kl_coefficient: float = 0.0
  sharding: Sharding = Sharding()


def learning_rate(peak: float, schedule: str, warmup: int, total: int) -> optax.ScalarOrSchedule:
  """The rate of each optimiser step: up to `peak` in `warmup` steps, then constant or down to zero at `total`."""
  after = {
    "constant": optax.constant_schedule(peak),
    "linear": optax.linear_schedule(peak, 0.0, total - warmup),
    "cosine": optax.cosine_decay_schedule(peak, total - warmup),
  }[schedule]
  if not warmup:
    return peak if schedule == "constant" else after
  return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def adamw(
  learning_rate: optax.ScalarOrSchedule, weight_decay: float, max_grad_norm: float
) -> optax.GradientTransformation:
  """AdamW behind a clip of the gradient's global norm."""
  return optax.chain(optax.clip_by_global_norm(max_grad_norm), optax.adamw(learning_rate, weight_decay=weight_decay))


def row_logprobs(
  model: nnx.GraphDef, params: Params, rows: PackedRows, temperature: float
) -> tuple[Float[Array, "R L"], Float[Array, "R L"]]:
  """Log-probability of the token at each place given those before it in its segment, and the entropy there.

  Place 0 and the first token of a segment have no prediction; their value means nothing and no mask covers them.
  """
  decoder: Decoder = nnx.merge(model, params)
  hidden = decoder(rows.tokens, rows.positions, rows.segment_ids)
  logps, entropy = decoder.logprobs(hidden[:, :-1], rows.tokens[:, 1:], temperature)
  shift = ((0, 0), (1, 0))  # what is predicted at place t - 1 is the token at place t
  return jnp.pad(logps, shift), jnp.pad(entropy, shift)


def loss(
  model: nnx.GraphDef, params: Params, rows: PackedRows, settings: UpdateSettings
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """This micro-batch's share of the minibatch's loss, and sums over its response tokens for the metrics."""
  logps, entropy = row_logprobs(model, params, rows, settings.temperature)
  everywhere = logps
  logps = jnp.where(rows.mask, logps, 0.0)
  if settings.loss == "truncated":
    token_loss, ratio, clipped = grpo.truncated_loss(logps, rows.old_logprobs, rows.advantages, settings.ratio_cap)
  else:
    token_loss, ratio, clipped = grpo.clipped_loss(
      logps, rows.old_logprobs, rows.advantages, settings.clip_low, settings.clip_high, settings.dual_clip or None
    )
  policy_loss = jnp.sum(rows.weights * token_loss)
  entropy = jnp.where(rows.mask, entropy, 0.0)
  sums = {
    "tokens": jnp.sum(rows.mask),
    "loss": policy_loss,
    "entropy": jnp.sum(entropy),
    "ratio": jnp.sum(ratio * rows.mask),
    "ratio_worst": jnp.max(jnp.abs(ratio - 1) * rows.mask),
    "clipped": jnp.sum(clipped & rows.mask),
  }
  total = policy_loss - settings.entropy_coefficient * jnp.sum(rows.weights * entropy)
  if rows.answer_weights is not None:
    sums["answer_loss"] = -jnp.sum(jnp.where(rows.answer_weights == 0, 0.0, rows.answer_weights * everywhere))
    total += sums["answer_loss"]
  if rows.reference_logprobs is not None:
    kl = jnp.where(rows.mask, grpo.kl_k3(logps, jnp.where(rows.mask, rows.reference_logprobs, 0.0)), 0.0)
    sums["kl"] = jnp.sum(kl)
    total += settings.kl_coefficient * jnp.sum(rows.weights * kl)
  return total, sums


@functools.partial(jax.jit, static_argnames=("model", "settings"))
def reference_logprobs(
  model: nnx.GraphDef, params: Params, rows: PackedRows, settings: UpdateSettings
) -> Float[Array, "R L"]:
  """Log-probabilities of the rows' tokens under the policy that a KL term measures from."""

  def one(micro_batch: PackedRows, logps: jax.Array, i: jax.Array) -> jax.Array:
    return logps.at[i].set(row_logprobs(model, params, micro_batch, settings.temperature)[0])

  empty = jnp.zeros(
    (rows.tokens.shape[0] // settings.micro_batch_rows, settings.micro_batch_rows, rows.tokens.shape[1])
  )
  return _each_micro_batch(one, empty, rows, settings).reshape(rows.tokens.shape)


def _each_micro_batch(
  step: Callable[[PackedRows, Carry, jax.Array], Carry], start: Carry, rows: PackedRows, settings: UpdateSettings
) -> Carry:
  """Folds `step(micro_batch, carry, number)` over the micro-batches in use: packed rows come first, padding last.

  How many there are depends on the data, what is compiled does not.
  """
  size, constrain = settings.micro_batch_rows, settings.sharding.constrain
  used = jnp.sum(jnp.any(rows.segment_ids > 0, axis=1))
  stacked = jax.tree.map(lambda x: constrain(x.reshape(-1, size, *x.shape[1:]), None, "batch", None), rows)
  return jax.lax.fori_loop(
    0, (used + size - 1) // size, lambda i, carry: step(jax.tree.map(lambda x: x[i], stacked), carry, i), start
  )


@functools.partial(jax.jit, static_argnames=("model", "optimizer", "settings"), donate_argnames=("params", "opt_state"))
def update(
  model: nnx.GraphDef,
  optimizer: optax.GradientTransformation,
  frozen: Params,
  params: Params,
  opt_state: optax.OptState,
  rows: PackedRows,
  settings: UpdateSettings,
) -> tuple[Params, optax.OptState, dict[str, jax.Array]]:
  """One optimiser step. Gradients of micro-batches add up, since the rows' weights already hold the minibatch's mean.

  A loss or gradient that is not finite changes neither parameters nor optimiser state.

  Args:
    frozen: parameters that are not trained (the base under LoRA); empty when all are.

  Returns:
    parameters, optimiser state, and metrics: `loss` (of the sampled tokens alone), `entropy` (nats a token),
    `ratio_mean`, `ratio_worst` (largest |ratio - 1|), `clip_fraction`, `grad_norm` (before clipping), `skipped` (1
    where the step was not finite), and where there are such terms `answer_loss` and `kl` (nats a token).
  """

  def share(params, micro_batch):
    return loss(model, combine(frozen, params), micro_batch, settings)

  def accumulate(micro_batch, total, _):
    sums, gradients = total
    (_, new), micro = jax.value_and_grad(share, has_aux=True)(params, micro_batch)
    worst = jnp.maximum(sums["ratio_worst"], new["ratio_worst"])
    sums = jax.tree.map(jnp.add, sums, new) | {"ratio_worst": worst}
    return sums, place(jax.tree.map(jnp.add, gradients, micro), settings.sharding)

  shapes = jax.eval_shape(lambda: share(params, jax.tree.map(lambda x: x[: settings.micro_batch_rows], rows))[1])
  start = (
    jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
    place(jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params), settings.sharding),
  )
  sums, gradients = _each_micro_batch(accumulate, start, rows, settings)
  tokens, grad_norm = jnp.maximum(sums["tokens"], 1), optax.tree.norm(gradients)
  steps, new_opt_state = optimizer.update(gradients, opt_state, params)
  sound = jnp.isfinite(grad_norm) & jnp.isfinite(sums["loss"])
  params, opt_state = jax.tree.map(
    functools.partial(jnp.where, sound), (optax.apply_updates(params, steps), new_opt_state), (params, opt_state)
  )
  metrics = {
    "loss": sums["loss"],
    "entropy": sums["entropy"] / tokens,
    "ratio_mean": sums["ratio"] / tokens,
    "ratio_worst": sums["ratio_worst"],
    "clip_fraction": sums["clipped"] / tokens,
    "grad_norm": grad_norm,
    "skipped": ~sound,
  }
  if "answer_loss" in sums:
    metrics["answer_loss"] = sums["answer_loss"]
  if "kl" in sums:
    metrics["kl"] = sums["kl"] / tokens
  return place(params, settings.sharding), opt_state, metrics
