"""Memory of decoding on TPUs that are only described: Qwen2.5-7B with prompts of 2048 and responses of 3072 tokens.

    make libtpu && PYTHONPATH=. python -m benchmarks.tpu_memory --topology=v5p:2x2x1 --tensor=1

Compiles the decoding program for two numbers of slots by the real TPU compiler, works out from their peaks how many
slots fit, and compiles that number. Nothing is run: the figures are the compiler's.
"""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
from absl import app, flags

from rlpr_jax import models, sharding
from rlpr_jax.sampling import decode
from rlpr_jax.sampling.choose import Choice
from tests.models.tpu_compile import environment

_TOPOLOGY = flags.DEFINE_string("topology", "v5p:2x2x1", "As jax.experimental.topologies names it.")
_TENSOR = flags.DEFINE_integer("tensor", 1, "Devices along the tensor axis; the rest are along fsdp.")
GRANTED = {"v5e": 15.75, "v5p": 95.74, "v6e": 31.25}  # GiB that the compiler gives a program
PROMPT, RESPONSE, STEPS = 2048, 3072, 16
QWEN = models.ModelConfig(
  vocab_size=152064, embed_dim=3584, mlp_dim=18944, num_layers=28, num_heads=28, num_kv_heads=4, head_dim=128,
  biases=("query", "key", "value"), rope=models.Rope(theta=1e6),
)  # fmt: skip
CHILD = "RLPR_JAX_TPU_MEMORY"  # set in the process that has the compiler's environment


def peak(where: sharding.Sharding, slots: int) -> float:
  """GiB a device of the decoding program, parameters and cache included."""
  gathered = where.replicate("embed")
  model = models.definition(QWEN, models.Runtime("bfloat16", "splash", sharding=gathered))
  params = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding), models.abstract_params(QWEN, gathered)
  )
  make = functools.partial(decode.empty_slots, model, slots=slots, capacity=PROMPT + RESPONSE + STEPS, limit=RESPONSE)
  names = {5: ("layers", "batch", "kv_heads", None, None), 2: ("batch", None), 1: ("batch",)}
  state = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=gathered.named(names[x.ndim])),
    jax.eval_shape(make, params),
  )
  settings = decode.DecodeSettings(Choice(1.0), STEPS, (151645,))
  program = decode.decode.trace(model, params, state, settings, PROMPT + RESPONSE).lower(lowering_platforms=("tpu",))
  return program.compile().memory_analysis().peak_memory_in_bytes / 2**30


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
  small, large = (peak(where, slots * ways) for slots in (16, 32))
  each = (large - small) / 16
  fit = int((granted - small) / each + 16) // 8 * 8
  print(
    f"| topology | mesh | chips | GiB a slot | GiB a chip at {16 * ways} / {32 * ways} slots | slots that fit | GiB |"
  )
  print("|---|---|---|---|---|---|---|")
  print(
    f"| {name} | fsdp {mesh.shape['fsdp']}, tensor {mesh.shape['tensor']} | {len(devices)} | {each:.3f}"
    f" | {small:.1f} / {large:.1f} | {fit * ways} ({fit} a part) | {peak(where, fit * ways):.1f} of {granted} |"
  )


if __name__ == "__main__":
  app.run(main)
