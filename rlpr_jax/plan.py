"""Says before a run whether it fits a slice of TPUs or GPUs, and about how long a step takes, with none of them there:

    python -m rlpr_jax.plan --config=configs/X.py --topology=v5p:4x4x4 [--config.field=value ...]
    python -m rlpr_jax.plan --config=configs/X.py --compare=v5e:16x16,v5p:4x4x4,h100:8

The real compiler compiles the programs of a training step at the config's shapes. Memory is its figure; times are
rooflines, estimates that nothing here has measured. Exit status 3 says that nothing that was asked for fits.
"""

import hashlib
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from rlpr_jax import config as configs
from rlpr_jax import models
from rlpr_jax.errors import USAGE, InputError, exit_on_input_error, parse_flags
from rlpr_jax.planning import compiler, hardware, table
from rlpr_jax.planning.estimate import Lengths
from rlpr_jax.storage import write_atomically

DOES_NOT_FIT = 3

_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe, a Python file.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "Slice, as rlpr_jax/planning/hardware.py names it: v5p:4x4x4.")
_COMPARE = flags.DEFINE_list("compare", [], "Several slices, for one table.")
_FAST = flags.DEFINE_bool("fast", False, "Lowest level of optimisation: sooner, memory off by up to about 15%.")
_SEARCH = flags.DEFINE_bool("search", True, "Look for the slots and micro-batch that fit best.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON instead of tables.")
_PROMPT = flags.DEFINE_integer("prompt_tokens", 256, "Mean tokens of a prompt, for the time of a step.", lower_bound=1)
_RESPONSE = flags.DEFINE_integer("response_tokens", 768, "Mean tokens of a response.", lower_bound=1)
_REFERENCE = flags.DEFINE_integer("reference_tokens", 16, "Mean tokens of a spliced reference answer.", lower_bound=1)
_DRAWS = flags.DEFINE_float(
  "draws", 1.0, "Draws of prompts a step: above 1 where the filter drops many.", lower_bound=0
)


def main(_: list[str]) -> None:
  with exit_on_input_error():
    if bool(_TOPOLOGY.value) == bool(_COMPARE.value):
      raise InputError("--topology: missing, expected it or --compare")
    if _CONFIG.value is None:
      raise InputError("--config: missing, expected a recipe, a Python file")
    try:
      config = _CONFIG.value
      configs.validate(config)
    except OSError as error:  # a config file that cannot be read is only said at the first look into it
      raise InputError(" ".join(str(error).split())) from None
    places = [hardware.parse(name.strip()) for name in _COMPARE.value or [_TOPOLOGY.value]]
    environments = [compiler.environment(place) for place in places]
    results = []
    for place, environment in zip(places, environments, strict=True):
      try:
        results.append(ask(config, place, environment))
      except InputError as error:
        if not _COMPARE.value:
          raise
        results.append({"topology": place.name, "chips": place.chips, "fits": False, "error": str(error)})
  if _JSON.value:
    print(json.dumps(results if _COMPARE.value else results[0], indent=2))
  elif _COMPARE.value:
    print(table.comparison(results, config.steps))
  else:
    print(table.of_one(results[0], config.steps))
  sys.exit(0 if any(result.get("fits") for result in results) else DOES_NOT_FIT)


def ask(config, place: hardware.Slice, environment: dict[str, str]) -> dict[str, Any]:
  """The plan for one slice, made by a process of its own, since a compiler may take its process down with it.

  Raises:
    InputError: it could not be made, and why.
  """
  with tempfile.TemporaryDirectory() as directory:
    job = pathlib.Path(directory)
    (job / "config.json").write_text(configs.to_json(config))
    lengths = Lengths(
      min(_PROMPT.value, config.data.prompt_limit),
      min(_RESPONSE.value, config.rollout.max_response_length),
      min(_REFERENCE.value, config.data.max_reference_length),
      _DRAWS.value,
    )
    cache = pathlib.Path(config.compilation_cache).expanduser() / "plans" if config.compilation_cache else None
    wanted = {"topology": place.name, "fast": _FAST.value, "search": _SEARCH.value, "lengths": lengths._asdict()}
    if config.model.path:
      model = models.resolve(config.model.path, ["config.json"])
      models.load_config(model)  # what is wrong with it is said at once
      wanted["model"] = str(model.absolute())
    kept = cache / f"plan-{fingerprint(config, wanted, environment)}.json" if cache else None
    if kept and kept.exists():
      return json.loads(kept.read_text())
    (job / "job.json").write_text(json.dumps(wanted | {"cache": str(cache or "")}))
    command = [sys.executable, "-m", "rlpr_jax.planning.child", directory]
    with (job / "log").open("w+") as log:
      child = subprocess.Popen(command, env=os.environ | environment, stderr=subprocess.PIPE, text=True)
      for line in child.stderr:
        if line.startswith("["):
          print(line, end="", file=sys.stderr, flush=True)
        log.write(line)
      status = child.wait()
      log.seek(0)
      said = log.read()
    if status == 0:
      text = (job / "result.json").read_text()
      if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, text)
      return json.loads(text)
  errors = [line.removeprefix("error: ") for line in said.splitlines() if line.startswith("error: ")]
  if status == USAGE and errors:
    raise InputError(errors[-1])
  print(said[-4000:], file=sys.stderr)
  raise InputError(f"--topology: {place.name}: the compiler ended with status {status}; what it said is above")


def fingerprint(config, wanted: dict[str, Any], environment: dict[str, str]) -> str:
  """A hash of all that a plan depends on, this program included."""
  files = sorted(pathlib.Path(__file__).parent.rglob("*.py"))
  if "model" in wanted:
    files.append(pathlib.Path(wanted["model"]) / "config.json")
  parts = [configs.to_json(config), json.dumps(wanted, sort_keys=True), json.dumps(environment, sort_keys=True)]
  parts += [importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")]
  parts += [os.environ.get(name, "") for name in ("XLA_FLAGS", "XLA_PYTHON_CLIENT_MEM_FRACTION")]
  parts += [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
  return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
