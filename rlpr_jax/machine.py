"""The machine of a run: versions, devices and their memory, in the lines that begin every run."""

import os
import platform

import jax
from jax.sharding import Mesh

import rlpr_jax

GIB = 2**30


def device_memory() -> int:
  """Bytes that a device of this process may use; on a CPU those of the machine."""
  stats = jax.local_devices()[0].memory_stats() or {}
  return stats.get("bytes_limit", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def free_memory() -> int:
  """Bytes that the first device still has, or the host where the device does not say."""
  stats = jax.local_devices()[0].memory_stats()
  if stats and "bytes_limit" in stats:
    return stats["bytes_limit"] - stats["bytes_in_use"]
  return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def describe(mesh: Mesh, attention: str, compute_dtype: str) -> str:
  """Two lines: what runs, and on what.

  Args:
    mesh: of all processes.
    attention: the backend of whole sequences, as `config.model.attention` names it.
    compute_dtype: of products with weights.
  """
  kinds = sorted({device.device_kind for device in mesh.devices.flat})
  axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
  products = compute_dtype
  if compute_dtype == "float32" and jax.default_backend() in ("gpu", "tpu"):
    # Of their matrix units the default is fewer bits: TF32 on an NVIDIA GPU from Ampere on, bfloat16 on a TPU.
    products += f" at matmul precision {jax.config.read('jax_default_matmul_precision') or 'default'}"
  return (
    f"rlpr_jax {rlpr_jax.__version__}, jax {jax.__version__}, Python {platform.python_version()}\n"
    f"devices: {mesh.size} x {', '.join(kinds)} of {device_memory() / GIB:.1f} GiB, processes: {jax.process_count()},"
    f" mesh: {axes}; attention: {attention}; products in {products}"
  )
