"""Rollouts on eight devices and on one: prints what differs, as JSON, for test_engine.py.

  python -m tests.sampling.engine_on_mesh [ragged]    with that, the others read their texts by a kernel

A script and not a test, for the number of devices must be set before jax starts.
"""

import json
import sys

import jax
import numpy as np

from rlpr_jax import models, sharding
from rlpr_jax.data import builtin
from rlpr_jax.runs import metrics
from rlpr_jax.sampling.decode import DecodeSettings
from rlpr_jax.sampling.device import Device
from rlpr_jax.sampling.engine import Engine
from rlpr_jax.sampling.shapes import Shapes
from rlpr_jax.types import Prompt

MESHES = ((2, 2, 2), (4, 1, 2))
RAGGED_MESHES = ((1, 1, 1), (2, 2, 2), (2, 1, 4))  # of the last each device has one query head, and all keys
SAMPLES = 16
LENGTHS = (3, 40, 10, 22, 1, 7, 33, 5)


def roll_out(mesh, config, params, prompts, tokenizer, reading="xla"):
  """Rollouts, baselines, and how many programs were compiled after the warm-up."""
  where = sharding.create(sharding.create_mesh(*mesh, devices=jax.devices()[: np.prod(mesh)]))
  placed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params, models.abstract_params(config, where))
  device = Device(
    models.definition(config, models.Runtime(decode_attention=reading, sharding=where)),
    DecodeSettings(5, (tokenizer.eos_token_id,)),
    Shapes(16, 95, 28, 32, 5, 4, 8, 8, num_shards=where.num_shards("batch"), ragged=reading != "xla"),
  )
  engine = Engine(device, tokenizer, "answer_only", baseline_prefix="bare")
  draws, key = list(enumerate(prompts)), jax.random.key(0)
  device.compile_programs(placed, scoring=True)
  before = metrics.compilations()
  rollouts = engine.rollout(placed, draws, key, SAMPLES)
  compiled = metrics.compilations() - before
  return rollouts, engine.baseline(placed, prompts), compiled


def main():
  tokenizer = builtin.tokenizer()
  config = models.ModelConfig(
    vocab_size=len(tokenizer), embed_dim=32, mlp_dim=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8
  )
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) * 0.18, models.abstract_params(config))
  prompts = [
    Prompt(ids=rng.integers(8, 64, length).astype(np.int32), reference="ab1" * (1 + row), row=row)
    for row, length in enumerate(LENGTHS)
  ]
  ragged = sys.argv[1:] == ["ragged"]
  given = config, params, prompts, tokenizer
  expected, baseline, _ = roll_out((1, 1, 1), *given)
  meshes, reading = (RAGGED_MESHES, "ragged") if ragged else (MESHES, "xla")
  others = [roll_out(mesh, *given, reading) for mesh in meshes]
  results = []
  for found, found_baseline, compiled in others:
    same = {
      name: bool(np.array_equal(getattr(found, name), getattr(expected, name)))
      for name in (
        "tokens",
        "lengths",
        "finished",
        "texts",
        "scorable",
        "overlong",
        "reference_tokens",
        "reference_mask",
      )
    }
    off = [
      found.logprobs - expected.logprobs,
      found.reference_logps - expected.reference_logps,
      np.nan_to_num(found_baseline) - np.nan_to_num(baseline),
    ]
    results.append(
      {
        "same": same | {"baseline_mask": bool(np.array_equal(np.isnan(found_baseline), np.isnan(baseline)))},
        "off": [float(np.abs(x).max()) for x in off],
        "compiled": compiled,
        "scored": int(found.scorable.sum()),
      }
    )
  print(json.dumps(results))


if __name__ == "__main__":
  main()
