"""Memory of decoding on TPUs that are only described: Qwen2.5-7B with prompts of 2048 and responses of 3072 tokens.

    make libtpu && PYTHONPATH=. python -m benchmarks.tpu_memory --topology=v5p:2x2x1 --tensor=1

Compiles the programs of a rollout for two numbers of slots by the real TPU compiler, works out from their peaks how
many slots fit, and compiles that number. Nothing is run: the figures are the compiler's.
"""

import functools
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
from absl import app, flags

from rlpr_jax import models, sharding
from rlpr_jax.sampling import decode
from rlpr_jax.sampling.choose import Choice, stack
from rlpr_jax.sampling.shapes import Shapes
from tests.models.tpu_compile import environment

_TOPOLOGY = flags.DEFINE_string("topology", "v5p:2x2x1", "As jax.experimental.topologies names it.")
_TENSOR = flags.DEFINE_integer("tensor", 1, "Devices along the tensor axis; the rest are along fsdp.")
GRANTED = {"v5e": 15.75, "v5p": 95.74, "v6e": 31.25}  # GiB that the compiler gives a program
PROMPT, RESPONSE, STEPS = 2048, 3072, 16
PREFILL, INSERT, SCORE, SUFFIX = 4, 8, 8, 64  # prompts read and answers scored at once in each part; tokens of those
SHAPES = Shapes(1, PROMPT, RESPONSE, SUFFIX, STEPS, PREFILL, SCORE, INSERT)
QWEN = models.ModelConfig(
  vocab_size=152064, embed_dim=3584, mlp_dim=18944, num_layers=28, num_heads=28, num_kv_heads=4, head_dim=128,
  biases=("query", "key", "value"), rope=models.Rope(theta=1e6),
)  # fmt: skip
CHILD = "RLPR_JAX_TPU_MEMORY"  # set in the process that has the compiler's environment


def peaks(where: sharding.Sharding, each: int) -> dict[str, float]:
  """GiB a device of the programs of a rollout, parameters and cache included, with `each` slots in every part."""
  ways = where.ways("batch")
  gathered = where.replicate("embed")
  model = models.definition(QWEN, models.Runtime("bfloat16", "splash", sharding=gathered))
  params = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding), models.abstract_params(QWEN, gathered)
  )
  names = {5: decode.CACHE, 2: ("batch", None), 1: ("batch",)}

  def lay(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=gathered.named(names[x.ndim])), tree)

  def ids(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)

  make = functools.partial(decode.empty_slots, model, slots=each * ways, capacity=SHAPES.capacity, limit=RESPONSE)
  slots = lay(jax.eval_shape(make, params))
  hidden, read = lay(
    jax.eval_shape(functools.partial(decode.prefill, model), params, ids(PREFILL * ways, PROMPT), ids(PREFILL * ways))
  )
  settings, reach = decode.DecodeSettings(STEPS, (151645,)), PROMPT + RESPONSE
  inserted = (
    ids(INSERT),
    ids(INSERT),
    jax.ShapeDtypeStruct((INSERT, 2), jnp.uint32),
    ids(INSERT),
    stack([Choice()] * INSERT),
  )
  suffixes = decode.Suffixes(*(ids(SCORE * ways, SUFFIX) for _ in decode.Suffixes._fields))
  programs = {
    "decode": decode.decode.trace(model, params, slots, settings, each * ways, reach),
    "prefill": decode.prefill.trace(model, params, ids(PREFILL * ways, PROMPT), ids(PREFILL * ways)),
    "insert": decode.insert.trace(model, params, slots, hidden, read, ids(PREFILL * ways), *inserted),
    "score": decode.score.trace(model, params, slots.cache, ids(SCORE * ways), suffixes, 1.0, reach),
  }
  sizes = {}
  weights = sum(bytes_a_device(x) for x in jax.tree.leaves(params))
  cache = sum(bytes_a_device(x) for x in jax.tree.leaves(slots))
  for name, program in programs.items():
    memory = program.lower(lowering_platforms=("tpu",)).compile().memory_analysis()
    # What is alive beside the program's own arguments: the slots while prompts are read, the weights while they are
    # put into slots.
    beside = {"prefill": cache, "insert": weights}.get(name, 0)
    sizes[name] = (memory.peak_memory_in_bytes + beside) / 2**30
  return sizes


def peaks_if_they_fit(where: sharding.Sharding, each: int, granted: float) -> dict[str, float] | None:
  """`peaks`, or None if one is beyond the memory; the compiler itself refuses what is far beyond."""
  try:
    found = peaks(where, each)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return None
  return found if max(found.values()) <= granted else None


def bytes_a_device(x: jax.ShapeDtypeStruct) -> int:
  return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def main(argv: list[str]) -> None:
  if CHILD not in os.environ:
    sys.exit(
      subprocess.run(
        [sys.executable, "-m", "benchmarks.tpu_memory", *sys.argv[1:]], env=environment() | {CHILD: "1"}, check=False
      ).returncode
    )
  from jax.experimental import topologies

  name = _TOPOLOGY.value
  devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
  mesh = sharding.create_mesh(1, -1, _TENSOR.value, devices=list(devices))
  where = sharding.fit(sharding.create(mesh), models.axis_sizes(QWEN))
  ways, granted = where.ways("batch"), GRANTED[name.split(":")[0]]
  few, more = (peaks(where, slots) for slots in (16, 32))
  each = (more["decode"] - few["decode"]) / 16
  # As many as every program leaves room for, in eights.
  fit = int((granted - max(few.values())) / each + 16) // 8 * 8
  while (found := peaks_if_they_fit(where, fit, granted)) is None:
    fit -= 8
  print("| topology | mesh | GiB a slot | slots a part | slots | GiB a chip: " + " | ".join(found) + " | granted |")
  print("|---|---|---|---|---|" + "---|" * (len(found) + 1))
  print(
    f"| {name_of(mesh, name)} | {each:.3f} | {fit} | {fit * ways} | "
    + " | ".join(f"{size:.1f}" for size in found.values())
    + f" | {granted} |"
  )


def name_of(mesh: jax.sharding.Mesh, topology: str) -> str:
  return f"{topology} | fsdp {mesh.shape['fsdp']}, tensor {mesh.shape['tensor']}"


if __name__ == "__main__":
  app.run(main)
