"""A whole run: `rlpr_jax.train` on configs/quickstart.py, held-out accuracy before, meanwhile and after."""

import json
import pathlib
import re
import subprocess
import sys
import tempfile
import time

from benchmarks.gpu.report import Report

STARTS_ANOTHER = True  # process, which takes the device: this one leaves it alone
ACCURACY = "held_out/accuracy"  # of rlpr_jax.train
# Only to see that it runs.
REHEARSAL = (
  "--config.steps=2", "--config.warm_start.steps=20", "--config.prompts_per_step=8", "--config.rollout.slots=8",
  "--config.rollout.prompts_per_draw=8", "--config.rollout.prefill_prompts=8", "--config.rollout.score_rows=8",
  "--config.evaluation.prompts=8", "--config.evaluation.every=1",
)  # fmt: skip


def run(report: Report) -> None:
  with tempfile.TemporaryDirectory() as directory:
    metrics, log = pathlib.Path(directory, "run/metrics.jsonl"), pathlib.Path(directory, "log")
    command = [
      sys.executable, "-m", "rlpr_jax.train", "--config=configs/quickstart.py", f"--workdir={metrics.parent}",
      f"--config.compilation_cache={report.job.cache}", *(REHEARSAL if report.rehearse else ()),
    ]  # fmt: skip
    began, told = time.perf_counter(), 0
    report.say("warm start")
    with log.open("w") as output:
      process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
      while told is not None:
        ended = process.poll() is not None  # before the last look
        measured = [row for row in _rows(metrics) if ACCURACY in row]
        for row in measured[told:]:
          took = time.perf_counter() - began
          report.say(f"step {row['step']}: accuracy {row[ACCURACY]:.1%}")
          report.row("quickstart", {"after step": row["step"], "held-out accuracy": row[ACCURACY], "s": took})
        told = None if ended else len(measured)
        time.sleep(0.2)
    lines = log.read_text().splitlines()
    sys.stderr.write("\n".join(lines[-100:]) + "\n")
    if process.returncode:
      last = lines[-1] if lines else ""
      if missing := re.match(r"ModuleNotFoundError: No module named '([^']+)'", last):
        raise ModuleNotFoundError(last, name=missing[1])
      raise RuntimeError(f"rlpr_jax.train ended with status {process.returncode}: {last}")
    seconds = [row["seconds/step"] for row in _rows(metrics) if "seconds/step" in row]
    report.note(f"the run took {time.perf_counter() - began:.0f} s, its start included")
    report.note("; ".join(line for line in lines if line.startswith(("devices:", "rlpr_jax "))))
    if seconds:
      report.note(f"a step of training took {sorted(seconds)[len(seconds) // 2]:.2f} s (median of {len(seconds)})")


def _rows(metrics: pathlib.Path) -> list[dict]:
  text = metrics.read_text() if metrics.exists() else ""
  return [json.loads(line) for line in text.split("\n")[:-1]]  # the last line may not be whole
