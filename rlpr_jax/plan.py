"""Says before a run whether it fits a slice of TPUs or GPUs, and about how long a step takes, with none of them there:

    rlpr plan --config=RECIPE --topology=v5p:4x4x4 [--config.field=value ...]
    rlpr plan --config=RECIPE --compare=v5e:16x16,v5p:4x4x4,h100:8

The real compiler compiles the programs of a training step at the config's shapes. Memory is its figure; times are
rooflines, estimates that nothing here has measured. Exit status 3 says that nothing that was asked for fits.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from rlpr_jax import command_line, huggingface, validation
from rlpr_jax import config as configs
from rlpr_jax.errors import INTERRUPTED, MACHINE, USAGE, InputError, MachineError, exit_with_one_line
from rlpr_jax.planning import compiler, estimate, hardware, table
from rlpr_jax.planning.estimate import Lengths
from rlpr_jax.runs.storage import write_atomically

DOES_NOT_FIT = 3


def main(argv: Sequence[str] | None = None) -> None:
  """The program: `argv` is its name and its arguments, those of this process if None."""
  with exit_with_one_line():
    given, config = command_line.parse_config(define_flags(), argv, __doc__)
    if bool(given.topology) == bool(given.compare):
      raise InputError("--topology: missing, expected it or --compare")
    validation.validate(config)
    places = [hardware.parse(name.strip()) for name in given.compare or [given.topology]]
    environments = [compiler.environment(place) for place in places]
    lengths = Lengths(
      min(given.prompt_tokens, config.data.prompt_limit),
      min(given.response_tokens, config.rollout.max_response_length),
      min(given.reference_tokens, config.data.max_reference_length),
      given.draws,
      given.response_spread,
    )
    plans = []
    for place, environment in zip(places, environments, strict=True):
      try:
        plans.append(ask(config, place, environment, lengths, fast=given.fast, search=given.search))
      except InputError as error:
        if not given.compare:
          raise
        plans.append({"topology": place.name, "chips": place.chips, "fits": False, "error": str(error)})
  if given.json:
    print(json.dumps(plans if given.compare else plans[0], indent=2))
  elif given.compare:
    print(table.comparison(plans, config.steps))
  else:
    print(table.of_one(plans[0], config.steps))
  sys.exit(0 if any(plan.get("fits") for plan in plans) else DOES_NOT_FIT)


def _version(package: str) -> str:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return ""


def define_flags() -> flags.FlagValues:
  given = flags.FlagValues()
  command_line.define_config(given, None)
  flags.DEFINE_string("topology", None, "Slice, CHIP:SHAPE as in v5p:4x4x4, h100:8 or local.", flag_values=given)
  flags.DEFINE_list("compare", [], "Several slices, for one table.", flag_values=given)
  flags.DEFINE_bool(
    "fast", False, "Lowest level of optimisation: sooner, memory off by up to about 15%.", flag_values=given
  )
  flags.DEFINE_bool("search", True, "Look for the slots and micro-batch that fit best.", flag_values=given)
  flags.DEFINE_bool("json", False, "Print JSON instead of tables.", flag_values=given)
  for name, tokens, what in (
    ("prompt_tokens", 256, "Mean tokens of a prompt, for the time of a step."),
    ("response_tokens", 768, "Mean tokens of a response."),
    ("reference_tokens", 16, "Mean tokens of a spliced reference answer."),
  ):
    flags.DEFINE_integer(name, tokens, what, lower_bound=1, flag_values=given)
  flags.DEFINE_float(
    "draws", 1.0, "Draws of prompts a step: above 1 where the filter drops many.", lower_bound=0, flag_values=given
  )
  flags.DEFINE_float(
    "response_spread",
    estimate.SPREAD,
    "Standard deviation of the logarithm of a response's tokens: 0 where all are of one length.",
    lower_bound=0,
    flag_values=given,
  )
  return given


def ask(
  config: ConfigDict, place: hardware.Slice, environment: dict[str, str], lengths: Lengths, fast: bool, search: bool
) -> dict[str, Any]:
  """The plan for one slice, made by a process of its own, since a compiler may take its process down with it.

  Raises:
    InputError: it could not be made, and why.
    MachineError: so it could not, for a reason that may pass.
  """
  with tempfile.TemporaryDirectory() as directory:
    job = pathlib.Path(directory)
    (job / "config.json").write_text(configs.to_json(config))
    cache = pathlib.Path(config.compilation_cache).expanduser() / "plans" if config.compilation_cache else None
    wanted = {"topology": place.name, "fast": fast, "search": search, "lengths": lengths._asdict()}
    if config.model.path:
      model = huggingface.resolve(config.model.path, ["config.json"])
      huggingface.load_config(model)  # what is wrong with it is said at once
      wanted["model"] = str(model.absolute())
    kept = cache / f"plan-{fingerprint(config, wanted, environment)}.json" if cache else None
    if kept and (plan := _read(kept)):
      return plan
    (job / "job.json").write_text(json.dumps(wanted | {"cache": str(cache or "")}))
    command = [sys.executable, "-m", "rlpr_jax.planning.child", directory]
    with (job / "log").open("w+") as log:
      child = subprocess.Popen(command, env=os.environ | environment, stderr=subprocess.PIPE, text=True)
      try:
        for line in child.stderr:
          if line.startswith(("[", "warning: ")):
            print(line, end="", file=sys.stderr, flush=True)
          log.write(line)
        status = child.wait()
      finally:
        child.kill()  # does nothing to one that has ended
      log.seek(0)
      said = log.read()
    if status == 0:
      text = (job / "result.json").read_text()
      if kept:
        with contextlib.suppress(OSError):  # it can be made again
          kept.parent.mkdir(parents=True, exist_ok=True)
          write_atomically(kept, text)
      return json.loads(text)
  errors = [line.removeprefix("error: ") for line in said.splitlines() if line.startswith("error: ")]
  if status == INTERRUPTED:
    raise KeyboardInterrupt
  if status in (USAGE, MACHINE) and errors:
    raise (InputError if status == USAGE else MachineError)(errors[-1])
  print(said[-4000:], file=sys.stderr)
  raise InputError(f"--topology: {place.name}: the compiler ended with status {status}; what it said is above")


def _read(kept: pathlib.Path) -> dict[str, Any] | None:
  """A plan that was kept; None where there is none, or it is damaged: it is made anew."""
  try:
    plan = json.loads(kept.read_text())
  except (OSError, ValueError, RecursionError):
    return None
  return plan if isinstance(plan, dict) else None


def fingerprint(config, wanted: dict[str, Any], environment: dict[str, str]) -> str:
  """A hash of all that a plan depends on, this program included."""
  files = sorted(pathlib.Path(__file__).parent.rglob("*.py"))
  if "model" in wanted:
    files.append(pathlib.Path(wanted["model"]) / "config.json")
  parts = [configs.to_json(config), json.dumps(wanted, sort_keys=True), json.dumps(environment, sort_keys=True)]
  parts += [_version(name) for name in ("jax", "jaxlib", "flax", "optax", "tokamax")]
  parts += [os.environ.get(name, "") for name in ("XLA_FLAGS", "XLA_PYTHON_CLIENT_MEM_FRACTION")]
  parts += [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
  return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


if __name__ == "__main__":
  main()
