"""Random packed rows for attention, and how far a kernel is from plain XLA on them.

Run as a script it compares on a mesh of eight CPU devices and prints the distances as JSON, for test_kernels.py: the
number of devices must be set before jax starts.
"""

import contextlib
import dataclasses
import functools
import json
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
from jaxtyping import Array, Float, Int

from rlpr_jax import sharding
from rlpr_jax.models import attention
from rlpr_jax.models.attention import AttentionSettings
from rlpr_jax.models.masks import Places, alignment


class Inputs(NamedTuple):
  """Operands of attention, and the gradient of its output."""

  queries: Float[Array, "B T N H"]
  keys: Float[Array, "B T K H"]
  values: Float[Array, "B T K H"]
  output_gradient: Float[Array, "B T N H"]
  segment_ids: Int[Array, "B T"]
  group_ids: Int[Array, "B T"] | None = None  # None where each segment is alone


def random_inputs(batch: int, length: int, heads: int, kv_heads: int, head_dim: int) -> Inputs:
  """Rows of two segments; the last fifth of each other row is padding."""
  rng = np.random.default_rng(0)
  shapes = [(batch, length, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
  ids = np.ones((batch, length), np.int32)
  ids[:, length // 3 :] = 2
  ids[::2, length - length // 5 :] = 0
  return Inputs(*(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes), jnp.asarray(ids))


def branched_inputs(batch: int, length: int, heads: int, kv_heads: int, head_dim: int) -> Inputs:
  """Rows of groups: stems with up to five branches, one without any, and padding at the end."""
  rng, step = np.random.default_rng(1), alignment(length)
  segments, groups = np.zeros((2, batch, length), np.int32)
  for row in range(batch):
    place, segment, group = 0, 0, 0
    while place < 0.8 * length:
      lengths = rng.integers(1, length // 6, 1 + rng.integers(6) * (group != 1))
      gap = -(place + lengths[0]) % step  # the stem ends at a multiple of the step
      segments[row, place : place + gap], groups[row, place : place + gap] = segment or -1, group or -1
      place, group = place + gap, group + 1
      for size in lengths:
        segment += 1
        end = min(place + size, length)
        here = slice(place, min(end + -end % step, length))  # what lies behind a branch is as if it were of it
        segments[row, here], groups[row, here] = segment, group
        place = here.stop
  inputs = random_inputs(batch, length, heads, kv_heads, head_dim)
  return inputs._replace(segment_ids=jnp.asarray(segments), group_ids=jnp.asarray(groups))


@functools.partial(jax.jit, static_argnums=2)
def attend(inputs: Inputs, windowed, settings: AttentionSettings) -> dict[str, jax.Array]:
  """Output of attention and its gradients. `windowed` is traced, as in a scan over layers."""
  sharded = [settings.sharding.constrain(x, "batch", None, "heads", None) for x in inputs[:1]]
  sharded += [settings.sharding.constrain(x, "batch", None, "kv_heads", None) for x in inputs[1:3]]
  places = Places(inputs.segment_ids, windowed, group_ids=inputs.group_ids)
  y, backwards = jax.vjp(lambda *x: attention.attend(*x, places, settings), *sharded)
  return dict(zip(("output", "queries", "keys", "values"), (y, *backwards(inputs.output_gradient)), strict=True))


def distances(inputs: Inputs, windowed, settings: AttentionSettings) -> dict[str, float]:
  """Largest difference between a backend and plain XLA on one device, over the largest number there."""
  plain = AttentionSettings("xla", settings.scale, settings.softcap, settings.window)
  found, expected = attend(inputs, windowed, settings), attend(inputs, windowed, plain)
  return {
    name: float(np.max(np.abs(np.asarray(found[name], np.float32) - x)) / np.max(np.abs(x)))
    for name, x in jax.tree.map(lambda x: np.asarray(x, np.float32), expected).items()
  }


def interpreted() -> contextlib.AbstractContextManager:
  """Splash attention without a TPU, as long as the context lasts."""

  def make(*args, **options):
    return kernel(*args, **options | {"interpret": True})

  kernel = splash_attention_kernel.SplashAttentionKernel
  return mock.patch.object(splash_attention_kernel, "SplashAttentionKernel", make)


def compare_on_mesh() -> dict:
  """Two ways to split a model: key/value heads over the tensor axis, and fewer of them than parts."""
  result = {}
  for name, shape, kv_heads in (("split", (2, 2, 2), 2), ("replicated", (1, 2, 4), 2)):
    where = sharding.fit(sharding.create(sharding.create_mesh(*shape)), {"heads": 8, "kv_heads": kv_heads})
    settings = AttentionSettings("splash", 0.125, softcap=5.0, window=16, sharding=where)
    inputs = branched_inputs(4, 40, 8, kv_heads, 64)
    for windowed in (True, False):
      result[f"{name} {windowed}"] = distances(inputs, jnp.array(windowed), settings)
    y = attend(inputs, jnp.array(True), settings)["output"]
    result[f"{name} part"] = y.sharding.shard_shape(y.shape)
    blockwise = dataclasses.replace(settings, backend="blockwise")
    result[f"{name} blockwise"] = distances(branched_inputs(4, 150, 8, kv_heads, 64), jnp.array(True), blockwise)
    with_tokamax = dataclasses.replace(settings, backend="tokamax")
    with contextlib.suppress(ImportError):
      import tokamax  # noqa: F401

      result[f"{name} tokamax"] = distances(inputs, jnp.array(True), with_tokamax)
  return result


if __name__ == "__main__":
  with interpreted():
    print(json.dumps(compare_on_mesh()))
