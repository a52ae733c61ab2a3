"""Runs a sweep: variants of one recipe, several seeds each, then a table and a plot.

    python launch/sweep.py --sweep=configs/sweeps/rewards.py --config=configs/sentences.py --workdir=runs/rewards \
      [--seeds=0,1,2] [--variants=mean,product] [--processes=1] [--dry_run] [--config.field=value ...]

A recipe with a warm start is warm-started once a seed; every variant begins from that policy, unless it changes what
the policy starts from (`warm_start`, `model`, `lora` or `data`).

Given again, the same command goes on where it stopped: runs that are finished are left alone, others resume. Ctrl-C,
SIGTERM and SIGHUP have the runs save and stop, and no others begin.
`--dry_run` prints one command a run, for a cluster's own queue, the warm starts first, which the others wait for;
afterwards the same command without it makes the table.
`--wandb_sweep` prints the same runs as a sweep of Weights & Biases, whose agents then run them (docs/launching.md).
"""

import concurrent.futures
import json
import pathlib
import re
import runpy
import shlex
import signal
import statistics
import subprocess
import sys
import time
from typing import NamedTuple

from absl import flags
from ml_collections import ConfigDict

from rlpr_jax import command_line, validation
from rlpr_jax.errors import InputError, exit_with_one_line, user_code
from rlpr_jax.runs import ACCURACY, metrics
from rlpr_jax.runs.children import Children
from rlpr_jax.runs.storage import write_result

_START = ("warm_start.", "model.", "lora.", "data.")  # fields that decide what a policy starts from


class Job(NamedTuple):
  """One run."""

  name: str
  seed: int
  workdir: pathlib.Path
  commands: list[list[str]]  # one after the other
  steps: int

  def __str__(self) -> str:
    return " && ".join(map(shlex.join, self.commands))

  @property
  def policy(self) -> pathlib.Path:
    """Of a warm start: the directory that its variants load."""
    return self.workdir.with_name(f"{self.workdir.name}-policy")


def main() -> None:
  with exit_with_one_line():
    given, config = command_line.parse_config(define_flags(), None, __doc__)
    for name, expected in (("sweep", "a file of variants"), ("workdir", "a directory")):
      if not given[name].value:
        raise InputError(f"--{name}: missing, expected {expected}")
    if not given.seeds or len(set(given.seeds)) < len(given.seeds) or not all(map(str.isdigit, given.seeds)):
      raise InputError(f"--seeds: {','.join(given.seeds)}, expected different numbers such as 0,1,2")
    workdir, sweep = pathlib.Path(given.workdir), choose(load_sweep(given.sweep), given.variants)
    _, overrides = command_line.split_overrides(sys.argv[1:])
    arguments = [f"--config={given.config}", *overrides]
    starts, jobs = make_jobs(sweep, config, arguments, given.seeds, workdir)
    if given.wandb_sweep:
      print(json.dumps(wandb_sweep(given, list(sweep), overrides), indent=2))
      return
    if given.dry_run:
      for job in starts + jobs:
        print(job)
      return
    with Children(given.grace) as children:
      at_once = given.processes
      left = [job for job in starts if not (job.policy / "config.json").exists()]
      failed = run_all(left, "warm starts", starts, at_once, children)
      if not failed:
        failed = run_all([job for job in jobs if not is_finished(job)], "runs", jobs, at_once, children)
    if children.told:
      name = signal.Signals(children.told).name
      print(f"stopped by {name}: the same command goes on from there", file=sys.stderr)
      sys.exit(128 + children.told)
    finished = [job for job in jobs if is_finished(job)]
    results = {name: [last_accuracies(job) for job in finished if job.name == name] for name in sweep}
    write_results(workdir, results)
    write_course(workdir, {name: [course(job) for job in finished if job.name == name] for name in sweep})
    if failed:
      print(f"error: {len(failed)} runs failed: {', '.join(failed)}", file=sys.stderr)
      sys.exit(1)


def define_flags() -> flags.FlagValues:
  given = flags.FlagValues()
  command_line.define_config(given, None)
  flags.DEFINE_string("sweep", None, "File whose get_sweep() gives {name: {field: value}}.", flag_values=given)
  flags.DEFINE_string("workdir", None, "Directory of the runs, the table and the plot.", flag_values=given)
  flags.DEFINE_list("seeds", ["0", "1", "2"], "config.seed of the runs of each variant.", flag_values=given)
  flags.DEFINE_list("variants", [], "Names of those to run; all if not given.", flag_values=given)
  flags.DEFINE_integer("processes", 1, "Runs at a time.", lower_bound=1, flag_values=given)
  flags.DEFINE_float(
    "grace", 300, "Seconds that runs may take to save in when told to stop.", lower_bound=0, flag_values=given
  )
  flags.DEFINE_bool("dry_run", False, "Print the commands alone.", flag_values=given)
  flags.DEFINE_alias("dry-run", "dry_run", flag_values=given)
  flags.DEFINE_bool("wandb_sweep", False, "Print a sweep of Weights & Biases alone.", flag_values=given)
  return given


def load_sweep(path: str) -> dict[str, dict[str, object]]:
  """The variants of a sweep file.

  Raises:
    InputError: no such file, or not such a function in it.
  """
  try:
    pathlib.Path(path).read_bytes()
  except OSError as error:
    raise InputError(f"--sweep: {path} cannot be read ({error.strerror})") from None
  with user_code(f"--sweep: {path}", path):
    get_sweep = runpy.run_path(path).get("get_sweep")
    if get_sweep is None:
      raise InputError(f"--sweep: {path} has no get_sweep()")
    sweep = get_sweep()
  if not sweep or not all(re.fullmatch(r"[\w.-]+", name) for name in sweep):
    raise InputError(f"--sweep: {path}, expected names of letters, digits, '_', '-' and '.'")
  return sweep


def choose(sweep: dict[str, dict[str, object]], names: list[str]) -> dict[str, dict[str, object]]:
  """The variants of these names, in the sweep's order; all for none.

  Raises:
    InputError: there is no such one.
  """
  for name in names:
    if name not in sweep:
      raise InputError(f"--variants: {name}, expected some of {', '.join(sweep)}")
  return {name: overrides for name, overrides in sweep.items() if name in names or not names}


def wandb_sweep(given: flags.FlagValues, variants: list[str], overrides: list[str]) -> dict[str, object]:
  """A sweep of Weights & Biases that gives its agents one variant and seed after the other, as `wandb sweep` reads it.

  Args:
    overrides: fields of the config that the command line sets.
  """
  own = [f"--{name}={given[name].value}" for name in ("sweep", "config", "workdir")]
  named = any(split.startswith("--config.log.trackers") for split in overrides)
  trackers = [] if named else ["--config.log.trackers=('tensorboard', 'wandb')"]
  return {
    "name": pathlib.Path(given.sweep).stem,
    "method": "grid",
    "metric": {"name": ACCURACY, "goal": "maximize"},
    "parameters": {"variants": {"values": variants}, "seeds": {"values": [int(seed) for seed in given.seeds]}},
    "program": "launch/sweep.py",
    "command": ["${env}", "${interpreter}", "${program}", *own, *overrides, *trackers, "${args}"],
  }


def make_jobs(
  sweep: dict[str, dict[str, object]],
  config: ConfigDict,
  arguments: list[str],
  seeds: list[str],
  workdir: pathlib.Path,
) -> tuple[list[Job], list[Job]]:
  """The warm starts, and every run of the sweep, seed by seed; all of them are checked before the first begins.

  Args:
    arguments: of the command line, which every run gets.

  Raises:
    InputError: one of the variants cannot be run.
  """
  program = [sys.executable, "-m", "rlpr_jax.train", *arguments]
  starts, jobs = [], []
  for seed in seeds:
    start = warm_start_of(seed, program, workdir)
    shared = False
    for name, overrides in sweep.items():
      changes = {**overrides, "seed": seed}
      variant = config.copy_and_resolve_references()
      try:
        variant.update_from_flattened_dict({**overrides, "seed": int(seed)})
        validation.validate(variant)
      except (InputError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"--sweep: {name}, seed {seed}: {' '.join(str(error).split())}") from None
      if config.warm_start.steps and not any(field.startswith(_START) for field in overrides):
        changes |= {"model.path": str(start.policy), "warm_start.steps": 0}
        shared = True
      directory = workdir / f"{name}-{seed}"
      command = [*program, f"--workdir={directory}", *options(changes)]
      jobs.append(Job(name, int(seed), directory, [command], variant.steps))
    if shared:
      starts.append(start)
  return starts, jobs


def warm_start_of(seed: str, program: list[str], workdir: pathlib.Path) -> Job:
  """The recipe up to its first step, and the policy that it has then, as a Hugging Face directory."""
  directory = workdir / f"warm_start-{seed}"
  changes = {"seed": seed, "steps": 0, "evaluation.prompts": 0, "reward.baseline_policy": "none", "reward.shadow": ()}
  changes |= {"log.trackers": (), "export.every": 0}  # no run that somebody looks at
  train = [*program, f"--workdir={directory}", *options(changes)]
  job = Job("warm_start", int(seed), directory, [train], 0)
  export = [sys.executable, "-m", "rlpr_jax.export", f"--workdir={directory}", f"--out={job.policy}", "--dtype=float32"]
  return job._replace(commands=[train, export])


def options(changes: dict[str, object]) -> list[str]:
  return [f"--config.{field}={value}" for field, value in changes.items()]


def run_all(jobs: list[Job], what: str, every: list[Job], at_once: int, children: Children) -> list[str]:
  """Runs those of `every` that are left, so many at a time; returns the directories of those that did not finish."""
  start, done, failed = time.monotonic(), 0, []
  print(f"{len(every) - len(jobs)} of {len(every)} {what} were finished before", flush=True)
  with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
    for job, status in pool.map(lambda job: (job, run(job, children)), jobs):
      if children.told:
        failed.append(job.workdir.name)
        continue
      done += 1
      if status:
        failed.append(job.workdir.name)
      left = (time.monotonic() - start) / done * (len(jobs) - done)
      word = f"failed with status {status}, see {job.workdir}.log" if status else "finished"
      print(f"{job.workdir.name} {word}  {done}/{len(jobs)}  {metrics.duration(left)} left", flush=True)
  return failed


def run(job: Job, children: Children) -> int:
  """The exit status of the first of its programs that failed; a run that was told to stop ends with 0 as well."""
  job.workdir.parent.mkdir(parents=True, exist_ok=True)
  with open(f"{job.workdir}.log", "a") as log:
    for command in job.commands:
      if children.told:
        break
      if status := children.start(command, stdout=log, stderr=subprocess.STDOUT).wait():
        return status
  return 0


def is_finished(job: Job) -> bool:
  path = job.workdir / "metrics.jsonl"
  return path.exists() and any(row["step"] == job.steps for row in metrics.read(path))


def last_accuracies(job: Job) -> tuple[float, float]:
  """Held-out accuracy before the first step and after the last."""
  rows = metrics.read(job.workdir / "metrics.jsonl")
  accuracy = {row["step"]: row[ACCURACY] for row in rows if ACCURACY in row}
  return accuracy.get(0, float("nan")), accuracy.get(job.steps, float("nan"))


def write_results(workdir: pathlib.Path, results: dict[str, list[tuple[float, float]]]) -> None:
  """`table.md`, `table.json` and `table.png` in the sweep's directory, and the table on the screen."""
  lines = ["| variant | seeds | held-out before | after | gain | least to most |", "|---|---|---|---|---|---|"]
  for name, pairs in results.items():
    if not pairs:
      lines.append(f"| {name} | 0 | - | - | - | - |")
      continue
    before, after = (statistics.fmean(values) for values in zip(*pairs, strict=True))
    gains = [100 * (last - first) for first, last in pairs]
    spread = f" ± {statistics.stdev(gains):.1f}" if len(gains) > 1 else ""
    lines.append(
      f"| {name} | {len(pairs)} | {100 * before:.1f}% | {100 * after:.1f}% | {statistics.fmean(gains):+.1f}{spread} |"
      f" {min(gains):+.1f} to {max(gains):+.1f} |"
    )
  table = "\n".join(lines) + "\n"
  print(table, end="", flush=True)
  write_result(workdir / "table.md", table)
  write_result(workdir / "table.json", json.dumps(results, indent=2))
  plot(workdir / "table.png", results)


class Course(NamedTuple):
  """What the evaluations of a run found, one after the other."""

  steps: list[int]
  accuracies: list[float]
  answers: dict[str, float]  # `answer/empty` and `answer/exact` of its last step


def course(job: Job) -> Course:
  rows = metrics.read(job.workdir / "metrics.jsonl")
  found = [(row["step"], row[ACCURACY]) for row in rows if ACCURACY in row]
  last = next((row for row in reversed(rows) if "answer/empty" in row), {})
  answers = {name: last.get(f"answer/{name}", float("nan")) for name in ("empty", "exact")}
  return Course([step for step, _ in found], [accuracy for _, accuracy in found], answers)


def write_course(workdir: pathlib.Path, courses: dict[str, list[Course]]) -> None:
  """`course.md` and `course.png`: held-out accuracy at every evaluation, and what the own answers had become.

  Nothing where there is no evaluation between the first and the last.
  """
  steps = sorted({step for runs in courses.values() for run in runs for step in run.steps})
  if len(steps) < 3:
    return
  lines = [
    f"| variant | {' | '.join(f'step {step}' for step in steps)} | most lost from the best | empty | exact |",
    "|" + "---|" * (len(steps) + 4),
  ]
  for name, runs in courses.items():
    if not runs:
      continue
    means = [
      statistics.fmean(run.accuracies[run.steps.index(step)] for run in runs) if all(step in run.steps for run in runs)
      else float("nan")
      for step in steps
    ]  # fmt: skip
    lost = max(max(run.accuracies) - run.accuracies[-1] for run in runs)
    empty, exact = (statistics.fmean(run.answers[part] for run in runs) for part in ("empty", "exact"))
    shares = " | ".join(f"{100 * mean:.1f}%" for mean in means)
    lines.append(f"| {name} | {shares} | {100 * lost:.1f} | {100 * empty:.1f}% | {100 * exact:.1f}% |")
  table = "\n".join(lines) + "\n"
  print(table, end="", flush=True)
  write_result(workdir / "course.md", table)
  plot_course(workdir / "course.png", courses)


def plot_course(path: pathlib.Path, courses: dict[str, list[Course]]) -> None:
  """Held-out accuracy over the steps, one line a seed, a colour a variant."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(8, 4.5), layout="constrained")
  axes = figure.subplots()
  for number, (name, runs) in enumerate(courses.items()):
    for i, run in enumerate(runs):
      accuracies = [100 * accuracy for accuracy in run.accuracies]
      axes.plot(run.steps, accuracies, color=f"C{number % 10}", marker=".", label=None if i else name)
  axes.set_xlabel("training step")
  axes.set_ylabel("held-out accuracy, %")
  axes.legend()
  figure.savefig(path, dpi=120)


def plot(path: pathlib.Path, results: dict[str, list[tuple[float, float]]]) -> None:
  """Each variant's gains, one dot a seed and a bar at their mean."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(8, 0.5 * len(results) + 1.2), layout="constrained")
  axes = figure.subplots()
  for y, pairs in enumerate(results.values()):
    gains = [100 * (last - first) for first, last in pairs]
    if gains:
      axes.barh(y, statistics.fmean(gains), color="#9ecae1")
    axes.plot(gains, [y] * len(gains), "o", color="#08519c", markersize=5)
  axes.axvline(0, color="black", linewidth=0.8)
  axes.set_yticks(range(len(results)), list(results))
  axes.invert_yaxis()
  axes.set_xlabel("gain of held-out accuracy, points (one dot a seed)")
  figure.savefig(path, dpi=120)


if __name__ == "__main__":
  main()
