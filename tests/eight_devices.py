"""The cases of tests/models/cases.py on eight devices and on one: prints what differs, as JSON, for test_sharding.py.

A script and not a test, for the number of devices must be set before jax starts: XLA_FLAGS is in test_sharding.py.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlpr_jax import models, sharding
from rlpr_jax.models import logprobs
from rlpr_jax.sampling.decode import SamplingSettings, decode, prefill, score_suffix
from rlpr_jax.training import packing
from rlpr_jax.training.update import UpdateSettings, adamw, loss, update
from tests.models import cases

ROWS, LENGTH = 8, 24  # longer than every window of the cases
PROMPTS, WIDTH, NEW, SUFFIX = 4, 10, 5, 3
SETTINGS = UpdateSettings(0.8, clip_low=0.2, clip_high=0.27, entropy_coefficient=0.1, micro_batch_rows=0)
ADAMW = adamw(1e-3, weight_decay=0.1, max_grad_norm=1.0)
# AdamW divides a gradient by its own size, so that of one near zero the rounding decides. This is linear in it.
MOMENTUM = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))


def make_rows(seed=0) -> packing.PackedRows:
  """Two sequences and padding in each row; ratios on both sides of the clip."""
  rng = np.random.default_rng(seed)
  first = rng.integers(3, 12, ROWS)
  packed = [
    cases.pack([cases.random_tokens(n, seed=10 + n), cases.random_tokens(n + 1, seed=30 + n)], LENGTH) for n in first
  ]
  tokens, positions, segment_ids = (np.concatenate(field) for field in zip(*packed, strict=True))
  mask = (segment_ids > 0) & (positions > 1)
  return packing.PackedRows(
    tokens=tokens,
    positions=positions,
    segment_ids=segment_ids,
    mask=mask,
    old_logprobs=np.where(mask, rng.normal(-4.6, 1, mask.shape), 0).astype(np.float32),
    advantages=np.where(mask, rng.normal(size=mask.shape), 0).astype(np.float32),
    weights=np.where(mask, 1 / mask.sum(), 0).astype(np.float32),
  )


def distance(found, expected) -> float:
  return max(
    float(np.max(np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64))))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
  )


def place(params, config, where):
  return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params, models.abstract_params(config, where))


@functools.partial(jax.jit, static_argnums=0)
def gradient(model, params, rows):
  return jax.grad(lambda params: loss(model, params, rows, SETTINGS)[0])(params)


def sample(model, params, temperature):
  """Samples and cache of four prompts of different lengths, two samples each."""
  prompts, lengths = cases.random_tokens(PROMPTS, WIDTH, seed=3), np.array([10, 4, 7, 1], np.int32)
  hidden, cache = prefill(model, params, prompts, lengths, capacity=WIDTH + NEW + SUFFIX)
  settings = SamplingSettings(NEW, SUFFIX, temperature, eos_ids=tuple(range(0, cases.VOCAB, 8)))
  keys = jax.random.split(jax.random.key(5), 2 * PROMPTS)
  return decode(model, params, hidden, cache, lengths, keys, settings)


def read(model, params):
  """Logits of a prefill and of what follows it, some tokens at a time, and the cache."""
  tokens = cases.random_tokens(PROMPTS, 22, seed=4)
  logits, cache = cases.prefill(model, params, tokens[:, :10], 22)
  found = [logits]
  for start in (10, 14, 18):
    starts = np.full(PROMPTS, start, np.int32)
    logits, cache = cases.extend(model, params, tokens[:, start : start + 4], starts, cache)
    found.append(logits)
  return found, cache


def compare(config, shape, rules=None, temperatures=(1.0,)) -> dict:
  """What a mesh of this shape changes in gradients and, at some temperatures, in sampling."""
  where = sharding.create(sharding.create_mesh(*shape), rules)
  params = cases.random_params(config)
  one, many = models.definition(config), models.definition(config, models.Runtime(sharding=where))
  placed, rows = place(params, config, where), make_rows()
  expected = gradient(one, params, rows)
  result = {
    "gradient": distance(gradient(many, placed, rows), expected),
    "gradient_size": max(float(np.max(np.abs(x))) for x in jax.tree.leaves(expected)),
  }
  if not temperatures:
    return result
  (expected, _), (found, cache) = read(one, params), read(many, placed)
  result |= {
    "logits": distance(found, expected),
    "cache": cache.keys.shape,
    "cache_part": cache.keys.sharding.shard_shape(cache.keys.shape),
  }
  for temperature in temperatures:
    (expected, _), (found, cache) = sample(one, params, temperature), sample(many, placed, temperature)
    result[f"temperature {temperature:g}"] = {
      "tokens": np.asarray(found.tokens).tolist(),
      "expected": np.asarray(expected.tokens).tolist(),
      "logprobs": distance(found.logprobs, expected.logprobs),
      "cache": cache.keys.shape,
      "cache_part": cache.keys.sharding.shard_shape(cache.keys.shape),
    }
  return result


def parts(config, shape) -> dict:
  """Shape of each parameter and of its part on a device."""
  placed = place(cases.random_params(config), config, sharding.create(sharding.create_mesh(*shape)))
  new = models.init_params(config, 0, sharding.create(sharding.create_mesh(*shape)))
  result = {}
  for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(placed), jax.tree.leaves(new), strict=True):
    shards = [x.data.shape for x in (*leaf.addressable_shards, *other.addressable_shards)]
    assert len(shards) == 16
    result["/".join(key.key for key in path)] = [leaf.shape, *set(shards)]
  alone = models.init_params(config, 0)
  return {"parts": result, "init": distance(new, alone)}


def whole_update(config, shape, optimizer) -> dict:
  """Two steps of two micro-batches each, and the scores of a suffix after them."""
  where = sharding.create(sharding.create_mesh(*shape))
  results = []
  for split in (sharding.Sharding(), where):
    model = models.definition(config, models.Runtime(sharding=split))
    params = place(jax.tree.map(jnp.array, cases.random_params(config)), config, split)
    shardings = jax.tree.map(lambda x: x.sharding, params)
    state = jax.jit(optimizer.init)(params)
    settings = dataclasses.replace(SETTINGS, micro_batch_rows=4, sharding=split)
    for step in range(2):
      params, state, metrics = update(model, optimizer, {}, params, state, make_rows(seed=step), settings)
    stayed = jax.tree.map(lambda x, y: x.sharding.is_equivalent_to(y, x.ndim), params, shardings)
    _, cache = sample(model, params, 1.0)
    last, suffix = cases.random_tokens(8, seed=6), cases.random_tokens(8, SUFFIX, seed=7)
    scores, _ = score_suffix(model, params, cache, last, np.arange(2, 10, dtype=np.int32), suffix, 0.7)
    metrics = {name: float(x) for name, x in metrics.items()}
    results.append((jax.device_get(params), jax.device_get(state), metrics, np.asarray(scores)))
  (expected, expected_state, expected_metrics, expected_scores), (found, found_state, metrics, scores) = results
  return {
    "params": distance(found, expected),
    "moved": distance(expected, cases.random_params(config)),
    "state": distance(found_state, expected_state),
    "metrics": metrics,
    "expected_metrics": expected_metrics,
    "scores": distance(scores, expected_scores),
    "stayed": all(jax.tree.leaves(stayed)),
  }


# What the others have beside these is the same to a mesh.
CASES = ("llama", "llama_biases", "qwen2", "qwen3", "gemma2", "gemma3")


def main() -> None:
  assert len(jax.devices()) == 8
  logprobs.CHUNK = 16  # several chunks of the rows, on one device and on eight
  llama = cases.config("llama")
  odd = dataclasses.replace(llama, num_heads=12, num_kv_heads=3)
  by_places = {"sequence": ("tensor",), "heads": (), "kv_heads": (), "mlp": ()}
  result = {
    "cases": {name: compare(cases.config(name), (2, 2, 2), temperatures=(0.0, 1.0)) for name in CASES},
    "meshes": {
      "2 key/value heads on 8": compare(llama, (1, 1, 8)),
      "3 key/value heads on 4": compare(odd, (1, 2, 4)),
      "parameters alone": compare(llama, (1, 8, 1), temperatures=()),
      "places": compare(llama, (2, 2, 2), by_places, temperatures=()),
      "activations": compare(llama, (2, 2, 2), {"batch": ("data",)}, temperatures=()),
    },
    "update": {
      "adamw": whole_update(cases.config("gemma2"), (2, 2, 2), ADAMW),
      "momentum": whole_update(llama, (2, 2, 2), MOMENTUM),
    },
    "parts": parts(cases.config("qwen2"), (2, 2, 2)),
    "sizes": {
      str(shape): sharding.create_mesh(*shape).devices.shape for shape in ((), (2, -1, 2), (1, 1, -1), (4, 2, 1))
    },
  }
  print(json.dumps(result))


if __name__ == "__main__":
  main()
