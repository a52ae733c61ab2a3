"""One run a directory: a second program is refused, and what a dead one left behind is no obstacle."""

import contextlib
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import threading
import time

import pytest

from rlpr_jax.errors import InputError
from rlpr_jax.runs import lock
from rlpr_jax.sft import sft
from rlpr_jax.train import train
from tests.tiny_run import RECIPE, rows, start, tiny

ROOT = pathlib.Path(__file__).parents[2]
HOLDER = """
import pathlib, sys
from rlpr_jax.errors import exit_with_one_line
from rlpr_jax.runs import lock
lock.PERIOD = 0.2
told = []
with exit_with_one_line(), lock.hold(pathlib.Path(sys.argv[1]), lambda: bool(told)):
  print("held", flush=True)
  for line in sys.stdin:
    told.append(line)
"""


@contextlib.contextmanager
def holder(directory):
  """A program that holds the lock until its input ends; a line of input tells it to stop."""
  process = subprocess.Popen(
    [sys.executable, "-c", HOLDER, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
  )  # fmt: skip
  try:
    yield process
  finally:
    process.kill()
    if process.stdin.closed:
      process.stdin = None
    process.communicate()


@pytest.fixture
def quick(monkeypatch):
  """Signs of life several times a second."""
  monkeypatch.setattr(lock, "PERIOD", 0.2)
  monkeypatch.setattr(lock, "STALE", 1.0)
  monkeypatch.setattr(lock, "_DYING", 0.5)


def contents(directory):
  return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_second_program_is_refused_and_names_the_first(tmp_path):
  with holder(tmp_path) as first:
    assert first.stdout.readline() == "held\n"
    before = contents(tmp_path)
    with holder(tmp_path) as second:
      out, err = second.communicate(timeout=20)
    assert (second.returncode, out) == (2, "")
    assert err == (
      f"error: --workdir: {tmp_path} is in use by process {first.pid} on {platform.node()},"
      " expected one run at a time in a directory\n"
    )
    assert contents(tmp_path) == before
    assert first.poll() is None
    first.communicate()
  assert first.returncode == 0
  assert contents(tmp_path) == {}


@pytest.mark.parametrize("flock", [True, False])
def test_what_a_killed_program_held_is_free_at_once(tmp_path, monkeypatch, flock):
  if not flock:
    monkeypatch.setattr(lock, "_flock", lambda file: None)
  with holder(tmp_path) as first:
    assert first.stdout.readline() == "held\n"
    first.kill()
    began = time.monotonic()
    with lock.hold(tmp_path):
      assert time.monotonic() - began < 2
    assert contents(tmp_path) == {}


def test_a_process_is_refused_by_itself_and_holds_again_afterwards(tmp_path, quick):
  for _ in range(2):
    with lock.hold(tmp_path):
      with pytest.raises(InputError, match=f"in use by process {os.getpid()} on"), lock.hold(tmp_path):
        pass
      assert contents(tmp_path)


def test_without_flock_the_number_of_the_process_decides(tmp_path, monkeypatch, quick):
  """Also where another process has the number by now."""
  monkeypatch.setattr(lock, "_flock", lambda file: None)
  with lock.hold(tmp_path), pytest.raises(InputError, match=f"process {os.getpid()} on"), lock.hold(tmp_path):
    pass
  leave(tmp_path, pid=os.getpid(), started="1")
  with lock.hold(tmp_path):
    pass


def leave(directory, **changes):
  """The file of a holder that is gone, or is on another machine."""
  path = directory / lock.NAME
  path.write_text(json.dumps(lock._ourselves()._asdict() | changes) + "\n")
  return path


ELSEWHERE = {"kernel": "another", "host": "far", "pid": 7}


@pytest.mark.parametrize("flock", [True, None])
@pytest.mark.parametrize("clock", [1, -1, 1e6, -1e6])
def test_a_run_of_another_machine_is_known_by_its_signs_of_life(tmp_path, monkeypatch, quick, clock, flock):
  """Whatever its clock says, and if it is set back."""
  monkeypatch.setattr(lock, "_flock", lambda file: flock)
  path, ended = leave(tmp_path, **ELSEWHERE), threading.Event()

  def live():
    seconds = time.time()
    while not ended.wait(0.3):
      seconds += clock
      os.utime(path, (seconds, seconds))

  thread = threading.Thread(target=live)
  thread.start()
  try:
    with pytest.raises(InputError, match="is in use by process 7 on far,"), lock.hold(tmp_path):
      pass
  finally:
    ended.set()
    thread.join()
  assert json.loads(path.read_text())["host"] == "far"


@pytest.mark.parametrize("age", [0, 1e6, -1e6])
def test_a_run_of_another_machine_without_signs_of_life_was_left_behind(tmp_path, quick, capsys, age):
  path = leave(tmp_path, **ELSEWHERE)
  os.utime(path, (time.time() - age,) * 2)
  began = time.monotonic()
  with lock.hold(tmp_path):
    assert 1 <= time.monotonic() - began < 5
    assert json.loads(path.read_text())["host"] == platform.node()
  (line,) = capsys.readouterr().out.splitlines()
  assert line.startswith(
    f"--workdir: {tmp_path}: waiting until process 7 on far shows that it is alive, or does not for"
  )


def test_a_wait_ends_when_told_to_stop(tmp_path, quick):
  leave(tmp_path, **ELSEWHERE)
  with pytest.raises(InputError, match="in use by process 7 on far"), lock.hold(tmp_path, lambda: True):
    pass


def test_a_run_that_stops_is_waited_for(tmp_path, quick, capsys):
  with holder(tmp_path) as first:
    assert first.stdout.readline() == "held\n"
    first.stdin.write("stop\n")
    first.stdin.flush()
    while '"stopping": true' not in (tmp_path / lock.NAME).read_text():
      time.sleep(0.05)
    ending = threading.Timer(1.5, first.stdin.close)  # longer than one that does not stop would be waited for
    ending.start()
    with lock.hold(tmp_path):
      pass
  assert f"waiting until process {first.pid} on {platform.node()} has saved and ended\n" in capsys.readouterr().out


def test_a_run_that_was_taken_for_dead_ends(tmp_path):
  """Its machine slept, and another one has begun meanwhile: two would write."""
  with holder(tmp_path) as first:
    assert first.stdout.readline() == "held\n"
    path = leave(tmp_path, **ELSEWHERE)
    first.wait(timeout=20)
    err = first.stderr.read()
  assert first.returncode == 2
  assert err.startswith("error: ")
  assert "process 7 on far has taken it over" in err
  assert json.loads(path.read_text())["host"] == "far"


@pytest.mark.parametrize("program", [train, sft])
def test_programs_hold_the_lock(tmp_path, quick, program):
  with lock.hold(tmp_path):
    before = contents(tmp_path)
    with pytest.raises(InputError, match=f"in use by process {os.getpid()} on"):
      program(tiny(), tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.slow
def test_the_same_command_twice_and_again_after_a_kill(tmp_path):
  recipe, workdir = tmp_path / "tiny.py", tmp_path / "run"
  recipe.write_text(RECIPE)
  arguments = ("--config.evaluation.prompts=0", "--config.warm_start.steps=5")
  endless = "--config.steps=100000"  # so that the first one still runs when the second one has been refused

  def begin():
    process = start(recipe, workdir, *arguments, endless)
    assert any(line.startswith("step 2") for line in process.stdout), process.stderr.read()
    return process

  first = begin()
  second = start(recipe, workdir, *arguments, endless)
  _, err = second.communicate(timeout=300)
  assert second.returncode == 2
  assert re.fullmatch(rf"error: --workdir: {workdir} is in use by process {first.pid} on .*\n", err)
  assert first.poll() is None
  first.kill()
  first.communicate()
  steps = len(rows(workdir)) + 5
  out, err = start(recipe, workdir, *arguments, f"--config.steps={steps}").communicate(timeout=600)
  assert f"step {steps}/{steps}" in out, err
  assert [row["step"] for row in rows(workdir)] == list(range(1, steps + 1))
  assert not (workdir / lock.NAME).exists()


@pytest.mark.slow
def test_all_processes_of_a_run_are_refused_together(tmp_path):
  recipe, workdir = tmp_path / "tiny.py", tmp_path / "run"
  recipe.write_text(RECIPE)
  workdir.mkdir()
  with lock.hold(workdir):
    before = contents(workdir)
    done = subprocess.run(
      [sys.executable, "launch/local.py", "--processes=2", f"--config={recipe}", f"--workdir={workdir}"],
      cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert contents(workdir) == before
  assert done.returncode == 2, done.stderr
  assert f"is in use by process {os.getpid()} on" in done.stderr
