"""Signals that ask a program to stop, and launchers that are gone, as a program sees them."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def start(*command, saving=0.5, **options):
  process = subprocess.Popen(
    [*command, sys.executable, "-m", "tests.stopping_program"],
    env=os.environ | {"PYTHONPATH": str(ROOT), "SAVING": str(saving)},
    **{"stdout": subprocess.PIPE} | options, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip
  assert process.stderr.readline() == "ready\n"
  return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_stops_and_saves(number):
  process = start()
  process.send_signal(number)
  out, err = process.communicate(timeout=20)
  assert (process.returncode, err) == (0, "saving\nsaved\n")
  assert out == f"\n{number.name}: saving what is done, then stopping\n"


@pytest.mark.parametrize("more", [signal.SIGTERM, signal.SIGHUP])
def test_another_signal_is_as_patient_as_the_first(more):
  process = start()
  process.send_signal(signal.SIGTERM)
  assert process.stderr.readline() == "saving\n"
  process.send_signal(more)
  out, err = process.communicate(timeout=20)
  assert (process.returncode, err) == (0, "saved\n")
  assert out.count("then stopping") == 1


def test_a_second_interrupt_stops_at_once():
  process = start(saving=100)
  process.send_signal(signal.SIGTERM)
  assert process.stderr.readline() == "saving\n"
  process.send_signal(signal.SIGINT)
  time.sleep(0.3)
  assert process.poll() is None
  process.send_signal(signal.SIGINT)
  _, err = process.communicate(timeout=20)
  assert (process.returncode, err) == (130, "interrupted\n")


def test_under_nohup_a_terminal_that_closes_changes_nothing(tmp_path):
  process = start("nohup", stdin=subprocess.DEVNULL)
  process.send_signal(signal.SIGHUP)
  time.sleep(0.5)
  assert process.poll() is None
  process.terminate()
  _, err = process.communicate(timeout=20)
  assert err.endswith("saving\nsaved\n")


@pytest.mark.parametrize("gone", ["closed", "full disk", "full pipe", "none"])
def test_words_that_nobody_takes_do_not_end_the_run(gone):
  """A pipe whose reader ended, a disk without room, a reader that has stopped, no output at all."""
  reading, writing = os.pipe()
  if gone == "full disk":
    writing = os.open("/dev/full", os.O_WRONLY)
  elif gone == "full pipe":
    os.set_blocking(writing, False)
    try:
      while os.write(writing, bytes(4096)):
        pass
    except BlockingIOError:
      os.set_blocking(writing, True)
  closes = ("bash", "-c", 'exec "$@" >&-', "-") if gone == "none" else ()
  process = start(*closes, stdout=writing)
  os.close(writing)
  if gone == "closed":
    os.close(reading)
  process.terminate()
  _, err = process.communicate(timeout=20)
  assert (process.returncode, err) == (0, "saving\nsaved\n")


LAUNCHER = """
import os, subprocess, sys
os.environ["RLPR_LAUNCHER"] = str(os.getpid())
subprocess.Popen(sys.argv[1:]).wait()
"""


@pytest.mark.parametrize("between", [(), ("bash", "-c", '"$@"; exit', "-")], ids=["child", "grandchild"])
def test_a_program_saves_and_ends_with_its_launcher(between):
  """Also where its parent is another one, which goes on."""
  process = start(sys.executable, "-c", LAUNCHER, *between)
  time.sleep(1.5)
  assert process.poll() is None
  process.kill()
  assert (
    process.communicate(timeout=20)[1] == "saving\nsaved\n"
  )  # which nobody else writes to: it ends with the program


def test_a_launcher_that_is_gone_before_the_program_has_begun():
  with subprocess.Popen(["true"]) as gone:
    pass
  process = start("env", f"RLPR_LAUNCHER={gone.pid}")
  err = process.stderr.read()  # not `communicate`, which would miss what came together with the first line
  process.wait(timeout=20)
  assert err == "saving\nsaved\n"
