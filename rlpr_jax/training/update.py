"""One optimiser step on one minibatch: log-probabilities, policy loss, gradients, optimiser.

state, metrics = update(state, rows)
"""

import dataclasses
import functools
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from rlpr_jax import grpo
from rlpr_jax.models import ModelGraph, Params, combine, place
from rlpr_jax.sharding import Sharding
from rlpr_jax.training.logprobs import fold_micro_batches, row_logprobs
from rlpr_jax.types import PackedRows


@dataclasses.dataclass(frozen=True)
class UpdateSettings:
  """Settings of the compiled update."""

  temperature: float  # of the sampling distribution
  clip_low: float
  clip_high: float
  entropy_coefficient: float
  micro_batch_rows: int  # rows whose gradients are taken at once
  loss: str = "clip"  # clip | truncated
  dual_clip: float = 0.0  # 0 for none
  ratio_cap: float = 2.0  # of truncated
  ratio: str = "token"  # token | sequence
  kl_coefficient: float = 0.0
  sharding: Sharding = Sharding()


def loss(
  model: ModelGraph, params: Params, rows: PackedRows, settings: UpdateSettings
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """This micro-batch's share of the minibatch's loss, and sums over its response tokens for the metrics."""
  logps, entropy = row_logprobs(model, params, rows, settings.temperature)
  policy_loss, sums = grpo.policy_loss(
    logps,
    rows.old_logprobs,
    rows.advantages,
    rows.mask,
    clip_low=settings.clip_low,
    clip_high=settings.clip_high,
    dual_clip=settings.dual_clip or None,
    ratio_cap=settings.ratio_cap if settings.loss == "truncated" else None,
    weights=rows.weights,
    sequence_ids=rows.segment_ids if settings.ratio == "sequence" else None,
  )
  entropy = jnp.where(rows.mask, entropy, 0.0)
  sums |= {"loss": policy_loss, "entropy": jnp.sum(entropy)}
  total = policy_loss - settings.entropy_coefficient * jnp.sum(rows.weights * entropy)
  if rows.answer_weights is not None:
    sums["answer_loss"] = -jnp.sum(jnp.where(rows.answer_weights == 0, 0.0, rows.answer_weights * logps))
    total += sums["answer_loss"]
  if rows.reference_logprobs is not None:
    masked, reference = (jnp.where(rows.mask, x, 0.0) for x in (logps, rows.reference_logprobs))
    kl = jnp.where(rows.mask, grpo.kl_k3(masked, reference), 0.0)
    sums["kl"] = jnp.sum(kl)
    total += settings.kl_coefficient * jnp.sum(rows.weights * kl)
  return total, sums


class UpdateProgram(NamedTuple):
  """All that an update is compiled for, beside its shapes."""

  model: ModelGraph
  optimizer: optax.GradientTransformation
  settings: UpdateSettings


class Trainable(NamedTuple):
  """The part of a state that an update changes."""

  params: Params  # those that are trained
  opt_state: optax.OptState


@functools.partial(jax.jit, static_argnames=("program",), donate_argnames=("trainable",))
def optimizer_step(
  program: UpdateProgram, frozen: Params, trainable: Trainable, rows: PackedRows
) -> tuple[Trainable, dict[str, jax.Array]]:
  """Takes one optimiser step. Gradients of micro-batches add up: the rows' weights hold the minibatch's mean already.

  A loss or gradient that is not finite changes neither parameters nor optimiser state.

  Args:
    frozen: parameters that are not trained (the base under LoRA); empty when all are.
    trainable: is donated.

  Returns:
    the new `trainable`, and metrics: `loss` (of the sampled tokens alone), `entropy` (nats a token), `ratio_mean`,
    `ratio_worst` (largest |ratio - 1|), `clip_fraction`, `grad_norm` (before clipping), `skipped` (1 where the step was
    not finite), and where there are such terms `answer_loss` and `kl` (nats a token).
  """
  model, optimizer, settings = program
  params = trainable.params

  def share(params: Params, micro_batch: PackedRows) -> tuple[jax.Array, dict[str, jax.Array]]:
    return loss(model, combine(frozen, params), micro_batch, settings)

  # 1. Gradients of each micro-batch, added up in float32, each device keeping its part.
  def accumulate(
    micro_batch: PackedRows, total: tuple[dict[str, jax.Array], Params], _: jax.Array
  ) -> tuple[dict[str, jax.Array], Params]:
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
  sums, gradients = fold_micro_batches(accumulate, start, rows, settings.micro_batch_rows, settings.sharding)

  # 2. The optimiser's step, which is not taken where anything is not finite.
  grad_norm = optax.tree.norm(gradients)
  steps, opt_state = optimizer.update(gradients, trainable.opt_state, params)
  sound = jnp.isfinite(grad_norm) & jnp.isfinite(sums["loss"])
  stepped = Trainable(optax.apply_updates(params, steps), opt_state)
  new = jax.tree.map(functools.partial(jnp.where, sound), stepped, trainable)

  # 3. Sums over the minibatch's tokens become its metrics.
  tokens = jnp.maximum(sums["tokens"], 1)
  metrics = {
    "loss": sums["loss"],
    "entropy": sums["entropy"] / tokens,
    "ratio_mean": sums["ratio_sum"] / tokens,
    "ratio_worst": sums["ratio_worst"],
    "clip_fraction": sums["clipped_tokens"] / tokens,
    "grad_norm": grad_norm,
    "skipped": ~sound,
  }
  if "answer_loss" in sums:
    metrics["answer_loss"] = sums["answer_loss"]
  if "kl" in sums:
    metrics["kl"] = sums["kl"] / tokens
  return new._replace(params=place(new.params, settings.sharding)), metrics


AnyState = TypeVar("AnyState", bound="State")


@runtime_checkable
class State(Protocol):
  """A NamedTuple with what an update changes, such as `types.TrainState`."""

  @property
  def params(self) -> Params: ...

  @property
  def opt_state(self) -> optax.OptState: ...

  def _replace(self: AnyState, *, params: Params = ..., opt_state: optax.OptState = ...) -> AnyState: ...


class Update(NamedTuple):
  """An optimiser step of a run: `state, metrics = update(state, rows)`."""

  program: UpdateProgram
  frozen: Params  # parameters that are not trained

  def __call__(self, state: AnyState, rows: PackedRows) -> tuple[AnyState, dict[str, jax.Array]]:
    """Takes the step on a minibatch. The state's parameters and optimiser state are donated, all else stays."""
    trainable, metrics = optimizer_step(self.program, self.frozen, Trainable(state.params, state.opt_state), rows)
    return state._replace(params=trainable.params, opt_state=trainable.opt_state), metrics
