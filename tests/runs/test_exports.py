"""When exports begin beside a run, and what becomes of them; a script stands for `rlpr export` here."""

import sys
import time

import pytest

from rlpr_jax.config import default
from rlpr_jax.runs.exports import Exports

SCRIPT = """#!/bin/sh
for word; do case "$word" in --out=*) out="${word#--out=}";; esac; done
case "$HOW" in
  fails) echo "error: --push: org/x: 403 Forbidden" >&2; echo "noise" >&2; exit 2;;
  hangs) mkdir "$(dirname "$out")/.step_half"; exec sleep 100;;
esac
mkdir "$out"
echo "wrote it, $*"
"""


@pytest.fixture
def exports(tmp_path, monkeypatch):
  """Of a run of 50 steps, every 20 of which are due."""
  (tmp_path / "script").write_text(SCRIPT)
  (tmp_path / "script").chmod(0o755)
  monkeypatch.setattr(sys, "executable", str(tmp_path / "script"))
  config = default()
  config.steps, config.export.every, config.export.push = 50, 20, "org/x"
  (tmp_path / "run").mkdir()
  return Exports(tmp_path / "run", config)


def names(directory):
  return sorted(path.name for path in directory.iterdir())


def wait_for(path):
  deadline = time.monotonic() + 60
  while not path.exists():
    assert time.monotonic() < deadline
    time.sleep(0.01)


def test_each_that_is_due_once_and_the_newest_stays(exports, tmp_path, capsys):
  for step in (None, 0, 10):
    exports.look(step)
  assert not (tmp_path / "run/exports").exists()
  exports.look(20)
  wait_for(tmp_path / "run/exports/step_000020")
  exports.look(20)
  exports.finish(50, given_up=lambda: False)
  assert names(tmp_path / "run/exports") == ["export.log", "step_000050"]
  lines = [line for line in capsys.readouterr().out.splitlines() if "wrote it" in line]
  assert [line.partition(":")[0] for line in lines] == ["export of step 20", "export of step 50"]
  assert "-m rlpr_jax.export" in lines[0]
  assert all(f" --{word}" in lines[0] for word in ("step=20", "dtype=bfloat16", "push=org/x"))
  exports.look(50)  # as when a run that is done is started again
  exports.finish(50, given_up=lambda: False)
  assert "wrote" not in capsys.readouterr().out


def test_a_failure_is_one_line_and_the_next_one_begins(exports, tmp_path, capsys, monkeypatch):
  monkeypatch.setenv("HOW", "fails")
  exports.finish(20, given_up=lambda: False)
  assert capsys.readouterr().err == "export of step 20: --push: org/x: 403 Forbidden\n"
  monkeypatch.delenv("HOW")
  exports.finish(40, given_up=lambda: False)
  assert names(tmp_path / "run/exports") == ["export.log", "step_000040"]


def test_one_that_hangs_is_ended_with_a_run_that_is_told_to_stop(exports, tmp_path, capsys, monkeypatch):
  monkeypatch.setenv("HOW", "hangs")
  exports.look(20)
  wait_for(tmp_path / "run/exports/.step_half")
  exports.look(40)  # waits for the other
  exports.finish(40, given_up=lambda: True)
  assert capsys.readouterr().err == "export of step 20: ended with status -9\n"
  assert names(tmp_path / "run/exports") == ["export.log"]
