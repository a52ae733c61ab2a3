"""Programs with splash attention compiled by the real TPU compiler, for TPUs that are only described.

Nothing is run. The compiler checks layouts, tiles and memory, and refuses what a chip cannot hold.
"""

import json
import subprocess
import sys

import pytest

from tests.models import tpu_compile

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(not tpu_compile.LIBRARY.exists(), reason="no TPU compiler under .cache: run make libtpu"),
]


def compile_for(*arguments: str) -> dict:
  """What tpu_compile.py prints."""
  command = [sys.executable, "-m", "tests.models.tpu_compile", *arguments]
  run = subprocess.run(
    command, cwd=tpu_compile.ROOT, env=tpu_compile.environment(), timeout=600, capture_output=True, text=True
  )
  assert run.returncode == 0, run.stderr[-3000:]
  return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
def test_decoder(topology, family):
  """Splash attention is chosen by itself, and takes less memory than plain XLA."""
  found = compile_for(topology, "decoder", family)
  for backend, programs in found.items():
    for name, program in programs.items():
      sizes = {key: f"{value / 2**20:.0f} MiB" for key, value in program.items() if key != "kernels"}
      print(topology, family, backend, name, program["kernels"], "kernels", sizes)
  masks = 2 if family == "gemma2" else 1  # with and without the window
  # Forwards; again for the backward pass; gradients of the queries; those of keys and values.
  assert {name: program["kernels"] for name, program in found["auto"].items()} == {
    "gradient": 4 * masks * tpu_compile.ROWS // 2,  # each of a device's rows has its own
    "prefill": masks,
  }
  assert {program["kernels"] for program in found["xla"].values()} == {0}
  for name in ("gradient", "prefill"):
    assert found["auto"][name]["temporary"] < found["xla"][name]["temporary"]


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
def test_kernels(topology):
  """Small and large heads in either dtype fit the memory that a kernel works in."""
  found = compile_for(topology, "kernel")
  assert {name: program["kernels"] for name, program in found.items()} == {
    f"{head_dim} {dtype}": 6 * 2 for head_dim in (64, 128, 256) for dtype in ("bfloat16", "float32")
  }
