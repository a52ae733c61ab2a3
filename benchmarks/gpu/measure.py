"""Time and memory, measured."""

import contextlib
import re
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from benchmarks.gpu.report import Report
from rlpr_jax.planning.hardware import CHIPS, Chip

GIB = 2**30


def seconds(function: Callable[[], Any], repeats: int = 5, calls: int = 1) -> float:
  """Median of so many repeats, each the mean of `calls` calls whose results are awaited together.

  Nothing is left out: what compiles must have run before.
  """
  times = []
  for _ in range(repeats):
    began = time.perf_counter()
    results = [function() for _ in range(calls)]
    jax.block_until_ready(results)
    times.append((time.perf_counter() - began) / calls)
    del results
  return statistics.median(times)


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
  """The result of a call, and the seconds until it was there."""
  began = time.perf_counter()
  result = jax.block_until_ready(function())
  return result, time.perf_counter() - began


def peak_bytes() -> int | None:
  """The most memory that was in use on the device since the process began; None where it does not say."""
  return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def published(kind: str) -> Chip | None:
  """The makers' rates of a card by the name that its driver gives it; None for one that is not in the table.

  Only the SXM cards are in it: those of other kinds (PCIe, NVL, GH200) have the chip's name and other rates.

  >>> published("NVIDIA H200").bandwidth
  4800000000000.0
  >>> published("NVIDIA H100 PCIe") is None
  True
  """
  found = re.fullmatch(r"NVIDIA (\w+)(?: \d+GB(?: HBM\w*)?)?", kind)
  chip = CHIPS.get(found[1].lower()) if found else None
  return chip if chip and chip.platform == "cuda" else None


@contextlib.contextmanager
def unless_too_large(report: Report, what: str) -> Iterator[None]:
  """Notes that something does not fit into the device's memory, and goes on."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    report.note(f"{what}: left out, does not fit into the device's memory")
