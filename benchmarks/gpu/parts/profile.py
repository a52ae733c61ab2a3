"""Where the time of an update and of decoding goes: the kernels that take longest, by the profiler."""

import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import jax

from benchmarks.gpu import shapes, trace
from benchmarks.gpu.measure import timed, unless_too_large
from benchmarks.gpu.parts import decode, update
from benchmarks.gpu.report import Report

LONGEST = 10  # kernels that are listed
MOST_BYTES = 16 * 2**20  # of a trace that comes back


def run(report: Report) -> None:
  with unless_too_large(report, "decode"):
    size = decode.sizes(report.rehearse)
    (name, config), (slots, text) = next(iter(size.models.items())), size.cases[0]
    what = f"decode: a call of {size.steps} tokens in {slots} slots of {text} tokens, {name}"
    report.say(what)
    params = shapes.random_params(config, decode.DTYPE)
    call, _ = decode.prepare(config, params, size.shapes(slots, decode.with_kernel()[0]), text)
    _profile(report, "decode", what, call)
    del params, call
  with unless_too_large(report, "update"):
    report.say("update")
    prepared = update.prepare(update.sizes(report.rehearse), "auto")
    what = f"update: one step on {(prepared.rows.segment_ids > 0).sum()} tokens, attention {prepared.attention}"
    _profile(report, "update", what, prepared.step)


def _profile(report: Report, name: str, title: str, call: Callable[[], Any]) -> None:
  jax.block_until_ready(call())  # compiles
  with tempfile.TemporaryDirectory() as directory:
    with jax.profiler.trace(directory):
      _, took = timed(call)
    file = trace.find(pathlib.Path(directory))
    if file.stat().st_size < MOST_BYTES:
      shutil.copy(file, pathlib.Path(report.job.out) / f"{name}.trace.json.gz")
    else:
      report.note(f"{name}: the trace of {file.stat().st_size / 2**20:.0f} MiB is left behind")
    kernels = trace.kernels(file)
  total = sum(kernel.seconds for kernel in kernels)
  for kernel in kernels[:LONGEST]:
    report.row(
      title,
      {
        "kernel": kernel.name[:80],
        "runs": kernel.runs,
        "ms": 1e3 * kernel.seconds,
        "share of kernels": kernel.seconds / total,
        "in the program": kernel.source[-80:],
      },
    )
  rest = sum(kernel.seconds for kernel in kernels[LONGEST:])
  report.note(
    f"{name}: {len(kernels)} kernels took {1e3 * total:.4g} ms in all, those not listed {1e3 * rest:.4g}; the call took"
    f" {1e3 * took:.4g} ms with the profiler on"
  )
