"""Runs the parts one after another, each in a process of its own with a share of the time, and keeps what they told."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from benchmarks.gpu import report, table
from benchmarks.gpu.report import Job
from rlpr_jax.errors import InputError

ROOT = pathlib.Path(__file__).parents[2]
LEAST = 15.0  # seconds without which no part is begun: starting JAX on a GPU takes most of them
LOG_BYTES = 200_000  # of each part's log that is kept, from its end
PASSED, FAILED, SKIPPED, TIMED_OUT, NO_TIME = "passed", "FAILED", "skipped", "TIMED OUT", "NO TIME"


class Part(NamedTuple):
  """A part, and how much of the time is its own."""

  name: str  # of its module in `parts`
  seconds: float  # that it is expected to take; the time that is left is shared out in proportion
  environment: tuple[tuple[str, str], ...] = ()


# The first ones say what the numbers of the others are worth; the last one takes what the others leave.
PARTS = (
  Part("about", 20),
  Part("ceilings", 20),
  Part("kernels", 80),
  Part("update", 110),
  Part("decode", 130),
  Part("memory", 60),
  Part("profile", 40),
  Part("score", 30),
  # Two programs share the card, torch's and this one: JAX would take most of its memory at once, and leave torch none.
  Part("parity", 60, (("XLA_PYTHON_CLIENT_PREALLOCATE", "false"),)),
  Part("quickstart", 120),
)


def choose(only: Sequence[str], parts: Sequence[Part] = PARTS) -> list[Part]:
  """The parts of these names, in the usual order; all if none is named.

  Raises:
    InputError: there is no such part.
  """
  names = [part.name for part in parts]
  for name in only:
    if name not in names:
      raise InputError(f"--only: no part {name!r}, expected some of {', '.join(names)}")
  return [part for part in parts if not only or part.name in only]


def allot(left: float, parts: Sequence[Part]) -> float:
  """Seconds of the first of the parts that are still to come: its share of those left, or 0 where that is too little.

  What a part does not use goes to those after it.

  >>> allot(300.0, [Part("a", 20), Part("b", 40)])
  100.0
  """
  share = left * parts[0].seconds / sum(part.seconds for part in parts)
  return 0.0 if left < LEAST else min(max(share, LEAST), left)


def run_all(
  parts: Sequence[Part],
  out: pathlib.Path,
  minutes: float,
  cache: str,
  rehearse: bool,
  command: Callable[[Job], list[str]],
  say: Callable[[str], None],
) -> dict[str, Any]:
  """Runs the parts and writes `out`/results.json, results.md and log.txt, anew after each part.

  A part that fails, hangs or dies costs its own time alone. On SIGTERM or Ctrl-C the one that runs is ended, and what
  was found is written.

  Args:
    minutes: for everything.
    cache: directory of compiled programs, which the parts share; "" for one that lasts as long as this.
    command: what runs a part.
    say: is told what goes on.

  Returns:
    the results, as they are written.

  Raises:
    InputError: no part can run here.
  """
  began = time.time()
  title = f"benchmarks.gpu, {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(began))}"
  results: dict[str, Any] = {"title": title, "rehearsal": rehearse, "minutes": minutes, "parts": {}}
  logs: dict[str, str] = {}
  stopped = False
  with tempfile.TemporaryDirectory() as work, _sigterm_interrupts():
    for i, part in enumerate(parts):
      left = began + 60 * minutes - time.time()
      seconds = 0.0 if stopped else allot(left, parts[i:])
      result = {"status": NO_TIME, "error": "stopped" if stopped else "", "seconds": 0.0, "limit": seconds}
      result |= {"tables": {}, "values": {}, "notes": []}
      results["parts"][part.name] = result
      if seconds:
        job = Job(part.name, work, str(out), time.time() + seconds, cache or f"{work}/programs", rehearse)
        progress = _Progress(say, began, 60 * minutes, parts[i:])
        with open(f"{work}/{part.name}.log", "w+b") as log:
          try:
            stopped = not _run(part, command(job), job, log, result, progress)
          finally:
            logs[part.name] = _tail(log)
        _judge(result, logs[part.name])
        say(f"{part.name}: {result['status']}{result['error'] and ', ' + result['error']}")
      _write(out, results, logs)
  return results


def passed(results: dict[str, Any]) -> bool:
  """Whether nothing failed or was left out for lack of time."""
  return all(part["status"] in (PASSED, SKIPPED) for part in results["parts"].values())


def _run(part: Part, command: list[str], job: Job, log, result: dict[str, Any], progress: "_Progress") -> bool:
  """Runs a part to its end or its limit; False if it was interrupted."""
  began = time.time()
  path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
  process = subprocess.Popen(
    command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path} | dict(part.environment), stdin=subprocess.DEVNULL,
    stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
  )  # fmt: skip
  status, interrupted, seen = None, False, 0
  try:
    while (status := process.poll()) is None and time.time() < job.until:
      told = report.read(report.events_file(job, part.name))
      for kind, what in told[seen:]:
        progress(part, kind, what)
      seen = len(told)
      time.sleep(0.1)
  except KeyboardInterrupt:
    interrupted = True
  finally:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGKILL)  # what it started, too
    process.wait()
  result["seconds"] = round(time.time() - began, 1)
  result["status"] = TIMED_OUT if status is None else PASSED if status == 0 else FAILED
  if interrupted:
    result["error"] = "stopped"
  elif status is None:
    result["error"] = f"ended after {result['seconds']:.0f} s"
  elif status < 0:
    result["error"] = f"ended by signal {-status}"
  for kind, what in report.read(report.events_file(job, part.name)):
    match kind:
      case "row":
        result["tables"].setdefault(what["table"], []).append(what["columns"])
      case "value":
        result["values"][what["name"]] = what["number"]
      case "note":
        result["notes"].append(what)
      case "failed":
        result["error"] = what
      case "skipped":
        result["status"], result["error"] = SKIPPED, what
      case "refused":
        raise InputError(what)
  return not interrupted


def _judge(result: dict[str, Any], log: str) -> None:
  """A part fails by what it found, too; one that died says why in the last line of its log."""
  wrong = [row for rows in result["tables"].values() for row in rows if row.get(report.OK) is False]
  if result["status"] == PASSED and wrong:
    result["status"] = FAILED
    result["error"] = f"{len(wrong)} rows do not meet their bound"
  lines = [line.strip() for line in log.splitlines() if line.strip()]
  if result["status"] == FAILED and (not result["error"] or result["error"].startswith("ended by")) and lines:
    result["error"] = ": ".join(filter(None, [result["error"], lines[-1][:300]]))


def _write(out: pathlib.Path, results: dict[str, Any], logs: dict[str, str]) -> None:
  (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
  (out / "results.md").write_text(table.render(results))
  (out / "log.txt").write_text("".join(f"===== {name}\n{text}\n" for name, text in logs.items()))


def _tail(log) -> str:
  log.seek(max(log.seek(0, os.SEEK_END) - LOG_BYTES, 0))
  return log.read().decode(errors="replace")


class _Progress:
  """Passes on what a part tells, with the time gone and an estimate of the time left."""

  def __init__(self, say: Callable[[str], None], began: float, seconds: float, parts: Sequence[Part]):
    self.say, self.began, self.seconds, self.parts, self.part_began = say, began, seconds, parts, time.time()

  def __call__(self, part: Part, kind: str, what: Any) -> None:
    if kind != "say":  # the rest stands in the document
      return
    now = time.time()
    own = max(part.seconds - (now - self.part_began), 0)
    estimate = min(own + sum(other.seconds for other in self.parts[1:]), self.began + self.seconds - now)
    self.say(f"[{now - self.began:4.0f} s, about {max(estimate, 0):.0f} s left] {part.name}: {what}")


@contextlib.contextmanager
def _sigterm_interrupts():
  """SIGTERM as Ctrl-C."""
  before = signal.signal(signal.SIGTERM, signal.default_int_handler)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)


def child(job: Job) -> list[str]:
  """The command of a part's process."""
  return [sys.executable, "-m", "benchmarks.gpu.child", json.dumps(job._asdict())]
