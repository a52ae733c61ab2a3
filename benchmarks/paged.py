"""A contiguous cache beside a paged one: what attention of one decode step costs, and how many slots fit.

    PYTHONPATH=. .venv/bin/python -m benchmarks.paged  # a minute on two cores

Contiguous, as the engine has it: every slot has a stretch as long as the longest text, and attention reads all of them
up to the longest one in use. Paged: a pool of pages and a table of each slot's; attention gathers a slot's pages, in
plain XLA, up to the same length. Both give the same numbers, which is checked. Lengths are as in rollouts: slots are
somewhere in responses of exponential length, a quarter of the limit on average.
"""

import functools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks.common import REPEATS, run, spread
from rlpr_jax.models.attention import AttentionSettings, Cached, attend
from rlpr_jax.models.masks import UNSEEN, Places

_SLOTS = flags.DEFINE_integer("slots", 32, "rows that are decoded at once")
_PROMPT = flags.DEFINE_integer("prompt", 256, "longest prompt, tokens")
_LIMIT = flags.DEFINE_integer("limit", 256, "longest response, tokens")
_PAGE = flags.DEFINE_integer("page", 16, "tokens of a page")
_LAYERS = flags.DEFINE_integer("layers", 30, "layers, each with a cache of its own")
_HEADS = flags.DEFINE_list("heads", ["9", "3", "64"], "query heads, key/value heads, head size; SmolLM2-135M's")


def lengths_in_use(rng: np.random.Generator) -> np.ndarray:
  """int32[slots]: a prompt, and the part of a response that is there; long responses are met more often than short."""
  full = np.clip(rng.exponential(_LIMIT.value / 4, 100_000), 8, _LIMIT.value)
  met = rng.choice(full, _SLOTS.value, p=full / full.sum())
  prompts = rng.integers(_PROMPT.value // 8, _PROMPT.value + 1, _SLOTS.value)
  return (prompts + met * rng.random(_SLOTS.value)).astype(np.int32)


@functools.partial(jax.jit, static_argnames=("settings", "read"))
def contiguous(queries, keys, values, lengths, settings: AttentionSettings, read: int):
  """Layer by layer over [layers, B, K, H, S] and [layers, B, K, S, H]."""
  positions = jnp.where(jnp.arange(read) < lengths[:, None], jnp.arange(read), UNSEEN)

  def layer(carried, cache):
    keys, values = cache
    part = Cached(keys[..., :read], values[:, :, :read], positions)
    return step(carried, part, lengths, settings), None

  return jax.lax.scan(layer, queries, (keys, values))[0]


@functools.partial(jax.jit, static_argnames=("settings", "read"))
def paged(queries, keys, values, table, lengths, settings: AttentionSettings, read: int):
  """Layer by layer over pools [layers, pages, K, H, page] and [layers, pages, K, page, H]; table: int32[B, pages]."""
  positions = jnp.where(jnp.arange(read) < lengths[:, None], jnp.arange(read), UNSEEN)
  slots = table.shape[0]

  def layer(carried, pool):
    keys, values = pool[0][table], pool[1][table]  # [B, pages of a slot, ...]
    heads, size = keys.shape[2:4]
    keys = keys.transpose(0, 2, 3, 1, 4).reshape(slots, heads, size, read)
    values = values.transpose(0, 2, 1, 3, 4).reshape(slots, heads, read, size)
    return step(carried, Cached(keys, values, positions), lengths, settings), None

  return jax.lax.scan(layer, queries, (keys, values))[0]


def step(queries, part: Cached, lengths, settings: AttentionSettings):
  """One new token a row; the next layer's queries are this one's output, so that no layer can be left out."""
  kv_heads = part.keys.shape[1]
  new = queries[:, :, :kv_heads]
  ones = jnp.ones(queries.shape[:2], jnp.int32)
  return attend(queries, new, new, Places(ones, positions=lengths[:, None]), settings, cached=[part])


def timed(function) -> float:
  start = time.perf_counter()
  for _ in range(10):
    out = function()
  jax.block_until_ready(out)
  return (time.perf_counter() - start) / 10


def main(argv: list[str]) -> None:
  del argv
  heads, kv_heads, size = map(int, _HEADS.value)
  slots, page, layers = _SLOTS.value, _PAGE.value, _LAYERS.value
  capacity = -(-(_PROMPT.value + _LIMIT.value) // page) * page
  rng = np.random.default_rng(0)
  lengths = lengths_in_use(rng)
  settings = AttentionSettings("xla", scale=size**-0.5)
  queries = jnp.asarray(rng.normal(size=(slots, 1, heads, size)), jnp.float32)
  keys = jax.random.normal(jax.random.key(0), (layers, slots, kv_heads, size, capacity))
  values = jax.random.normal(jax.random.key(1), (layers, slots, kv_heads, capacity, size))
  # The same numbers in pages, in an order of their own.
  order = rng.permutation(slots * capacity // page)
  pages = capacity // page

  def pool(x: jax.Array, axis: int) -> jax.Array:
    split = jnp.moveaxis(x.reshape(*x.shape[:axis], pages, page, *x.shape[axis + 1 :]), axis, 2)
    flat = split.reshape(layers, slots * pages, *split.shape[3:])
    return jnp.zeros_like(flat).at[:, order].set(flat)

  key_pool, value_pool = pool(keys, 4), pool(values, 3)
  read = -(-int(lengths.max()) // page) * page
  table = jnp.asarray(order.reshape(slots, pages)[:, : read // page])
  run_contiguous = functools.partial(contiguous, queries, keys, values, lengths, settings, read)
  run_paged = functools.partial(paged, queries, key_pool, value_pool, table, lengths, settings, read)
  np.testing.assert_allclose(run_contiguous(), run_paged(), atol=1e-5)  # and compiles
  one, other = [], []
  for repeat in range(REPEATS.value):
    one.append(timed(run_contiguous))
    other.append(timed(run_paged))
    print(f"{repeat + 1}/{REPEATS.value}", file=sys.stderr)
  used = int(sum(-(-lengths // page)) * page)
  ratios = [b / a for a, b in zip(one, other, strict=True)]
  temporaries = [
    f"{function.lower(*args, settings, read).compile().memory_analysis().temp_size_in_bytes / 2**20:.0f}"
    for function, args in (
      (contiguous, (queries, keys, values, lengths)),
      (paged, (queries, key_pool, value_pool, table, lengths)),
    )
  ]
  print(f"""
{slots} slots of {capacity} tokens, {lengths.min()} to {lengths.max()} in use ({lengths.mean():.0f} on average), \
{layers} layers, {heads} query and {kv_heads} key/value heads of {size}, float32, pages of {page}

| | contiguous | paged | ratio |
|---|---|---|---|
| attention of one step, ms | {spread([1e3 * x for x in one])} | {spread([1e3 * x for x in other])} | {spread(ratios)} |
| temporaries, MiB | {temporaries[0]} | {temporaries[1]} | |
| tokens of cache held | {slots * capacity} | {used} | {slots * capacity / used:.2f} |""")


if __name__ == "__main__":
  run(main)
