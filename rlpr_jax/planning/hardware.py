"""Chips, and slices of them, as a run can be planned for. A name is CHIP:SHAPE or CHIP:SHAPE*SLICES:

v5e:16x16   v6e:8x8   v4:4x4x4   v5p:4x4x4   tpu7x:4x4x4   v5p:4x4x4*2   two slices of 64 chips
h100:8      a100_80:8    h100:4x8   four hosts of eight, one process a GPU    local   what this machine has
t4:1   l4:1   rtx4090:1   a100_40:1
"""

import contextlib
import dataclasses
import math
import os
import re
from typing import Any, NamedTuple

import jax

from rlpr_jax.errors import InputError
from rlpr_jax.machine import GIB, device_memory

_SHARE = 0.9  # of a GPU's memory, where XLA_PYTHON_CLIENT_MEM_FRACTION says nothing: what launch/gpu.sh has JAX take


class Cores(NamedTuple):
  """What the compiler wants to know of a GPU beside its memory. Sizes in bytes, shared memory of one core."""

  capability: str  # of CUDA
  cores: int  # streaming multiprocessors
  units: int  # for float32, of a core
  threads: int  # at once on a core
  shared: int
  cache: int  # of the second level
  clock: float  # GHz


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device of JAX: a chip, or one of the two of a TPU 7x. Rates are the makers', a second."""

  platform: str  # tpu | cuda
  memory: float  # GiB that the compiler grants a program, measured; of a GPU, all of it
  flops: float  # operations in bfloat16; where there is none of it, in float32
  bandwidth: float  # bytes from and to its own memory
  links: float  # bytes received from the chips of its slice, or the GPUs of its host
  network: float  # bytes received from other slices or hosts
  host: tuple[int, ...] = ()  # shape of the chips of one host; slices of one or eight in a plane have one host too
  most: tuple[int, ...] = ()  # largest slice
  devices: int = 1  # of JAX in a chip
  gpu: Cores | None = None


_HOPPER = Cores("9.0", 132, 128, 2048, 233_472, 50 << 20, 1.98)
# Google's and NVIDIA's published figures; of links half of what they call bidirectional, networks of TPUs as v5p's.
CHIPS = {
  "v4": Chip("tpu", 30.75, 275e12, 1.2e12, 300e9, 6.25e9, (2, 2, 1), (16, 16, 16)),
  "v5e": Chip("tpu", 15.75, 197e12, 0.819e12, 200e9, 6.25e9, (2, 2), (16, 16)),
  "v5p": Chip("tpu", 95.74, 459e12, 2.765e12, 600e9, 6.25e9, (2, 2, 1), (16, 16, 24)),
  "v6e": Chip("tpu", 31.25, 918e12, 1.638e12, 400e9, 6.25e9, (2, 2), (16, 16)),
  "tpu7x": Chip("tpu", 94.75, 1153.5e12, 3.69e12, 300e9, 6.25e9, (2, 2, 1), (16, 16, 36), devices=2),
  # Data sheets, and the CUDA programming guide's table of compute capabilities; links of the smaller ones are PCIe's.
  "t4": Chip("cuda", 14.6, 8.1e12, 0.32e12, 12e9, 3e9, gpu=Cores("7.5", 40, 64, 1024, 65_536, 4 << 20, 1.59)),
  "l4": Chip("cuda", 22.2, 121e12, 0.3e12, 25e9, 12.5e9, gpu=Cores("8.9", 58, 128, 1536, 102_400, 48 << 20, 2.04)),
  "rtx4090": Chip("cuda", 23.6, 165e12, 1.008e12, 25e9, 3e9, gpu=Cores("8.9", 128, 128, 1536, 102_400, 72 << 20, 2.52)),
  "a100_40": Chip(
    "cuda", 39.4, 312e12, 1.555e12, 300e9, 25e9, gpu=Cores("8.0", 108, 64, 2048, 167_936, 40 << 20, 1.41)
  ),
  "a100_80": Chip(
    "cuda", 79.2, 312e12, 2.039e12, 300e9, 25e9, gpu=Cores("8.0", 108, 64, 2048, 167_936, 40 << 20, 1.41)
  ),
  "h100": Chip("cuda", 79.1, 989e12, 3.35e12, 450e9, 50e9, gpu=_HOPPER),
  "h200": Chip("cuda", 139.8, 989e12, 4.8e12, 450e9, 50e9, gpu=_HOPPER),
}

# As xla/backends/gpu/target_config/specs has it of some of them.
_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: {shared}
  threads_per_core_limit: {threads} core_count: {cores} fpus_per_core: {units} block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} l2_cache_size: {cache}
  clock_rate_ghz: {clock} device_memory_size: {memory} shared_memory_per_block_optin: {optin}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
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
      return _tpus(self.name.split(":")[0], self.chip.host, 1)
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
  host = shape if len(shape) == 2 and math.prod(shape) in (1, 8) else CHIPS[kind].host
  bounds = {"chips_per_host_bounds": [*host, 1][:3]}
  name = f"{kind}:{'x'.join(map(str, shape))}"
  return _describe("tpu", name, wrap=[*closed, False][:3], num_slices=slices, **bounds, **megacore)


def _gpus(kind: str, shape: str) -> list[jax.Device]:
  chip = CHIPS[kind]
  major, minor = chip.gpu.capability.split(".")
  # A block may ask for all of a core's shared memory but one KiB, which is the driver's; on a T4 for all.
  optin = chip.gpu.shared - (1024 if int(major) >= 8 else 0)
  target = _GPU.format(
    bandwidth=int(chip.bandwidth),
    memory=int(chip.memory * GIB),
    name=f"NVIDIA {kind.upper()}",
    major=major,
    minor=minor,
    optin=optin,
    **chip.gpu._asdict(),
  )
  return _describe("cuda", kind, target_config=target, topology=shape)


def _describe(platform: str, name: str, **options: Any) -> list[jax.Device]:
  from jax.experimental import topologies  # takes the platform's compiler

  try:
    return list(topologies.get_topology_desc(platform=platform, topology_name=name, **options).devices)
  except Exception as error:  # the compilers' own errors have no common class
    reason = " ".join(str(error).split())[:200]
    raise InputError(f"--topology: {name!r} cannot be described by the compiler for {platform} ({reason})") from None
