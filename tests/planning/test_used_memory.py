"""Memory that a plan says, against what the process took that ran the same programs."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="no /proc")
def test_planned_memory_is_what_a_run_takes():
  # One arena: what threads have freed and malloc keeps for them is not what a program needs.
  env = os.environ | {"JAX_PLATFORMS": "cpu", "MALLOC_ARENA_MAX": "1", "PYTHONPATH": str(ROOT)}
  env.pop("XLA_FLAGS", None)
  command = [sys.executable, "-m", "tests.planning.used_memory"]
  done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900, check=False)
  assert done.returncode == 0, done.stderr[-3000:]
  for name, found in json.loads(done.stdout.splitlines()[-1]).items():
    print(name, {which: f"{size / 2**20:.0f} MiB" for which, size in found.items()})
    assert found["planned"] == pytest.approx(found["used"], rel=0.15), name
