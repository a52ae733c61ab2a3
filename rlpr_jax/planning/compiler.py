"""The compilers of TPUs and GPUs, asked where there are neither, and what they said of a program, kept on disk."""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import shlex
import subprocess
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax

from rlpr_jax import resources
from rlpr_jax.errors import InputError
from rlpr_jax.planning import hlo
from rlpr_jax.planning.hardware import Slice
from rlpr_jax.runs.storage import write_atomically

if TYPE_CHECKING:
  from rlpr_jax.planning.programs import Program


class Compiled(NamedTuple):
  """A compiler's account of a program. Bytes a device."""

  refused: str  # why it does not fit, in a line; "" where it does. Then what follows is nothing.
  peak: int  # arguments and results included
  temporary: int
  traffic: dict[str, hlo.Traffic]
  kernels: list[str]  # as of `hlo.kernels`
  seconds: float  # that compiling took


def requirements(platform: str) -> list[str]:
  """The packages that have the compiler for a platform, tpu or cuda, as pip takes them with --no-deps.

  >>> [requirement.split("==")[0] for requirement in requirements("cuda")]
  ['jax-cuda13-plugin', 'jax-cuda13-pjrt']

  The versions are those that the installed jax names in its metadata.
  """
  extra, package = {"tpu": ("tpu", "libtpu"), "cuda": ("cuda13", "jax-cuda13-plugin")}[platform]
  pattern = re.compile(rf"{package}(?:\[.*?\])?([^;]*);.*extra == ['\"]{extra}['\"]")
  named = [match[1].strip() for line in importlib.metadata.requires("jax") or [] if (match := pattern.match(line))]
  version = re.sub(r"<=([\w.]+),>=\1$", r"==\1", named[0]) if named else ""
  return [package + version] if platform == "tpu" else [package + version, "jax-cuda13-pjrt" + version]


def environment(place: Slice) -> dict[str, str]:
  """Variables of a process that is to ask the compiler for a slice, set before it imports jax.

  The compiler is that which the environment names, one under the checkout's .cache, or an installed one. It gets the
  flags that the launch scripts give it: they take memory.

  Raises:
    InputError: the compiler is not installed.
  """
  if place.chip is None:
    return {}
  paths = [_checkout()]
  if place.chip.platform == "cuda":
    variables = {"XLA_FLAGS": _launch_flags("gpu_flags")}
    if not any(_importable(f"jax_plugins.{name}") for name in ("xla_cuda13", "xla_cuda12")):
      paths.append(_cached("cuda", "cuda"))
      if not paths[-1]:
        raise InputError(_missing("GPUs", "make cuda-compiler", "cuda", "PYTHONPATH=DIR"))
  else:
    variables = {
      "TPU_LIBRARY_PATH": str(_find_libtpu()),
      # So that the library looks for no machine.
      "TPU_SKIP_MDS_QUERY": "1",
      "TPU_WORKER_HOSTNAMES": "localhost",
      "TPU_ACCELERATOR_TYPE": "v5litepod-4",
      "TPU_LOG_DIR": "disabled",
      "TPU_MIN_LOG_LEVEL": "3",
      "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # by several processes at once
      "LIBTPU_INIT_ARGS": _launch_flags(f"tpu_flags {place.slices}"),
    }
  path = os.pathsep.join(map(str, filter(None, [*paths, os.environ.get("PYTHONPATH")])))
  return variables | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path}


def _find_libtpu() -> pathlib.Path:
  if named := os.environ.get("TPU_LIBRARY_PATH"):
    if not pathlib.Path(named).is_file():
      raise InputError(f"TPU_LIBRARY_PATH: {named}: no such file, expected libtpu.so")
    return pathlib.Path(named)
  if cached := _cached("libtpu", "tpu"):
    return cached / "libtpu" / "libtpu.so"
  if _importable("libtpu"):
    return pathlib.Path(importlib.util.find_spec("libtpu").origin).with_name("libtpu.so")
  raise InputError(_missing("TPUs", "make libtpu", "tpu", "TPU_LIBRARY_PATH=DIR/libtpu/libtpu.so"))


def _checkout() -> pathlib.Path | None:
  """The repository, if this package lies in one."""
  root = pathlib.Path(__file__).parents[2]
  return root if (root / "pyproject.toml").exists() else None


def _cached(directory: str, platform: str) -> pathlib.Path | None:
  """A directory under the checkout's .cache, if it has the compiler for this JAX and not for another."""
  root = _checkout()
  path = root / ".cache" / directory if root else None
  for requirement in requirements(platform):
    name, _, version = requirement.partition("==")
    if path and not any(path.glob(f"{name.replace('-', '_')}-{version or '*'}.dist-info")):
      path = None
  return path


def _importable(name: str) -> bool:
  try:
    return importlib.util.find_spec(name) is not None
  except ModuleNotFoundError:  # the package around it
    return False


def _missing(chips: str, target: str, platform: str, variable: str) -> str:
  wanted = shlex.join(requirements(platform))
  return (
    f"no compiler for {chips} of jax {jax.__version__} here: in a checkout run `{target}`;"
    f" installed: pip install --no-deps --target=DIR {wanted}, and set {variable}"
  )


def _launch_flags(function: str) -> str:
  """The compiler's flags by a function of launch/flags.sh, with those that the environment sets behind them."""
  command = ["bash", "-c", f'source "$0" && {function}', str(resources.path("launch/flags.sh"))]
  try:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
  except (OSError, subprocess.CalledProcessError) as error:
    said = getattr(error, "stderr", None) or str(error)
    raise InputError(f"launch/flags.sh: cannot be read ({' '.join(said.split())[:200]})") from None


def compile_program(
  name: str, program: "Program", place: Slice, far: Callable[[list[int]], bool], cache: pathlib.Path | None
) -> Compiled:
  """Compiles, or finds what was said when the same program was compiled before.

  Args:
    name: for the cache's file.
    far: as in `hlo.traffic`.
    cache: directory; None for none.
  """
  platform = place.chip.platform if place.chip else jax.default_backend()
  with place.for_kernels():
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
    account = Compiled(_why(str(error)), 0, 0, {}, hlo.kernels(lowered.as_text()), time.perf_counter() - started)
  else:
    memory = compiled.memory_analysis()
    # Elsewhere temporaries are one block, which is there from the beginning to the end, and no part of the peak.
    sums = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    account = Compiled(
      refused="",
      peak=memory.peak_memory_in_bytes if platform == "tpu" else sums + memory.temp_size_in_bytes,
      temporary=memory.temp_size_in_bytes,
      traffic=hlo.traffic(compiled.as_text(), program.trips, far),
      kernels=hlo.kernels(compiled.as_text()),
      seconds=time.perf_counter() - started,
    )
  if file:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(account._asdict()))
  return account


def _read(file: pathlib.Path) -> Compiled | None:
  try:
    account = Compiled(**json.loads(file.read_text()))
  except (OSError, ValueError, TypeError, RecursionError):  # none, or of another version: it is made anew
    return None
  return account._replace(traffic={kind: hlo.Traffic(*numbers) for kind, numbers in account.traffic.items()})


def _why(error: str) -> str:
  """The sentence of a refusal that has the figures in it."""
  sentence = re.search(r"Used [\d.]+[KMGT]? of [\d.]+[KMGT]? \w+\. Exceeded [^.]*\.[^.]*\.", error)
  return " ".join((sentence[0] if sentence else error).split())[:200]
