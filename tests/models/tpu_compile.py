"""Compiles for described TPUs on a machine without one and prints what came of it as JSON, for test_tpu_compile.py.

  python -m tests.models.tpu_compile v5e:2x2 decoder qwen2
  python -m tests.models.tpu_compile v5e:2x2 kernel

A script and not a test, for the compiler is found by the environment before jax starts: `environment`.
"""

import json
import os
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies

from rlpr_jax import models, sharding
from rlpr_jax.models import attention
from rlpr_jax.models.attention import AttentionSettings
from rlpr_jax.models.masks import Places

ROOT = pathlib.Path(__file__).parents[2]
# Where `make libtpu` puts it, if none is named.
LIBRARY = pathlib.Path(os.environ.get("TPU_LIBRARY_PATH") or ROOT / ".cache" / "libtpu" / "libtpu" / "libtpu.so")
ROWS, LENGTH = 8, 2048
CONFIGS = {
  # Two layers with the sizes of Qwen2.5-7B and of Gemma 2 2B, the vocabulary aside.
  "qwen2": models.ModelConfig(
    vocab_size=8192, embed_dim=3584, mlp_dim=18944, num_layers=2, num_heads=28, num_kv_heads=4, head_dim=128,
    biases=("query", "key", "value"),
  ),
  "gemma2": models.ModelConfig(
    vocab_size=8192, embed_dim=2304, mlp_dim=9216, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=256, window=1024,
    windowed=(True, False), activation="gelu_tanh", norm_offset=True, post_norms=True, scale_embeddings=True,
    attention_softcap=50.0, final_softcap=30.0, tie_embeddings=True, query_pre_attn_scalar=256,
  ),
}  # fmt: skip


def environment() -> dict[str, str]:
  """What the compiler wants to be told, so that it looks for no machine."""
  return os.environ | {
    "JAX_PLATFORMS": "cpu",
    "TPU_LIBRARY_PATH": str(LIBRARY),
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # by several processes at once
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
  }


def compile_for_tpu(function, *arguments) -> dict[str, int]:
  """Kernels in the program, and bytes that it takes on each device."""
  compiled = jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()
  memory = compiled.memory_analysis()
  return {
    "kernels": compiled.as_text().count('custom_call_target="tpu_custom_call"'),
    "temporary": memory.temp_size_in_bytes,
    "arguments": memory.argument_size_in_bytes,
    "peak": memory.peak_memory_in_bytes,
  }


def compile_decoder(where: sharding.Sharding, config: models.ModelConfig) -> dict[str, Any]:
  """Gradients of packed rows and a prefill, with the attention that is chosen by itself and with plain XLA."""
  params = models.abstract_params(config, where)
  rows = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32, sharding=where.named(("batch", None)))
  result = {}
  for backend in ("auto", "xla"):
    model = models.definition(config, models.Runtime("bfloat16", backend, sharding=where))

    def loss(params, tokens, positions, segment_ids, group_ids, model=model):
      decoder = nnx.merge(model, params)
      return decoder.logprobs(decoder(tokens, positions, segment_ids, group_ids), tokens)[0].mean()

    def prefill(params, tokens, model=model):
      return nnx.merge(model, params).prefill(tokens)

    result[backend] = {
      "gradient": compile_for_tpu(jax.grad(loss), params, rows, rows, rows, rows),
      "prefill": compile_for_tpu(prefill, params, rows),
    }
  return result


def compile_kernels(where: sharding.Sharding) -> dict[str, Any]:
  """Splash attention forwards and backwards, by head size and dtype, for sequences that must be padded."""
  result = {}
  for head_dim in (64, 128, 256):
    for dtype in ("bfloat16", "float32"):
      settings = AttentionSettings("splash", head_dim**-0.5, softcap=50.0, window=100, sharding=where)

      def loss(queries, keys, values, segment_ids, group_ids, windowed, settings=settings):
        places = Places(segment_ids, windowed, group_ids=group_ids)
        return attention.attend(queries, keys, values, places, settings).astype(jnp.float32).sum()

      def heads(count, axis, head_dim=head_dim, dtype=dtype):
        placed = where.named(("batch", None, axis, None))
        return jax.ShapeDtypeStruct((4, 1000, count, head_dim), dtype, sharding=placed)

      ids = jax.ShapeDtypeStruct((4, 1000), jnp.int32, sharding=where.named(("batch", None)))
      operands = (
        heads(8, "heads"),
        heads(2, "kv_heads"),
        heads(2, "kv_heads"),
        ids,
        ids,
        jax.ShapeDtypeStruct((), bool),
      )
      result[f"{head_dim} {dtype}"] = compile_for_tpu(jax.grad(loss, argnums=(0, 1, 2)), *operands)
  return result


def main(topology: str, what: str, family: str = "") -> None:
  jax.config.update("jax_optimization_level", "O0")  # half the time, and the same memory here
  devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
  where = sharding.create(sharding.create_mesh(fsdp=2, tensor=2, devices=devices))
  print(json.dumps(compile_decoder(where, CONFIGS[family]) if what == "decoder" else compile_kernels(where)))


if __name__ == "__main__":
  main(*sys.argv[1:])
