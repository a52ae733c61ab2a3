"""Chips, and slices of them, as a run can be planned for. A name is CHIP:SHAPE or CHIP:SHAPE*SLICES:

v5e:16x16   v6e:8x8   v4:4x4x4   v5p:4x4x4   tpu7x:4x4x4   v5p:4x4x4*2   two slices of 64 chips
h100:8      h200:8    h100:4x8   four hosts of eight, one process a GPU    local   what this machine has
"""

import contextlib
import dataclasses
import math
import os
import re
from typing import Any

import jax

from rlpr_jax.errors import InputError
from rlpr_jax.machine import GIB, device_memory

_SHARE = 0.9  # of a GPU's memory, where XLA_PYTHON_CLIENT_MEM_FRACTION says nothing: what launch/gpu.sh has JAX take


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device of JAX: a chip, or one of the two of a TPU 7x. Rates are the makers', a second."""

  platform: str  # tpu | cuda
  memory: float  # GiB that the compiler grants a program, measured; of a GPU, all of it
  flops: float  # operations in bfloat16
  bandwidth: float  # bytes from and to its own memory
  links: float  # bytes received from the chips of its slice, or the GPUs of its host
  network: float  # bytes received from other slices or hosts
  host: str = ""  # shape of the chips of one host
  most: tuple[int, ...] = ()  # largest slice
  devices: int = 1  # of JAX in a chip


# Google's and NVIDIA's published figures; of links half of what they call bidirectional, networks of TPUs as v5p's.
CHIPS = {
  "v4": Chip("tpu", 30.75, 275e12, 1.2e12, 300e9, 6.25e9, "2x2x1", (16, 16, 16)),
  "v5e": Chip("tpu", 15.75, 197e12, 0.819e12, 200e9, 6.25e9, "2x2", (16, 16)),
  "v5p": Chip("tpu", 95.74, 459e12, 2.765e12, 600e9, 6.25e9, "2x2x1", (16, 16, 24)),
  "v6e": Chip("tpu", 31.25, 918e12, 1.638e12, 400e9, 6.25e9, "2x2", (16, 16)),
  "tpu7x": Chip("tpu", 94.75, 1153.5e12, 3.69e12, 300e9, 6.25e9, "2x2x1", (16, 16, 36), devices=2),
  "h100": Chip("cuda", 79.1, 989e12, 3.35e12, 450e9, 50e9),
  "h200": Chip("cuda", 139.8, 989e12, 4.8e12, 450e9, 50e9),
}

# What the compiler wants to know of a GPU (xla/backends/gpu/target_config/specs/h100_sxm.txtpb).
_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: {memory} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }} registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 7 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{name}"
"""


@dataclasses.dataclass(frozen=True)
class Slice:
  """Devices that a run would have."""

  name: str
  chip: Chip | None  # None for this machine's own devices
  shape: tuple[int, ...] = ()
  slices: int = 1

  @property
  def chips(self) -> int:
    return math.prod(self.shape) * self.slices if self.chip else jax.device_count()

  @property
  def granted(self) -> float:
    """Bytes a device that a run may use."""
    if self.chip is None:
      return device_memory()
    share = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", _SHARE)) if self.chip.platform == "cuda" else 1
    return self.chip.memory * GIB * share

  def describe(self) -> list[jax.Device]:
    """The devices. Of a TPU they are of as many processes as hosts, of GPUs on several hosts of one process each."""
    if self.chip is None:
      return jax.devices()
    if self.chip.platform == "tpu":
      return _tpus(self.name.split(":")[0], self.shape, self.slices)
    return _gpus(self.name.split(":")[0], f"1x1x{self.chips}" if len(self.shape) == 1 else f"1x{self.chips}x1")

  def describe_host(self, whole: list[jax.Device]) -> list[jax.Device]:
    """The devices with which one process samples, by themselves: the compiler takes no part of a slice."""
    if len({device.process_index for device in whole}) == 1:
      return whole
    if self.chip.platform == "tpu":
      return _tpus(self.name.split(":")[0], tuple(map(int, self.chip.host.split("x"))), 1)
    return _gpus(self.name.split(":")[0], "1x1x1")

  def for_kernels(self) -> contextlib.AbstractContextManager:
    """As long as it lasts, kernels for GPUs are chosen, traced and lowered for these devices, and nothing can be run.

    They ask JAX's default device what it can do, which else is the CPU of the machine that plans.
    """
    if self.chip is None or self.chip.platform != "cuda":
      return contextlib.nullcontext()
    return jax.default_device(self.describe()[0])


def parse(text: str) -> Slice:
  """A slice by its name.

  Raises:
    InputError: there is none of that name.

  >>> parse("v5e:4x4").chips, parse("h100:2x8").chips
  (16, 16)
  """
  if text == "local":
    return Slice(text, None)
  match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)(?:\*(\d+))?", text)
  if not match or match[1] not in CHIPS:
    raise InputError(f"--topology: {text!r}, expected local, or CHIP:SHAPE with a chip of {', '.join(CHIPS)}")
  chip, slices = CHIPS[match[1]], int(match[3] or 1)
  shape = tuple(map(int, match[2].split("x")))
  if chip.platform == "cuda":
    if slices > 1 or len(shape) > 2 or not math.prod(shape):
      raise InputError(f"--topology: {text!r}, expected GPUS or HOSTSxGPUS after the colon")
  elif len(shape) != len(chip.most) or any(not 0 < x <= most for x, most in zip(shape, chip.most, strict=True)):
    most = "x".join(map(str, chip.most))
    raise InputError(f"--topology: {text!r}, expected {len(chip.most)} sizes of at most {most} after the colon")
  return Slice(text, chip, shape, slices)


def _tpus(kind: str, shape: tuple[int, ...], slices: int) -> list[jax.Device]:
  # A torus closes its rings where a slice spans a pod (v5e, v6e), or is made of whole cubes of 64 chips.
  closed = [x == 16 for x in shape] if len(shape) == 2 else [all(x % 4 == 0 for x in shape)] * 3
  megacore = {"chip_config_name": "megacore"} if kind == "v4" else {}
  name = f"{kind}:{'x'.join(map(str, shape))}"
  return _describe("tpu", name, wrap=[*closed, False][:3], num_slices=slices, **megacore)


def _gpus(kind: str, shape: str) -> list[jax.Device]:
  chip = CHIPS[kind]
  target = _GPU.format(bandwidth=int(chip.bandwidth), memory=int(chip.memory * GIB), name=f"NVIDIA {kind.upper()}")
  return _describe("cuda", kind, target_config=target, topology=shape)


def _describe(platform: str, name: str, **options: Any) -> list[jax.Device]:
  from jax.experimental import topologies  # takes the platform's compiler

  try:
    return list(topologies.get_topology_desc(platform=platform, topology_name=name, **options).devices)
  except Exception as error:  # the compilers' own errors have no common class
    reason = " ".join(str(error).split())[:200]
    raise InputError(f"--topology: {name!r} cannot be described by the compiler for {platform} ({reason})") from None
