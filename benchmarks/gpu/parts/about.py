"""What the numbers were measured on, and which attention runs there."""

import importlib.metadata
import os
import platform
import shutil
import subprocess

import jax
import jax.numpy as jnp

from benchmarks.gpu.measure import GIB, published
from benchmarks.gpu.report import Report
from rlpr_jax import machine, models
from rlpr_jax.models.attention import AttentionSettings, attend
from rlpr_jax.models.masks import Places
from rlpr_jax.planning import hlo

PACKAGES = (
  "jax",
  "jaxlib",
  "jax-cuda13-plugin",
  "flax",
  "optax",
  "orbax-checkpoint",
  "transformers",
  "torch",
  "tokamax",
)
ENVIRONMENT = ("XLA_FLAGS", "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE", "CUDA_VISIBLE_DEVICES")


def run(report: Report) -> None:
  def say(what: str, value: object) -> None:
    report.row("about", {"what": what, "value": value})

  device = jax.devices()[0]
  say("devices", f"{jax.device_count()} x {device.device_kind} ({jax.default_backend()})")
  say("driver, memory, power limit", _smi("driver_version,memory.total,power.limit"))
  say("memory that JAX may use, GiB", machine.device_memory() / GIB)
  chip = published(device.device_kind)
  rates = (
    f"{chip.flops / 1e12:.0f} TFLOP/s in bfloat16, {chip.bandwidth / 1e12:.2f} TB/s" if chip else "not in the table"
  )
  say("published rates", rates)
  say("host", f"{os.cpu_count()} cores, {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / GIB:.0f} GiB")
  say("Python", platform.python_version())
  for package in PACKAGES:
    say(package, _version(package))
  for name in ENVIRONMENT:
    say(name, os.environ.get(name, "not set"))
  precision = jax.config.jax_default_matmul_precision or "default, which is TF32 on NVIDIA GPUs from Ampere on"
  say("precision of float32 products", precision)
  say("attention: auto", models.default_attention(jax.default_backend()))
  for dtype in ("bfloat16", "float32"):
    say(f"attention of whole rows in {dtype}", _attention(dtype))
  say("attention over the cache", "xla")


def _attention(dtype: str) -> str:
  """What "auto" compiles to here."""
  backend = models.default_attention(jax.default_backend())
  queries, keys = jnp.ones((1, 256, 4, 128), dtype), jnp.ones((1, 256, 2, 128), dtype)
  ids = jnp.ones((1, 256), jnp.int32)
  settings = AttentionSettings(backend, 0.1)
  compiled = jax.jit(lambda *x: attend(*x, Places(ids), settings)).lower(queries, keys, keys).compile()
  return ", ".join(hlo.kernels(compiled.as_text())) or "xla"


def _smi(fields: str) -> str:
  if not shutil.which("nvidia-smi"):
    return "no nvidia-smi"
  done = subprocess.run(
    ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"], capture_output=True, text=True, check=False
  )
  return done.stdout.strip() or done.stderr.strip()


def _version(package: str) -> str:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return "not installed"
