"""What the card can do at most: copying, and products of matrices. Other parts compare with it."""

import jax
import jax.numpy as jnp

from benchmarks.gpu.measure import GIB, published, seconds
from benchmarks.gpu.report import Report
from rlpr_jax import machine

BANDWIDTH = "bandwidth"  # bytes a second, those read and those written
# Operations a second of products, by name: dtype and precision.
PRODUCTS = {
  "bfloat16": ("bfloat16", None),
  "TF32": ("float32", jax.lax.Precision.DEFAULT),
  "float32": ("float32", jax.lax.Precision.HIGHEST),
}


def run(report: Report) -> None:
  chip = published(jax.devices()[0].device_kind)
  report.say("copying")
  rate, what = _bandwidth(report.rehearse)
  report.value(BANDWIDTH, rate)
  report.row("ceilings", {"what": what, "TB/s": rate / 1e12, "published": chip and chip.bandwidth / 1e12})
  for name in PRODUCTS:
    report.say(f"products in {name}")
    rate, what = _products(name, report.rehearse)
    report.value(name, rate)
    peak = chip.flops / 1e12 if chip and name == "bfloat16" else None
    report.row("ceilings", {"what": what, "TFLOP/s": rate / 1e12, "published": peak})
  report.note("random numbers, not zeros, which are faster; medians of 5 repeats")


def ceiling(report: Report, name: str) -> float:
  """Bytes or operations a second, by `BANDWIDTH` or a name of `PRODUCTS`: as measured before, or measured now."""
  rate = report.earlier("ceilings", name)
  if rate is None:
    report.say(f"no ceiling of {name} from before: measuring it")
    rate, _ = _bandwidth(report.rehearse) if name == BANDWIDTH else _products(name, report.rehearse)
  return rate


def _bandwidth(rehearse: bool) -> tuple[float, str]:
  size = 2**22 if rehearse else min(4 * GIB, machine.device_memory() // 8)  # beside three copies of it
  x = jax.block_until_ready(jax.jit(lambda key: jax.random.bits(key, (size // 4,)))(jax.random.key(0)))

  run = jax.jit(jnp.bitwise_not)
  jax.block_until_ready(run(x))
  return 2 * size / seconds(lambda: run(x), calls=3), f"copy of {size / GIB:.3g} GiB, read and written"


def _products(name: str, rehearse: bool) -> tuple[float, str]:
  dtype, precision = PRODUCTS[name]
  size = 256 if rehearse else 8192
  a, b = (jax.random.normal(key, (size, size)).astype(dtype) for key in jax.random.split(jax.random.key(0)))
  run = jax.jit(lambda a, b: jnp.matmul(a, b, precision=precision))
  jax.block_until_ready(run(a, b))
  rate = 2 * size**3 / seconds(lambda: run(a, b), calls=10)
  return rate, f"products in {name}, {size} x {size} x {size}"
