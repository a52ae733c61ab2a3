"""Optimisers of the updates and of the supervised warm start, and where their state lies on a mesh."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import optax
from ml_collections import ConfigDict
from optax.contrib import MuonDimensionNumbers, muon

from rlpr_jax.models import Params, matrix_axes, param_axes
from rlpr_jax.models.weights import Path, key_path
from rlpr_jax.sharding import Sharding


def learning_rate(peak: float, schedule: str, warmup: int, total: int) -> optax.ScalarOrSchedule:
  """The rate of each optimiser step: up to `peak` in `warmup` steps, then constant or down to zero at `total`.

  >>> [float(learning_rate(2.0, "linear", warmup=2, total=4)(step)) for step in range(5)]
  [0.0, 1.0, 2.0, 1.0, 0.0]
  """
  after = {
    "constant": optax.constant_schedule(peak),
    "linear": optax.linear_schedule(peak, 0.0, total - warmup),
    "cosine": optax.cosine_decay_schedule(peak, total - warmup),
  }[schedule]
  if not warmup:
    return peak if schedule == "constant" else after
  return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def create_optimizer(config: ConfigDict) -> optax.GradientTransformation:
  """Creates the optimiser of a run's updates."""
  training = config.training
  return clipped_optimizer(training.optimizer, _run_rate(config), training.weight_decay, training.max_grad_norm)


def rate_of_step(config: ConfigDict, step: int) -> float:
  """The learning rate of a training step's first update, if none before it was left out; steps count from 1.

  >>> from rlpr_jax import config as configs
  >>> config = configs.default()
  >>> config.steps, config.training.learning_rate, config.training.schedule = 10, 1e-6, "linear"
  >>> rate_of_step(config, step=6)
  5e-07
  """
  rate = _run_rate(config)
  return float(rate((step - 1) * _updates_per_step(config))) if callable(rate) else float(rate)


def _run_rate(config: ConfigDict) -> optax.ScalarOrSchedule:
  training, updates = config.training, _updates_per_step(config)
  steps = max(config.steps, training.warmup_steps + 1)  # of 0 steps, which a warm start alone has, no rate is taken
  return learning_rate(training.learning_rate, training.schedule, training.warmup_steps * updates, steps * updates)


def _updates_per_step(config: ConfigDict) -> int:
  return int(config.training.minibatches * config.training.epochs_per_step)


def clipped_optimizer(
  kind: str, rate: optax.ScalarOrSchedule, weight_decay: float, max_grad_norm: float
) -> optax.GradientTransformation:
  """An optimiser behind a clip of the gradient's global norm. Weight decay is decoupled: rate * decay * weight.

  Args:
    kind: `adamw`; `adafactor`: second moments by row and column (Shazeer & Stern 2018), without a first one, and with
      rates as they are given; `muon`: linear layers' weights are orthogonalised and scaled to the size of AdamW's steps
      (Jordan 2024; arXiv 2502.16982), AdamW takes the others; `sgd`, with momentum 0.9.
  """
  decay = (optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(rate))
  match kind:
    case "adamw":
      optimizer = optax.adamw(rate, weight_decay=weight_decay)
    case "adafactor":
      optimizer = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), *decay)
    case "muon":
      optimizer = muon(
        rate,
        weight_decay=weight_decay,
        adam_weight_decay=weight_decay,
        adam_learning_rate=rate,
        muon_weight_dimension_numbers=muon_dimensions,
        consistent_rms=0.2,
      )
    case "sgd":
      optimizer = optax.chain(optax.trace(decay=0.9), *decay)
    case _:
      raise ValueError(f"optimizer {kind!r}: expected one of adamw, adafactor, muon, sgd")
  return optax.chain(optax.clip_by_global_norm(max_grad_norm), optimizer)


@functools.cache  # one object, so that a step compiles once
def warm_start_optimizer(kind: str, steps: int, rate: float, adam_learning_rate: float) -> optax.GradientTransformation:
  """Creates the optimiser of supervised steps; rates follow a cosine to zero.

  Args:
    kind: `muon` on the layers' matrices, at `rate`, and Adam on the others, or `adam` on everything.
  """
  adam_schedule = optax.cosine_decay_schedule(adam_learning_rate, steps)
  if kind == "adam":
    return optax.adam(adam_schedule)
  return muon(
    optax.cosine_decay_schedule(rate, steps),
    adam_learning_rate=adam_schedule,
    muon_weight_dimension_numbers=muon_dimensions,
  )


def muon_dimensions(params: Params) -> Params:
  """Says of each parameter which axes Muon takes as the rows and columns of a matrix; None where Adam serves."""

  def dimensions(path: Sequence[jax.tree_util.DictKey], _: jax.Array) -> MuonDimensionNumbers | None:
    axes = matrix_axes(key_path(path))
    return MuonDimensionNumbers(*axes) if axes else None

  return jax.tree_util.tree_map_with_path(dimensions, params)


def moment_axes(path: Path, param_shape: tuple[int, ...], shape: tuple[int, ...]) -> tuple[str | None, ...]:
  """Names the axes of a moment of the parameter at `path`, as far as they are the parameter's.

  A moment may have one number for an axis, or lack it: then it is matched with those that are left, from the first on.

  >>> moment_axes(("layers", "up", "weight"), (2, 8, 32), (2, 8, 32))
  ('layers', 'embed', 'mlp')
  >>> moment_axes(("layers", "up", "weight"), (2, 8, 32), (2, 32))
  ('layers', 'mlp')
  >>> moment_axes(("layers", "up", "weight"), (2, 8, 32), (2, 1, 1))
  ('layers', None, None)
  """
  axes = param_axes(path)
  if len(shape) == len(param_shape):
    return tuple(axis if size == whole else None for axis, size, whole in zip(axes, shape, param_shape, strict=True))
  names, place = [], 0
  for size in shape:
    match = next((i for i in range(place, len(param_shape)) if param_shape[i] == size), None)
    names.append(None if match is None else axes[match])
    place = place if match is None else match + 1
  return tuple(names)


def abstract_opt_state(optimizer: optax.GradientTransformation, params: Params, sharding: Sharding) -> optax.OptState:
  """Shapes, dtypes and shardings of the optimiser's state: moments lie as their parameters do, all else everywhere."""
  shapes = {key_path(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

  def place(path: Sequence[Any], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    keys = key_path([key for key in path if isinstance(key, jax.tree_util.DictKey)])
    param = next((keys[i:] for i in range(len(keys)) if keys[i:] in shapes), None)  # whose moment this is
    axes = moment_axes(param, shapes[param], leaf.shape) if param else ()
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.named(axes))

  return jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, params))


def init_opt_state(optimizer: optax.GradientTransformation, params: Params, sharding: Sharding) -> optax.OptState:
  """Makes the optimiser's first state where it is to lie."""
  shardings = jax.tree.map(lambda x: x.sharding, abstract_opt_state(optimizer, params, sharding))
  return jax.jit(optimizer.init, out_shardings=shardings)(params)
