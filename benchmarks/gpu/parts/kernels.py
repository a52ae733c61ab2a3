"""Attention kernels beside plain XLA: whether they give the same numbers, and how long they take.

The truth is plain XLA in float32 with products at the highest precision, on the same operands. A distance is the
largest difference over the largest number of the truth; of the output and the three gradients, the largest one.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

from benchmarks.gpu.measure import seconds
from benchmarks.gpu.report import Report
from rlpr_jax.models import kernels, masks
from rlpr_jax.models.attention import AttentionSettings, attend

# Of the distance. A kernel's products of float32 may be TF32 (11 bits); bfloat16 has 8, and probabilities are rounded
# to it as well.
BOUNDS = {"float32": 5e-3, "bfloat16": 3e-2}
ROWS, LENGTH, HEADS, KV_HEADS = 2, 4096, 8, 2

Attend = Callable[..., jax.Array]  # (queries, keys, values, places, settings)


class Case(NamedTuple):
  dtype: str
  head_dim: int
  window: int | None = None  # tokens
  softcap: float | None = None

  def __str__(self) -> str:
    parts = [self.dtype, f"head {self.head_dim}", self.window and f"window {self.window}"]
    return ", ".join(filter(None, [*parts, self.softcap and f"cap {self.softcap:g}"]))


# What training meets most comes first: time may end before the others. Triton's kernels of float32 compile for long.
CASES = (
  Case("bfloat16", 128),
  Case("bfloat16", 64),
  Case("bfloat16", 256, window=1024, softcap=50.0),
  Case("bfloat16", 128, window=1024),
  Case("bfloat16", 128, softcap=50.0),
  Case("float32", 64, window=1024, softcap=50.0),
  Case("bfloat16", 256),
  Case("float32", 128),
  Case("float32", 256),
)


def run(report: Report) -> None:
  rows, length, shrink = (1, 256, 16) if report.rehearse else (ROWS, LENGTH, 1)
  report.note(
    f"{rows} packed rows of {length} tokens, {HEADS} query and {KV_HEADS} key/value heads; ms are of the output and the"
    " gradients together; the kernels and xla are run at the default precision, the truth in float32 at the highest"
  )
  last = 0.0
  with _contenders(report) as contenders:
    for case in CASES:
      if report.left() < 1.5 * last:
        report.note(f"{case}: left out, no time")
        continue
      report.say(str(case))
      began = time.perf_counter()
      _compare(report, case._replace(window=case.window and case.window // shrink), rows, length, contenders)
      last = time.perf_counter() - began


def _compare(report: Report, case: Case, rows: int, length: int, contenders: dict[str, Attend]) -> None:
  operands = random_operands(case, rows, length)
  settings = AttentionSettings("xla", case.head_dim**-0.5, case.softcap, case.window)
  places = places_of(rows, length)._replace(windowed=None if case.window is None else jnp.array(True))

  def lower(contender: Attend, operands) -> jax.stages.Lowered:
    def both(queries, keys, values, gradient):
      y, backwards = jax.vjp(lambda *x: contender(*x, places, settings), queries, keys, values)
      return y, *backwards(gradient)

    return jax.jit(both).lower(*operands)

  precise = [x.astype(jnp.float32) for x in operands]
  with jax.default_matmul_precision("highest"):
    truth = jax.device_get(lower(_plain, precise).compile()(*precise))
  del precise
  plain = lower(_plain, operands).compile()
  plain_distance, plain_seconds = distance(plain(*operands), truth), seconds(lambda: plain(*operands))
  columns = {"dtype": case.dtype, "head": case.head_dim, "window": case.window, "cap": case.softcap}
  bound = BOUNDS[case.dtype]
  report.row(
    "kernels",
    {"attention": "xla"} | columns | {"distance": plain_distance, "bound": bound, "ms": 1e3 * plain_seconds},
    ok=plain_distance <= bound,
  )
  for name, contender in contenders.items():
    row = {"attention": name} | columns
    try:
      lowered = lower(contender, operands)
    except Exception as error:  # in many ways a kernel says that something is not for it; a run takes the next one
      report.row("kernels", row | {"why not": _line(error)})
      continue
    try:
      kernel = lowered.compile()
      found, took = distance(kernel(*operands), truth), seconds(lambda kernel=kernel: kernel(*operands))
    except Exception as error:  # here a run would end
      report.row("kernels", row | {"bound": bound, "why not": _line(error)}, ok=False)
      continue
    numbers = {"distance": found, "bound": bound, "ms": 1e3 * took, "times as fast as xla": plain_seconds / took}
    report.row("kernels", row | numbers, ok=found <= bound)


def _line(error: Exception) -> str:
  return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def distance(found: tuple[jax.Array, ...], truth: tuple[np.ndarray, ...]) -> float:
  """The largest difference of any array over its largest number, in float32; not a number if one is not."""
  pairs = zip((np.asarray(x, np.float32) for x in found), truth, strict=True)
  return float(np.max([np.max(np.abs(x - y)) / np.max(np.abs(y)) for x, y in pairs]))


def random_operands(case: Case, rows: int, length: int) -> tuple[jax.Array, ...]:
  """Queries, keys, values and the gradient of the output, normal."""
  keys, heads = jax.random.split(jax.random.key(0), 4), (HEADS, KV_HEADS, KV_HEADS, HEADS)
  shapes = [(rows, length, count, case.head_dim) for count in heads]
  return tuple(jax.random.normal(*pair).astype(case.dtype) for pair in zip(keys, shapes, strict=True))


def places_of(rows: int, length: int) -> masks.Places:
  """Rows of a stem with two branches and another text, of unlike lengths; the last eighth of each other is padding."""
  segments, groups = np.ones((2, rows, length), np.int32)
  segments[:, length // 5 :] = 2
  segments[:, length // 2 + 3 :] = 3
  segments[:, length // 2 + length // 6 :] = 4
  groups[:, length // 2 + length // 6 :] = 2
  for ids in (segments, groups):
    ids[::2, length - length // 8 :] = 0
  return masks.Places(jnp.asarray(segments), group_ids=jnp.asarray(groups))


@contextlib.contextmanager
def _contenders(report: Report) -> Iterator[dict[str, Attend]]:
  """The kernels that are there, by name: tokamax's, and in a rehearsal the TPUs' splash, interpreted."""
  found: dict[str, Attend] = {}
  try:
    implementations, mask = kernels.import_tokamax()
  except Exception as error:  # it may be missing, or made for another JAX
    report.note(f"tokamax's kernels are not there: {_line(error)}")
  else:
    names = ("mosaic_gpu", "triton", *(["xla"] if report.rehearse else []))
    found = {f"tokamax {name}": functools.partial(_tokamax, implementations.get(name), mask) for name in names}
  if not report.rehearse:
    yield found
    return
  kernel = splash_attention_kernel.SplashAttentionKernel

  def interpreted(*args, **options):
    return kernel(*args, **options | {"interpret": True})

  with mock.patch.object(splash_attention_kernel, "SplashAttentionKernel", interpreted):
    yield {"splash, interpreted": kernels.splash_attention} | found


def _tokamax(implementation, mask, queries, keys, values, places, settings) -> jax.Array:
  visible = places.first_visible(settings.window), places.visible_until()
  return kernels.attend_tokamax(implementation, mask, settings, queries, keys, values, visible)


def _plain(queries, keys, values, places, settings) -> jax.Array:
  return attend(queries, keys, values, places, settings)
