"""What becomes of a program whose output nobody takes."""

import io
import os
import subprocess
import sys
import threading
import time

import pytest

from rlpr_jax import output
from tests.tiny_run import ROOT

# A program that prints a lot, then says in a file that it came to its end.
PROGRAM = """
import pathlib, sys
from rlpr_jax import errors
with errors.exit_with_one_line():
  for step in range(3000):
    print(f"step {step} " + 100 * "x", flush=step % 100 == 0)
    print("a warning", file=sys.stderr)
  print("\\ud800")
  sys.stdout.isatty()
  pathlib.Path(sys.argv[1]).write_text("done")
  if len(sys.argv) > 2:
    raise errors.InputError("wrong")
"""


@pytest.mark.parametrize("end", ["| head -n 1", ">&- 2>&-", ">/dev/full 2>/dev/full", "<&- >&-", "| sleep 30 &"])
def test_a_program_comes_to_its_end(tmp_path, end):
  """Whose reader goes away, or stands still, or whose output is closed, or on a disk that is full."""
  command = f"{sys.executable} program.py done wrong {end if '|' not in end else ''}"
  (tmp_path / "program.py").write_text(PROGRAM)
  pipe = end if "|" in end else ""
  script = f"({command}; echo $? > status) {pipe}"
  start = time.monotonic()
  shell = subprocess.Popen(["bash", "-c", script], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
  while not (tmp_path / "status").exists() or not (tmp_path / "status").read_text():
    assert time.monotonic() - start < 60, "it waits for its reader"
    time.sleep(0.1)
  assert (tmp_path / "done").read_text() == "done"
  assert (tmp_path / "status").read_text() == "2\n"
  if end.startswith("| sleep"):
    assert time.monotonic() - start < 25
    os.killpg(shell.pid, 9)
  shell.wait()


def test_all_that_is_printed_is_there_in_its_order(tmp_path):
  (tmp_path / "program.py").write_text(PROGRAM)
  env = {**os.environ, "PYTHONPATH": str(ROOT)}
  done = subprocess.run([sys.executable, "program.py", "done"], cwd=tmp_path, env=env, capture_output=True, check=True)
  lines = done.stdout.decode().splitlines()
  assert [line.split()[1] for line in lines[:-1]] == [str(step) for step in range(3000)]
  assert lines[-1] == "\\ud800"
  assert done.stderr.decode() == 3000 * "a warning\n"


def test_a_reader_that_stands_still_and_goes_on(monkeypatch):
  """Only the first flush waits; what was printed meanwhile is there in the end."""
  monkeypatch.setattr(output, "_PATIENCE", 0.2)
  stuck = threading.Event()

  class Screen(io.StringIO):
    def write(self, text):
      stuck.wait()
      return super().write(text)

  screen = Screen()
  stream = output.ShieldedStream(screen)
  start = time.monotonic()
  for number in range(20):
    print(number, file=stream, flush=True)
  assert time.monotonic() - start < 2
  assert screen.getvalue() == ""
  stuck.set()
  while len(screen.getvalue().split()) < 20:
    time.sleep(0.01)
  assert screen.getvalue().split() == [str(number) for number in range(20)]
