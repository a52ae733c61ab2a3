"""A run that everything happens to, beside the same run undisturbed: `python tools/soak.py --out=DIR`.

The quickstart's recipe for `--steps` steps, with one reward in a hundred NaN. One run is left alone. The other lies on
a disk of its own (a tmpfs, where one may be mounted; `umount` it in the end). It meets, at random moments and in turns:
kill -9, SIGTERM, a kill with the newest checkpoint cut in half, a `tee` that dies before the Ctrl-C that it shares,
SIGHUP, metrics and rollouts and pictures that are deleted before a kill, a disk that cannot be written for a while, and
one that is full for a while, with the log on it. After each end the same command is given again; after `--faults` of
them the run is left alone to its end. Then both accuracies, how many steps differ in any number, and the memory of the
longest stretch are printed. An undisturbed run that is there already is taken as it is.
"""

import contextlib
import itertools
import json
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
import zlib

import numpy as np
from absl import app, flags

# What a step computes; the rest of a row is time, and what depends on the process.
_COMPUTED = ("filter/", "held_out/", "reward/", "rollout/", "update/")
ROOT = pathlib.Path(__file__).parents[1]
KINDS = ("kill", "term", "damage", "tee", "hangup", "delete", "disk", "full")
_ON_A_DISK = ("disk", "full")  # of its own
_SIGNALS = {"term": signal.SIGTERM, "tee": signal.SIGINT, "hangup": signal.SIGHUP}  # the others are killed
_OUT = flags.DEFINE_string("out", None, "Directory of both runs.", required=True)  # the runs have a --workdir
_STEPS = flags.DEFINE_integer("steps", 200, "Training steps of each run.")
_FAULTS = flags.DEFINE_integer("faults", 16, "How many, then the run is left alone.")
_EVERY = flags.DEFINE_integer("every", 60, "Seconds between two faults, in the mean.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the faults.")
_CHILD = flags.DEFINE_bool("child", False, "Be a run; what this program starts.")


def child(workdir: pathlib.Path) -> None:
  """The recipe with one reward in a hundred NaN."""
  from rlpr_jax import train
  from rlpr_jax.training.reward import RewardSettings, compute_rewards

  config = recipe()
  settings = RewardSettings.of(config.reward)

  def reward(evidence, texts, prompts):
    total = np.array(compute_rewards(evidence, settings).total)
    rng = np.random.default_rng(zlib.crc32("".join(texts).encode()))  # the same for the same responses
    return np.where(rng.random(total.shape) < 0.01, np.nan, total)

  train.train(config, workdir, reward)


def recipe():
  sys.path.insert(0, str(ROOT))
  from configs import quickstart

  config = quickstart.get_config()
  config.steps, config.evaluation.every, config.log.checkpoint_every = _STEPS.value, 50, 5
  config.log.retry_seconds = 120.0
  return config


def start(workdir: pathlib.Path) -> tuple[subprocess.Popen, subprocess.Popen]:
  """A run, and the `tee` that takes its output."""
  command = [sys.executable, __file__, f"--out={workdir}", "--child", f"--steps={_STEPS.value}"]
  process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
  log = ["tee", "-a", str(workdir / "log")]
  tee = subprocess.Popen(log, stdin=process.stdout, stdout=subprocess.DEVNULL)
  process.stdout.close()  # tee alone reads it
  return process, tee


def resident_mib(process: subprocess.Popen) -> list[float]:
  """One figure, or none of a process that has just ended."""
  text = pathlib.Path(f"/proc/{process.pid}/status").read_text()
  return [int(line.split()[1]) / 1024 for line in text.splitlines() if line.startswith("RssAnon")]


def rows(workdir: pathlib.Path) -> list[dict]:
  path = workdir / "metrics.jsonl"
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait(process: subprocess.Popen, seconds: float, memory: list[float]) -> bool:
  """Whether the process is over by then; its memory is written down each second."""
  end = time.monotonic() + seconds
  while time.monotonic() < end:
    try:
      process.wait(1)
      return True
    except subprocess.TimeoutExpired:
      memory += resident_mib(process)
  return False


def damage(workdir: pathlib.Path) -> None:
  """Cuts the newest checkpoint's largest file in half."""
  steps = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
  files = (path for path in (workdir / "checkpoints" / str(steps[-1])).rglob("*") if path.is_file())
  largest = max(files, key=lambda path: path.stat().st_size)
  largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def delete(workdir: pathlib.Path, process: subprocess.Popen) -> None:
  """Deletes what the run has written for people, and waits until it is there again."""
  for name in ("rollouts", "tensorboard"):
    shutil.rmtree(workdir / name)
  (workdir / "metrics.jsonl").unlink()
  while not (workdir / "metrics.jsonl").exists() and process.poll() is None:
    time.sleep(0.5)


def remount(workdir: pathlib.Path, how: str) -> bool:
  return subprocess.run(["mount", "-o", f"remount,{how}", workdir], capture_output=True).returncode == 0


def fill(workdir: pathlib.Path) -> pathlib.Path:
  """Fills the disk; the file that does."""
  file = workdir / "full"
  with contextlib.suppress(OSError), file.open("wb", buffering=0) as out:
    while True:
      out.write(bytes(2**20))
  return file


def disturbed(workdir: pathlib.Path) -> tuple[dict[str, int], list[float]]:
  """The run with faults, to its end; how many of each there were, and the memory of the longest stretch."""
  rng, counts, longest = random.Random(_SEED.value), dict.fromkeys(KINDS, 0), []
  mount = ["mount", "-t", "tmpfs", "-o", "size=512m", "tmpfs", workdir]
  mounted = subprocess.run(mount, capture_output=True).returncode == 0
  kinds = [kind for kind in KINDS if mounted or kind not in _ON_A_DISK]
  for fault in itertools.cycle(kinds):
    (process, tee), memory = start(workdir), []
    begun = len(rows(workdir))
    while len(rows(workdir)) <= begun and process.poll() is None:  # let each stretch come a step further
      time.sleep(0.5)
    last = sum(counts.values()) >= _FAULTS.value
    over = wait(process, float("inf") if last else rng.uniform(0.2, 1.8) * _EVERY.value, memory)
    if not over and fault in _ON_A_DISK:
      filler = fill(workdir) if fault == "full" else None
      if fault == "disk":
        remount(workdir, "ro")
      over = wait(process, rng.uniform(5, 30), memory)
      if filler is None:
        remount(workdir, "rw")
      else:
        filler.unlink()
      counts[fault] += 1
      over = over or wait(process, 20, memory)
    if not over:
      if fault == "damage":
        process.kill()
        process.wait()
        damage(workdir)
      else:
        if fault == "tee":
          tee.kill()
          tee.wait()
        if fault == "delete":
          delete(workdir, process)
        process.send_signal(_SIGNALS.get(fault, signal.SIGKILL))
      counts[fault] += fault not in _ON_A_DISK
    status = process.wait()
    tee.wait()
    longest = max(longest, memory, key=len)
    done = rows(workdir)[-1]["step"] if rows(workdir) else 0
    print(f"{fault}: status {status}, {done} of {_STEPS.value} steps, {counts}", flush=True)
    if status == 0 and done == _STEPS.value:
      return counts, longest
  raise AssertionError("the faults never end")


def main(argv: list[str]) -> None:
  workdir = pathlib.Path(_OUT.value)
  if _CHILD.value:
    from rlpr_jax import output

    with output.shielded():
      child(workdir)
    return
  alone, other = workdir / "alone", workdir / "disturbed"
  for directory in (alone, other):
    directory.mkdir(parents=True, exist_ok=True)
  memory: list[float] = []
  if len(rows(alone)) <= _STEPS.value:
    process, _ = start(alone)
    while not wait(process, 60, memory):
      print(f"alone: {len(rows(alone))} of {_STEPS.value} steps", flush=True)
    if process.returncode:
      raise SystemExit(f"the undisturbed run ended with status {process.returncode}: {alone / 'log'}")
  counts, stretch = disturbed(other)
  for name, directory, mib in (("alone", alone, memory), ("disturbed", other, stretch)):
    accuracy = {row["step"]: row["held_out/accuracy"] for row in rows(directory) if "held_out/accuracy" in row}
    steps = [row["step"] for row in rows(directory)]
    assert steps == list(range(len(steps))), "a step was lost or written twice"
    quarter = len(mib) // 4
    flat = f"{np.median(mib[quarter : 2 * quarter]):.0f} to {np.median(mib[-quarter:]):.0f} MiB" if quarter else "-"
    print(f"{name}: accuracy {accuracy}, memory from the second quarter to the last {flat} ({len(mib)} s)")
  computed = [
    [{name: value for name, value in row.items() if name.startswith(_COMPUTED)} for row in rows(directory)]
    for directory in (alone, other)
  ]
  differ = sum(ours != theirs for ours, theirs in zip(*computed, strict=True))
  print(f"steps that differ in any number: {differ} of {len(computed[0])}")
  print(f"faults: {counts}, prompts dropped for NaN: {sum(row.get('reward/not_finite', 0) for row in rows(other))}")


if __name__ == "__main__":
  app.run(main)
