"""The cases of tests/models/cases.py on eight devices and on one: prints what differs, as JSON, for test_sharding.py.

A script and not a test, for the number of devices must be set before jax starts: XLA_FLAGS is in test_sharding.py.
"""

import dataclasses
import functools
import json
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlpr_jax import huggingface, models, sharding, types
from rlpr_jax.config import default
from rlpr_jax.data import builtin
from rlpr_jax.models import logprobs
from rlpr_jax.planning import hlo
from rlpr_jax.policy import initial_params, load_policy
from rlpr_jax.sampling.decode import (
  DecodeSettings,
  Entries,
  Prefilled,
  Slots,
  decode,
  empty_slots,
  insert,
  prefill,
  score,
)
from rlpr_jax.sampling.device import Suffix, pack_suffixes
from rlpr_jax.sampling.params import SamplingParams, stack
from rlpr_jax.training import packing
from rlpr_jax.training.optimizer import clipped_optimizer, init_opt_state
from rlpr_jax.training.update import Trainable, UpdateProgram, UpdateSettings, loss, optimizer_step
from tests.models import cases
from tests.sampling.drawing import draw_all

ROWS, LENGTH = 8, 28  # longer than every window of the cases
PROMPTS, WIDTH, NEW, SUFFIX = 4, 10, 5, 3
SLOTS, STEPS = 8, 3  # rows that are sampled at once, and tokens of a call: two calls, the second one cut short
SETTINGS = UpdateSettings(0.8, clip_low=0.2, clip_high=0.27, entropy_coefficient=0.1, micro_batch_rows=ROWS)
ADAMW = clipped_optimizer("adamw", 1e-3, weight_decay=0.1, max_grad_norm=1.0)
# AdamW divides a gradient by its own size, so that of one near zero the rounding decides. This is linear in it.
MOMENTUM = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))
OPTIMIZERS = {
  name: clipped_optimizer(name, 1e-3, weight_decay=0.1, max_grad_norm=1.0)
  for name in ("adamw", "adafactor", "muon", "sgd")
} | {"sm3": optax.sm3(1e-3)}


def make_rows(seed=0) -> types.PackedRows:
  """Two groups and padding in each row, of one stem and two branches and of one; ratios on both sides of the clip."""
  rng = np.random.default_rng(seed)
  trees = []
  for n in rng.integers(3, 7, ROWS):
    trees.append(packing.Tree(cases.random_tokens(n, seed=10 + n), random_branches((n, n - 2))))
    trees.append(packing.Tree(cases.random_tokens(n - 1, seed=30 + n), random_branches((4,))))
  pieces = []
  for row, (first, second) in enumerate(zip(trees[::2], trees[1::2], strict=True)):
    n = first.stem.size
    pieces.append(packing.Piece(2 * row, row, 0, [(0, n), (1, 2 * n)]))
    pieces.append(packing.Piece(2 * row + 1, row, 3 * n - 2, [(0, 3 * n - 2 + second.stem.size)]))
  rows = packing.lay(trees, pieces, ROWS, LENGTH)
  mask = rows.mask
  return rows._replace(
    old_logprobs=np.where(mask, rng.normal(-4.6, 1, mask.shape), 0).astype(np.float32),
    advantages=np.where(mask, rng.normal(size=mask.shape), 0).astype(np.float32),
    weights=np.where(mask, 1 / mask.sum(), 0).astype(np.float32),
  )


def random_branches(lengths) -> list[packing.Branch]:
  return [packing.Branch.of_tokens(cases.random_tokens(n, seed=50 + n), np.ones(n, bool)) for n in lengths]


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


PROMPT_TOKENS, PROMPT_LENGTHS = cases.random_tokens(PROMPTS, WIDTH, seed=3), np.array([10, 4, 7, 1], np.int32)
# Slots of ten samples, of prompts 0 0 1 1 2 2 3 3 0 1: two wait for slots that were others' before, none lies in order.
PLACES = np.array([3, 6, 0, 5, 7, 1, 4, 2, 5, 3])


def sample(model, params, temperature) -> tuple[dict[str, np.ndarray], Slots]:
  """What ten samples in eight slots are, and the slots in the end."""
  settings = DecodeSettings(STEPS, eos_ids=tuple(range(0, cases.VOCAB, 8)))
  hidden, cache = prefill(model, params, PROMPT_TOKENS, PROMPT_LENGTHS)
  slots = empty_slots(model, params, SLOTS, WIDTH + NEW + STEPS)
  samples, source = len(PLACES), np.arange(len(PLACES)) // 2 % PROMPTS
  source[-1] = 1
  keys = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(5), samples)))
  out = {name: np.zeros((samples, NEW)) for name in ("tokens", "logprobs")} | {"counts": np.zeros(samples, int)}
  for chosen in (np.arange(SLOTS), np.arange(SLOTS, samples)):
    target = np.full(SLOTS, SLOTS)  # nowhere
    target[: chosen.size] = PLACES[chosen]
    fill = np.resize(chosen, SLOTS)
    entries = Entries(
      source=source[fill],
      target=target,
      keys=keys[fill],
      limits=np.full(SLOTS, NEW, np.int32),
      sampling=stack([SamplingParams(temperature)] * SLOTS),
    )
    slots = insert(model, params, slots, Prefilled(hidden, cache, PROMPT_LENGTHS), entries)
    slots, drawn = draw_all(model, params, slots, settings, WIDTH + NEW, NEW)
    for name, values in out.items():
      values[chosen] = getattr(drawn, name)[PLACES[chosen]]
  return out, slots


def score_slots(model, params, slots, num_shards) -> np.ndarray:
  """Log-probabilities of suffixes after parts of the slots' texts, laid out for a mesh that splits rows so.

  Twelve suffixes in two calls of eight rows: of some slots several, in one call or in both, and of one of them none.
  """
  prefixes = [(0, 5), (1, 7), (2, 2), (3, 3), (4, 2), (5, 11), (6, 10), (0, 2), (3, 5), (4, 1), (6, 4), (6, 9)]
  items = [
    Suffix(row=slot, prefix=prefix, last_kept=7 * out, ids=list(range(out, out + SUFFIX)), mask=[True] * 3)
    for out, (slot, prefix) in enumerate(prefixes)
  ]
  each, waiting, scores = 8 // num_shards, list(range(len(items))), np.zeros((len(items), SUFFIX))
  while waiting:
    parts = [
      [out for out in waiting if items[out].row * num_shards // SLOTS == shard][:each] for shard in range(num_shards)
    ]
    suffixes, rows = pack_suffixes([[items[out] for out in part] for part in parts], each, SLOTS // num_shards, SUFFIX)
    logps = np.asarray(score(model, params, slots.cache, suffixes, 0.7, kv_length=WIDTH + NEW))
    placed = [out for part in parts for out in part]
    scores[placed] = logps[rows]
    waiting = [out for out in waiting if out not in placed]
  return scores


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
    "cache": cache.values.shape,
    "cache_part": cache.values.sharding.shard_shape(cache.values.shape),
  }
  for temperature in temperatures:
    (expected, slots), (found, many_slots) = sample(one, params, temperature), sample(many, placed, temperature)
    cache, num_shards = many_slots.cache, where.num_shards("batch")
    result[f"temperature {temperature:g}"] = {
      "tokens": found["tokens"].tolist(),
      "expected": expected["tokens"].tolist(),
      "counts": [found["counts"].tolist(), expected["counts"].tolist()],
      "logprobs": distance(found["logprobs"], expected["logprobs"]),
      "scores": distance(score_slots(many, placed, many_slots, num_shards), score_slots(one, params, slots, 1)),
      "num_shards": num_shards,
      "cache": cache.values.shape,
      "cache_part": cache.values.sharding.shard_shape(cache.values.shape),
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
  """Two steps of two micro-batches each, and the scores of suffixes after them."""
  where = sharding.create(sharding.create_mesh(*shape))
  results = []
  for split in (sharding.Sharding(), where):
    model = models.definition(config, models.Runtime(sharding=split))
    params = place(jax.tree.map(jnp.array, cases.random_params(config)), config, split)
    shardings = jax.tree.map(lambda x: x.sharding, params)
    trainable = Trainable(params, init_opt_state(optimizer, params, split))
    places = [[leaf.shape, leaf.sharding.shard_shape(leaf.shape)] for leaf in jax.tree.leaves(trainable.opt_state)]
    settings = dataclasses.replace(SETTINGS, micro_batch_rows=4, sharding=split)
    for step in range(2):
      trainable, metrics = optimizer_step(
        UpdateProgram(model, optimizer, settings), {}, trainable, make_rows(seed=step)
      )
    params, state = trainable
    stayed = jax.tree.map(lambda x, y: x.sharding.is_equivalent_to(y, x.ndim), params, shardings)
    _, slots = sample(model, params, 1.0)
    scores = score_slots(model, params, slots, split.num_shards("batch"))
    metrics = {name: float(x) for name, x in metrics.items()}
    results.append((jax.device_get(params), jax.device_get(state), metrics, scores))
  (expected, expected_state, expected_metrics, expected_scores), (found, found_state, metrics, scores) = results
  return {
    "params": distance(found, expected),
    "moved": distance(expected, cases.random_params(config)),
    "state": distance(found_state, expected_state),
    "metrics": metrics,
    "expected_metrics": expected_metrics,
    "scores": distance(scores, expected_scores),
    "stayed": all(jax.tree.leaves(stayed)),
    "places": places,
  }


def decoding_collectives(config, shape) -> dict:
  """What devices send each other in one call of decoding, by kind: how often."""
  where = sharding.create(sharding.create_mesh(*shape))
  model, params = models.definition(config, models.Runtime(sharding=where)), cases.random_params(config)
  slots = empty_slots(model, place(params, config, where), SLOTS, WIDTH + NEW + STEPS)
  lowered = decode.lower(model, params, slots, DecodeSettings(STEPS, eos_ids=(0,)), SLOTS, kv_length=WIDTH + NEW)
  found = hlo.traffic(lowered.compile().as_text(), trips=(STEPS, config.num_layers), far=lambda group: False)
  return {kind: traffic.runs for kind, traffic in found.items()}


def few_heads() -> dict:
  """A policy of two key/value heads and its optimiser's state on a mesh that splits heads four ways, and with LoRA.

  Returns:
    of each parameter and its moments: axes that are split, by name of the parameter.
  """
  config = default()
  config.mesh.fsdp, config.mesh.tensor = 2, 4
  tokenizer = builtin.tokenizer()
  model_config = models.ModelConfig(len(tokenizer), 16, 16, 2, num_heads=4, num_kv_heads=2, head_dim=4)
  result = {}
  with tempfile.TemporaryDirectory() as directory:
    huggingface.save_pretrained(directory, model_config, models.init_params(model_config, 0), tokenizer)
    config.model.path = directory
    for rank in (0, 2):
      config.lora.rank = rank
      policy = load_policy(config)
      params = initial_params(config, policy)
      state = init_opt_state(ADAMW, params, policy.sharding)
      for path, leaf in jax.tree_util.tree_leaves_with_path((params, state)):
        keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        if keys:
          result.setdefault("/".join(keys), []).append([leaf.shape, leaf.sharding.shard_shape(leaf.shape)])
  return result


# What the others have beside these is the same to a mesh.
CASES = ("llama", "llama_biases", "qwen2", "qwen3", "gemma2", "gemma3", "smollm3_windows", "olmo2", "phi3_partial")
# Left to the slow tests.
SLOW = (
  "llama", "llama_biases", "qwen3", "gemma2", "gemma3", "smollm3_windows", "olmo2", "phi3_partial",
  "2 key/value heads on 8", "parameters alone", "places", "activations", "adamw", "sgd", "sm3",
)  # fmt: skip


def main(slow: bool) -> None:
  assert len(jax.devices()) == 8
  logprobs.CHUNK = 16  # several chunks of the rows, on one device and on eight
  llama = cases.config("llama")
  odd = dataclasses.replace(llama, num_heads=12, num_kv_heads=3)
  by_places = {"sequence": ("tensor",), "heads": (), "kv_heads": (), "mlp": ()}
  meshes = {
    "2 key/value heads on 8": functools.partial(compare, llama, (1, 1, 8)),
    "3 key/value heads on 4": functools.partial(compare, odd, (1, 2, 4)),
    "parameters alone": functools.partial(compare, llama, (1, 8, 1), temperatures=()),
    "places": functools.partial(compare, llama, (2, 2, 2), by_places, temperatures=()),
    "activations": functools.partial(compare, llama, (2, 2, 2), {"batch": ("data",)}, temperatures=()),
  }
  result = {
    "cases": {
      name: compare(cases.config(name), (2, 2, 2), temperatures=(0.0, 1.0)) for name in CASES if (name in SLOW) == slow
    },
    "meshes": {name: run() for name, run in meshes.items() if (name in SLOW) == slow},
  }
  wide = dataclasses.replace(llama, embed_dim=128, mlp_dim=256)  # adafactor factors what is at least 128 wide
  result["optimizers"] = {
    name: whole_update(wide, (2, 2, 2), optimizer) for name, optimizer in OPTIMIZERS.items() if (name in SLOW) == slow
  }
  if not slow:
    result |= others(llama)
  print(json.dumps(result))


def others(llama: models.ModelConfig) -> dict:
  return {
    "update": {
      "adamw": whole_update(cases.config("gemma2"), (2, 2, 2), ADAMW),
      "momentum": whole_update(llama, (2, 2, 2), MOMENTUM),
    },
    "parts": parts(cases.config("qwen2"), (2, 2, 2)),
    "few_heads": few_heads(),
    "decoding": decoding_collectives(llama, (8, 1, 1)),
    "sizes": {
      str(shape): sharding.create_mesh(*shape).devices.shape for shape in ((), (2, -1, 2), (1, 1, -1), (4, 2, 1))
    },
  }


if __name__ == "__main__":
  main(slow="slow" in sys.argv)
