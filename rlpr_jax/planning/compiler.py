"""The compilers of TPUs and GPUs, asked where there are neither, and what they said of a program, kept on disk."""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import time
from collections.abc import Callable
from typing import NamedTuple

import jax

from rlpr_jax.errors import InputError
from rlpr_jax.planning import hlo
from rlpr_jax.planning.hardware import Slice
from rlpr_jax.planning.programs import Program
from rlpr_jax.storage import write_atomically

_ROOT = pathlib.Path(__file__).parents[2]


class Compiled(NamedTuple):
  """What a compiler said of a program. Bytes a device."""

  refused: str  # why it does not fit, in a line; "" where it does. Then what follows is nothing.
  peak: int  # arguments and results included
  temporary: int
  traffic: dict[str, hlo.Traffic]
  seconds: float  # that compiling took


def environment(place: Slice) -> dict[str, str]:
  """Variables of a process that is to ask the compiler for a slice, set before it imports jax.

  The compiler gets the flags that the launch scripts give it: they take memory.

  Raises:
    InputError: the compiler is not installed.
  """
  if place.chip is None:
    return {}
  if place.chip.platform == "cuda":
    packages = _ROOT / ".cache" / "cuda"
    if not packages.exists() and importlib.util.find_spec("jax_plugins") is None:
      raise InputError("no compiler for GPUs here: run `make cuda-compiler`")
    path = [str(_ROOT), str(packages), os.environ.get("PYTHONPATH", "")]
    variables = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(filter(None, path))}
    return variables | {"XLA_FLAGS": _launch_flags("gpu_flags")}
  library = os.environ.get("TPU_LIBRARY_PATH") or _ROOT / ".cache" / "libtpu" / "libtpu" / "libtpu.so"
  if not pathlib.Path(library).exists():
    installed = importlib.util.find_spec("libtpu")
    if installed is None:
      raise InputError("no compiler for TPUs here: run `make libtpu`, or set TPU_LIBRARY_PATH to libtpu.so")
    library = pathlib.Path(installed.origin).with_name("libtpu.so")
  return {
    "JAX_PLATFORMS": "cpu",
    "TPU_LIBRARY_PATH": str(library),
    # So that the library looks for no machine.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # by several processes at once
    "LIBTPU_INIT_ARGS": _launch_flags(f"tpu_flags {place.slices}"),
  }


def _launch_flags(function: str) -> str:
  """The compiler's flags by a function of launch/flags.sh, with those that the environment sets behind them."""
  command = ["bash", "-c", f'source "$0" && {function}', str(_ROOT / "launch" / "flags.sh")]
  try:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
  except (OSError, subprocess.CalledProcessError) as error:
    said = getattr(error, "stderr", None) or str(error)
    raise InputError(f"launch/flags.sh: cannot be read ({' '.join(said.split())[:200]})") from None


def compile_program(
  name: str, program: Program, place: Slice, far: Callable[[list[int]], bool], cache: pathlib.Path | None
) -> Compiled:
  """Compiles, or finds what was said when the same program was compiled before.

  Args:
    name: for the cache's file.
    far: as in `hlo.traffic`.
    cache: directory; None for none.
  """
  platform = place.chip.platform if place.chip else jax.default_backend()
  lowered = program.trace().lower(lowering_platforms=(platform,))
  reader = pathlib.Path(hlo.__file__).read_text()  # other figures may be read from the same program
  variables = (os.environ.get(name) for name in ("TPU_LIBRARY_PATH", "LIBTPU_INIT_ARGS", "XLA_FLAGS"))
  depends = (importlib.metadata.version("jaxlib"), *variables)
  key = "\n".join(
    [lowered.as_text(), place.name, reader, *map(str, (jax.config.jax_optimization_level, program.trips, depends))]
  )
  digest = hashlib.sha256(key.encode()).hexdigest()[:24]
  file = cache / f"{name}-{digest}.json" if cache else None
  if file and (kept := _read(file)):
    return kept
  started = time.perf_counter()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    found = Compiled(_why(str(error)), 0, 0, {}, time.perf_counter() - started)
  else:
    memory = compiled.memory_analysis()
    # Elsewhere temporaries are one block, which is there from the beginning to the end, and no part of the peak.
    sums = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    found = Compiled(
      "",
      memory.peak_memory_in_bytes if platform == "tpu" else sums + memory.temp_size_in_bytes,
      memory.temp_size_in_bytes,
      hlo.traffic(compiled.as_text(), program.trips, far),
      time.perf_counter() - started,
    )
  if file:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(found._asdict()))
  return found


def _read(file: pathlib.Path) -> Compiled | None:
  try:
    found = Compiled(**json.loads(file.read_text()))
  except (OSError, ValueError, TypeError):  # none, or of another version: it is made anew
    return None
  return found._replace(traffic={kind: hlo.Traffic(*numbers) for kind, numbers in found.traffic.items()})


def _why(error: str) -> str:
  """The sentence of a refusal that has the figures in it."""
  found = re.search(r"Used [\d.]+[KMGT]? of [\d.]+[KMGT]? \w+\. Exceeded [^.]*\.[^.]*\.", error)
  return " ".join((found[0] if found else error).split())[:200]
