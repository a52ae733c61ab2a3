"""What a process really needs for an update, and for decoding, beside what the plan says; prints both as JSON.

A program by itself, so that nothing else takes or gives back memory: `python -m tests.planning.used_memory`.
"""

import json
import pathlib

import jax
import jax.numpy as jnp

from rlpr_jax import config as configs
from rlpr_jax.planning import compiler, estimate, hardware, programs
from rlpr_jax.policy import new_config


def memory(field: str) -> int:
  """Bytes, of /proc."""
  status = pathlib.Path("/proc/self/status").read_text()
  return 1024 * int(status.split(f"{field}:")[1].split()[0])


def main() -> None:
  config = configs.default()
  config.model.embed_dim, config.model.mlp_dim, config.model.num_layers = 512, 1536, 6
  config.model.num_heads, config.model.head_dim = 8, 64
  config.data.prompt_limit, config.rollout.max_response_length = 256, 768
  config.prompts_per_step, config.rollout.slots, config.rollout.decode_steps = 16, 32, 4
  place, model = hardware.parse("local"), new_config(config, 8192)
  layout = programs.place_on_slice(config, model, place)
  planned = programs.rollout_programs(layout, 32) | programs.update_programs(layout, 4)
  found = {}
  for name in ("update", "decode"):
    said = compiler.compile_program(name, planned[name], place, lambda group: False, None)
    compiled = planned[name].trace().lower().compile()
    shapes = jax.tree.unflatten(compiled.in_tree, jax.tree.leaves(compiled.in_avals))
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    args, kwargs = jax.tree.map(lambda x: jax.block_until_ready(jnp.full(x.shape, 1, x.dtype)), shapes)
    jax.block_until_ready(compiled(*args, **kwargs))
    found[name] = {
      "planned": estimate.memory_peak(planned[name], said) - planned[name].beside,
      "used": memory("VmHWM") - before,
    }
    del args, kwargs
  print(json.dumps(found))


if __name__ == "__main__":
  main()
