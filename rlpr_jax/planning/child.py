"""The half of `rlpr_jax.plan` that asks a compiler, in the environment that the compiler wants.

`python -m rlpr_jax.planning.child JOB`, a directory with job.json and config.json, writes JOB/result.json.
"""

import json
import pathlib
import sys
import time

import jax

from rlpr_jax import config as configs
from rlpr_jax import huggingface
from rlpr_jax.data import builtin
from rlpr_jax.errors import exit_with_one_line, setting_names
from rlpr_jax.planning import hardware
from rlpr_jax.planning.estimate import Lengths
from rlpr_jax.planning.planner import Planner, plan
from rlpr_jax.policy import new_config
from rlpr_jax.runs.storage import write_atomically
from rlpr_jax.training.settings import NAMES


def main(job: pathlib.Path) -> None:
  wanted = json.loads((job / "job.json").read_text())
  config = configs.read(job / "config.json")
  started = time.monotonic()

  def say(what: str) -> None:
    print(f"[{time.monotonic() - started:4.0f} s] {wanted['topology']}: {what}", file=sys.stderr, flush=True)

  if "model" in wanted:
    model_config = huggingface.load_config(pathlib.Path(wanted["model"]))
  else:
    model_config = new_config(config, len(builtin.tokenizer(config.data.domains)))
  if wanted["fast"]:
    jax.config.update("jax_optimization_level", "O0")
  cache = pathlib.Path(wanted["cache"]) if wanted["cache"] else None
  planner = Planner(config, model_config=model_config, place=hardware.parse(wanted["topology"]), cache=cache, say=say)
  result = plan(planner, Lengths(**wanted["lengths"]), wanted["search"])
  write_atomically(job / "result.json", json.dumps(result))


if __name__ == "__main__":
  with exit_with_one_line(), setting_names(NAMES):
    main(pathlib.Path(sys.argv[1]))
