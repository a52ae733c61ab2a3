"""One optimiser step at the shapes of Qwen2.5-1.5B: packed rows, bfloat16 products, float32 masters, AdamW."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu import shapes
from benchmarks.gpu.measure import GIB, peak_bytes, published, seconds, timed, unless_too_large
from benchmarks.gpu.parts.ceilings import ceiling
from benchmarks.gpu.report import Report
from rlpr_jax import machine, models
from rlpr_jax.models import ModelConfig
from rlpr_jax.planning import hlo
from rlpr_jax.training import packing
from rlpr_jax.training.optimizer import clipped_optimizer
from rlpr_jax.training.update import Trainable, UpdateProgram, UpdateSettings, optimizer_step
from rlpr_jax.types import Groups, PackedRows

MASTERS = 26  # bytes a parameter of masters, moments, gradients, their sum, the step and a copy in bfloat16, about
ROW = 6 * GIB  # that a row of 4096 tokens keeps for its backward pass, about: products with weights, scores of a layer


class Sizes(NamedTuple):
  config: ModelConfig
  row_length: int  # tokens
  rows: int  # to be filled
  micro_batch_rows: int


def sizes(rehearse: bool) -> Sizes:
  if rehearse:
    return Sizes(shapes.TINY, 256, 2, 1)
  config = shapes.QWEN2_5_1_5B
  parameters = sum(x.size for x in jax.tree.leaves(models.abstract_params(config)))
  free = machine.device_memory() - MASTERS * parameters
  return Sizes(config, 4096, 20, 4 if free > 4 * ROW else 1)


class Prepared(NamedTuple):
  """An update that is compiled, and all that it needs."""

  step: Callable[[], Any]  # one update; its parameters and optimiser state go into the next one
  attention: str  # that it was compiled with
  seconds: float  # that compiling took
  rows: PackedRows
  used: int  # of the rows


def run(report: Report) -> None:
  size = sizes(report.rehearse)
  chip = published(jax.devices()[0].device_kind)
  rate = ceiling(report, "bfloat16")
  report.note(
    "model operations: 3 x (2 x weights of products x tokens + 4 x layers x heads x head size x pairs of a token and"
    " one that it sees), of prompts once a group in a row, and of the head for sampled tokens alone; what is computed"
    " again backwards, and padding, do not count"
  )
  report.note("masters, moments and gradients in float32, products in bfloat16, remat 'dots'; medians of up to 3 steps")
  seen: list[str] = []
  spent = 0.0
  for wanted in ("auto", "xla"):
    if wanted == "xla" and "xla" in seen:
      report.note("auto became xla: there is no kernel to compare with")
      continue
    if report.left() < spent:
      report.note(f"attention {wanted}: left out, no time")
      continue
    began = time.perf_counter()
    report.say(f"compiling with attention {wanted}")
    with unless_too_large(report, f"attention {wanted}"):
      prepared = prepare(size, wanted)
      seen.append(prepared.attention)
      report.say(f"running with attention {prepared.attention}")
      _, first = timed(prepared.step)
      repeats = min(max(int(report.left() / 4 / first), 1), 3)
      took, tokens = seconds(prepared.step, repeats), int(prepared.rows.mask.sum())
      flops = shapes.update_flops(size.config, prepared.rows)
      report.row(
        "update",
        {
          "attention": prepared.attention,
          "rows": f"{prepared.used} of {size.row_length}, {size.micro_batch_rows} at once",
          "sampled tokens": tokens,
          "padding": prepared.rows.padding(size.micro_batch_rows),
          "compile s": prepared.seconds,
          "s": took,
          "tokens/s": tokens / took,
          "model TFLOP": flops / 1e12,
          "of the measured bfloat16 rate": flops / took / rate,
          "of the published rate": flops / took / chip.flops if chip else None,
          "peak GiB so far": peak_bytes() and peak_bytes() / GIB,
        },
      )
      del prepared
    spent = time.perf_counter() - began


def prepare(size: Sizes, attention: str) -> Prepared:
  """Compiles the update and makes random parameters and rows."""
  model = models.definition(size.config, models.Runtime("bfloat16", attention, "dots"))
  optimizer = clipped_optimizer("adamw", 1e-6, 0.01, 1.0)
  rows = packed_rows(size.rows, size.row_length)
  used = int(np.any(rows.segment_ids > 0, axis=1).sum())
  settings = UpdateSettings(1.0, 0.2, 0.27, 0.0, size.micro_batch_rows)
  params = models.init_params(size.config, 0)
  rows_there = jax.tree.map(jnp.asarray, rows)
  state = [Trainable(params, jax.jit(optimizer.init)(params))]
  del params
  began = time.perf_counter()
  program = UpdateProgram(model, optimizer, settings)
  compiled = optimizer_step.trace(program, {}, state[0], rows_there).lower().compile()
  took = time.perf_counter() - began

  def step() -> dict[str, jax.Array]:
    trainable, metrics = compiled({}, state.pop(), rows_there)
    state.append(trainable)
    return metrics

  attention = ", ".join(hlo.kernels(compiled.as_text())) or "xla"
  return Prepared(step, attention, took, rows, used)


def packed_rows(rows: int, row_length: int) -> PackedRows:
  """Random tokens in about so many rows: prompts of about 150 tokens with 8 responses each of about 600, log-normal, as
  long as a row at most; where rows are shorter than 4096, in proportion."""
  rng, scale = np.random.default_rng(0), row_length / 4096
  prompts = max(int(rows * row_length / scale / 5900), 1)
  limits = np.array([row_length // 4, row_length - row_length // 4])

  def lengths(median: float, limit: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.clip(rng.lognormal(np.log(median * scale), 0.6, shape), 1, limit).astype(np.int32)

  groups = Groups(
    rng.integers(0, 500, (prompts, limits[0])).astype(np.int32),
    lengths(150, limits[0], (prompts,)),
    rng.integers(0, 500, (prompts, 8, limits[1])).astype(np.int32),
    lengths(600, limits[1], (prompts, 8)),
    np.full((prompts, 8, limits[1]), -7.0, np.float32),
    rng.normal(size=(prompts, 8)).astype(np.float32),
  )
  return packing.pack(groups, "token_mean", 8 * prompts, row_length)
