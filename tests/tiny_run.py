"""A run that takes seconds, and what is left of it on disk."""

import functools
import json
import os
import pathlib
import subprocess
import sys

from ml_collections import ConfigDict

from rlpr_jax.runs.checkpoints import Checkpoints
from rlpr_jax.training.carrying import most_groups
from rlpr_jax.training.run import set_up
from rlpr_jax.training.state import abstract_state, join, split
from rlpr_jax.types import TrainState

ROOT = pathlib.Path(__file__).parents[1]
RECIPE = """
from rlpr_jax.config import default

def get_config():
  c = default()
  c.steps = 6
  c.prompts_per_step = 4
  c.samples_per_prompt = 4
  c.max_draws = 3
  c.model.embed_dim = 32
  c.model.mlp_dim = 64
  c.model.num_layers = 2
  c.model.num_heads = 2
  c.model.head_dim = 16
  c.data.count = 20
  c.data.instruction = ""
  c.data.prompt_limit = 14
  c.data.max_reference_length = 16
  c.rollout.max_response_length = 32
  c.rollout.prompts_per_draw = 3
  c.rollout.slots = 8
  c.rollout.decode_steps = 4
  c.rollout.prefill_prompts = 2
  c.rollout.score_rows = 4
  c.filter.collect_from = 1
  c.filter.start = 3
  c.filter.scale = 1.0
  c.training.micro_batch_rows = 2
  c.training.learning_rate = 1e-3
  c.warm_start.steps = 60
  c.warm_start.batch_size = 32
  c.evaluation.prompts = 10
  c.evaluation.samples = 2
  c.log.checkpoint_every = 1
  c.log.keep_checkpoints = 20
  return c
"""


def tiny() -> ConfigDict:
  """The recipe's config."""
  scope: dict = {}
  exec(RECIPE, scope)
  return scope["get_config"]()


def rows(workdir: pathlib.Path) -> list[dict]:
  """Metrics of a run, one dictionary a step."""
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def timeless(workdir: pathlib.Path) -> list[dict]:
  """Metrics without what depends on the clock or on what was compiled before."""
  clocks = ("seconds", "tokens_per_second", "compilations")
  return [{k: v for k, v in row.items() if not k.startswith(clocks)} for row in rows(workdir)]


def final_state(workdir: pathlib.Path, config: ConfigDict) -> TrainState:
  """State of a run's newest checkpoint."""
  checkpoints = Checkpoints(workdir, config.log, functools.partial(split, carried_limit=most_groups(config)), join)
  state = checkpoints.restore(abstract_state(set_up(config)))
  checkpoints.close()
  return state


def start(recipe: pathlib.Path, workdir: pathlib.Path, *overrides: str, devices: int = 1) -> subprocess.Popen:
  """Starts the program in a process of its own."""
  command = [sys.executable, "-m", "rlpr_jax.train", f"--config={recipe}", f"--workdir={workdir}", *overrides]
  flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
  env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
  return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=ROOT)
