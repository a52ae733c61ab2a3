"""Attention of a few new tokens of each row to the text that a cache holds of it, and to nothing else there.

Plain XLA reads every row as far as the longest text may reach. These kernels, in Pallas, read the blocks that a row's
own tokens see: not what lies behind its text, before a window, or in a slot that is idle. They read the cache where it
lies, so nothing is copied. What they mix is one part of a softmax, whose other parts are the new tokens' own: each
comes with the log-sum-exp of its scores, and `attention.attend` puts them together.

Shapes: R rows, T new tokens of each, N query heads, K key/value heads, Q = T N / K queries that share a key/value head,
C tokens of room in a slot.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8

from rlpr_jax.models.config import Reader
from rlpr_jax.models.kernels import AttentionSettings
from rlpr_jax.models.masks import UNSEEN, Seen
from rlpr_jax.sharding import Sharding
from rlpr_jax.types import AnyArray

LEAST = float(jnp.finfo(jnp.float32).min)
LANES = 128  # the room in a slot is a multiple of it, and so is a block of a TPU's kernel
MOST_BYTES = 1 << 20  # of keys in a block, on a TPU ...
MOST_TOKENS = 512  # ... and tokens: a row reads half a block too much on average
MOST_QUERIES = {"tpu": 256, "gpu": 64}  # at once; more of a row are as several rows
GPU_BLOCK = 64  # tokens
GPU_SPLITS = 8  # programs that share the blocks of a row


class Quantized(NamedTuple):
  """Numbers in eight bits, with one scale for the numbers of each head."""

  numbers: Int8[Array, "..."]
  scales: Float[Array, "..."]  # of length 1 along the head

  @classmethod
  def of(cls, x: Float[Array, "..."], axis: int) -> "Quantized":
    """`axis`: along the head."""
    wide = x.astype(jnp.float32)
    scales = jnp.maximum(jnp.max(jnp.abs(wide), axis=axis, keepdims=True), 1e-30) / 127
    return cls(jnp.round(wide / scales).astype(jnp.int8), scales)

  @classmethod
  def zeros(cls, shape: tuple[int, ...], axis: int) -> "Quantized":
    """`axis`: along the head."""
    numbers = jnp.zeros(shape, jnp.int8)
    return cls(numbers, jnp.zeros_like(jax.lax.slice_in_dim(numbers, 0, 1, axis=axis % len(shape)), jnp.float32))


class Mixed(NamedTuple):
  """What queries made of the keys and values that they saw."""

  values: Float[Array, "R K Q H"]  # float32; 0 where nothing is seen
  lse: Float[Array, "R K Q"]  # log of the sum of the scores' exponentials; the least number where nothing is seen


def ragged_attention(
  queries: Float[Array, "R T N H"],
  keys: Float[Array, "L S K H C"] | Quantized,
  values: Float[Array, "L S K H C"] | Quantized,
  layer: Int[Array, ""],
  rows: Int[AnyArray, "R"],
  seen: Seen,
  settings: AttentionSettings,
  reader: Reader,
) -> Mixed:
  """Mixes what the new tokens of some rows of a cache see there.

  Args:
    rows: of the cache, of each part of a mesh as many.

  Returns:
    K is the number of key/value heads, or of parts of the query heads where these are more and each device holds all
    keys and values; as `attention.attend` counts them.

  >>> cache = jnp.ones((1, 2, 1, 4, 128))  # two slots, all keys and values being ones
  >>> seen, settings = Seen(jnp.array([[0]]), jnp.array([[3]])), AttentionSettings(backend="xla", scale=1.0)
  >>> reader, row = Reader("tpu", interpret=True), jnp.array([1])
  >>> mixed = ragged_attention(jnp.zeros((1, 1, 1, 4)), cache, cache, jnp.array(0), row, seen, settings, reader)
  >>> mixed.values.ravel().tolist(), round(float(mixed.lse[0, 0, 0]), 3)  # log 3
  ([1.0, 1.0, 1.0, 1.0], 1.099)
  """
  sharding = settings.sharding
  num_shards, kv_shards, row_shards = (sharding.num_shards(axis) for axis in ("heads", "kv_heads", "batch"))
  call = functools.partial(_tpu_kernel if reader.kernel == "tpu" else _gpu_kernel, settings=settings, reader=reader)

  def attend(queries: jax.Array, keys: Any, values: Any, layer: jax.Array, rows: jax.Array, seen: Seen) -> Mixed:
    slots, kv_heads = jax.tree.leaves(keys)[0].shape[1:3]
    own, head = kv_heads, jnp.zeros((), jnp.int32)
    if num_shards != kv_shards:  # this device holds the keys and values of all heads, and reads one
      own, head = 1, jax.lax.axis_index(sharding.spec(("heads",))[0]) * kv_heads // num_shards
    if row_shards > 1:
      rows = rows - jax.lax.axis_index(sharding.spec(("batch",))[0]) * slots
    count, length, heads, head_dim = queries.shape
    grouped = queries.reshape(count, length, own, heads // own, head_dim).transpose(0, 2, 3, 1, 4)
    grouped = grouped.reshape(count, own, -1, head_dim)
    of_queries = Seen(*(jnp.tile(x.astype(jnp.int32), (1, heads // own)) for x in seen))
    tile, tiles = _tiles(grouped.shape[2], reader.kernel)
    padding = tile * tiles - grouped.shape[2]
    grouped = jnp.pad(grouped, [(0, 0), (0, 0), (0, padding), (0, 0)])
    grouped = grouped.reshape(count, own, tiles, tile, head_dim).swapaxes(1, 2).reshape(-1, own, tile, head_dim)
    of_queries = Seen(*(jnp.pad(x, [(0, 0), (0, padding)]).reshape(-1, tile) for x in of_queries))
    cache = (
      [keys.numbers, values.numbers, keys.scales, values.scales] if isinstance(keys, Quantized) else [keys, values]
    )
    mixed = call(grouped, cache, jnp.stack([layer, head]), jnp.repeat(rows.astype(jnp.int32), tiles), of_queries)

    def together(x: jax.Array) -> jax.Array:
      x = x.reshape(count, tiles, own, tile, *x.shape[3:]).swapaxes(1, 2)
      return x.reshape(count, own, tiles * tile, *x.shape[4:])[:, :, : length * heads // own]

    return Mixed(*map(together, mixed))

  if sharding.mesh is not None:
    cache = sharding.spec(("layers", "batch", "kv_heads", None, None))
    row = sharding.spec(("batch",))
    of_rows: Any = Seen(*(sharding.spec(("batch", None)),) * 2)  # type: ignore[arg-type]
    mixed: Any = (sharding.spec(("batch", "heads", None, None)), sharding.spec(("batch", "heads", None)))
    queried = sharding.spec(("batch", None, "heads", None))
    attend = jax.shard_map(
      attend,
      mesh=sharding.mesh,
      in_specs=(queried, cache, cache, jax.sharding.PartitionSpec(), row, of_rows),
      out_specs=Mixed(*mixed),
      check_vma=False,  # a kernel does not say over which axes its output varies
    )
  return attend(queries, keys, values, layer, jnp.asarray(rows), seen)


def _tiles(queries: int, kernel: str) -> tuple[int, int]:
  """Queries that a row of a kernel takes, and of how many such rows they are.

  Of Triton's products both sides are powers of two, from 16 on.

  >>> _tiles(7, "tpu"), _tiles(7, "gpu"), _tiles(300, "tpu")
  ((7, 1), (16, 1), (256, 2))
  """
  most = MOST_QUERIES[kernel]
  tile = min(most, max(16, 1 << (queries - 1).bit_length()) if kernel == "gpu" else queries)
  return tile, -(-queries // tile)


def obstacle(kernel: str, heads: int, kv_heads: int, head_dim: int, capacity: int, sharding: Sharding) -> str | None:
  """Why a kernel cannot read such a cache; None if it can.

  >>> obstacle("tpu", heads=8, kv_heads=2, head_dim=64, capacity=100, sharding=Sharding())
  'slots of 100 tokens, expected a multiple of 128'
  """
  if capacity % LANES:
    return f"slots of {capacity} tokens, expected a multiple of {LANES}"
  if kernel == "gpu" and head_dim & (head_dim - 1):
    return f"heads of {head_dim}, expected a power of two"
  num_shards = sharding.num_shards("heads")
  if num_shards != sharding.num_shards("kv_heads") and num_shards % kv_heads:
    return f"{kv_heads} key/value heads on each of {num_shards} devices, expected a divisor"
  return None


def block_length(capacity: int, bytes_a_token: int, kernel: str = "tpu") -> int:
  """Tokens in a block; on a TPU whole lanes, so many as divide the room in a slot.

  >>> block_length(5248, bytes_a_token=1024), block_length(1024, bytes_a_token=4096)
  (128, 256)
  """
  if kernel == "gpu":
    return GPU_BLOCK
  most = min(MOST_TOKENS, max(MOST_BYTES // bytes_a_token, LANES))
  return max(block for block in range(LANES, capacity + 1, LANES) if capacity % block == 0 and block <= most)


def blocks_read(seen: Seen, block: int) -> Int[Array, "R"]:
  """How many blocks a row's queries read, all of them together: those between the first and the last that any sees.

  >>> blocks_read(Seen(jnp.array([[0], [130], [0]]), jnp.array([[129], [256], [0]])), block=128).tolist()
  [2, 1, 0]
  """
  return _last_blocks(seen, block) - _first_blocks(seen, block)


def _first_blocks(seen: Seen, block: int) -> Int[Array, "R"]:
  some = seen.begins < seen.ends
  first = jnp.min(jnp.where(some, seen.begins, UNSEEN), axis=1) // block
  return jnp.where(jnp.any(some, axis=1), first, 0)


def _last_blocks(seen: Seen, block: int) -> Int[Array, "R"]:
  return jnp.max(jnp.where(seen.begins < seen.ends, -(-seen.ends // block), 0), axis=1)


# --- TPUs: one step of the grid for each block of a row, and the grid as long as there are such blocks ---


def _tpu_kernel(
  queries: Float[Array, "R K Q H"],
  cache: Sequence[jax.Array],
  place: Int[Array, "2"],
  rows: Int[Array, "R"],
  seen: Seen,
  settings: AttentionSettings,
  reader: Reader,
) -> Mixed:
  """On one device.

  Args:
    cache: keys, values and, where these are in eight bits, the scales of both.
    place: the layer, and the first of the K heads among those that the cache has.
  """
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import tpu as pltpu

  count, kv_heads, length, head_dim = queries.shape
  capacity = cache[0].shape[-1]
  block = block_length(capacity, kv_heads * head_dim * cache[0].dtype.itemsize)
  cores = reader.cores if count % reader.cores == 0 else 1
  each, most = count // cores, count // cores * (capacity // block)  # rows of a core, and its steps at most
  first = _first_blocks(seen, block)
  # A row that sees nothing has a step too: somebody must write its zeros.
  counts = jnp.maximum(blocks_read(seen, block), 1)

  def steps(first: jax.Array, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The row of each step, among those of a core, and its block."""
    row = jnp.repeat(jnp.arange(each, dtype=jnp.int32), counts, total_repeat_length=most)
    return row, (first - (jnp.cumsum(counts) - counts))[row] + jnp.arange(most, dtype=jnp.int32)

  of_step, blocks = jax.vmap(steps)(first.reshape(cores, each), counts.reshape(cores, each))
  of_step = (of_step + jnp.arange(cores, dtype=jnp.int32)[:, None] * each).ravel()
  totals = counts.reshape(cores, each).sum(axis=1)

  def at(core: jax.Array, step: jax.Array, totals: Any) -> jax.Array:
    """A step of a core among all; beyond its last one that again, for which nothing is fetched."""
    return core * most + jnp.minimum(step, totals[core] - 1)

  def cached(*shape: int) -> Any:
    def index(core, step, place, totals, of_step, blocks, rows):  # type: ignore[no-untyped-def]
      i = at(core, step, totals)
      return place[0], rows[of_step[i]], place[1], 0, blocks[i]

    return pl.BlockSpec((1, 1, *shape), index)

  def of_row(*shape: int) -> Any:
    def index(core, step, place, totals, of_step, *_):  # type: ignore[no-untyped-def]
      return (of_step[at(core, step, totals)], *[0] * len(shape))

    return pl.BlockSpec((1, *shape), index)

  call = pl.pallas_call(
    functools.partial(_tpu_step, most=most, settings=settings),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=5,
      grid=(cores, jnp.max(totals)),
      in_specs=[
        of_row(kv_heads, length, head_dim),
        of_row(length, 1),
        of_row(length, 1),
        *[cached(kv_heads, head_dim, block)] * 2,
        *[cached(kv_heads, 1, block) for _ in cache[2:]],
      ],
      out_specs=[of_row(kv_heads, length, n) for n in (head_dim, 1, 1)],
    ),
    out_shape=[jax.ShapeDtypeStruct((count, kv_heads, length, n), jnp.float32) for n in (head_dim, 1, 1)],
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
    interpret=reader.interpret,
    name="ragged_attention",
  )
  begins, ends = (x[..., None] for x in seen)
  sums, highest, total = call(place, totals, of_step, blocks.ravel(), rows, queries, begins, ends, *cache)
  return _finish(sums, highest[..., 0], total[..., 0])


def _tpu_step(*refs: Any, most: int, settings: AttentionSettings) -> None:
  """One block of one row; `refs`: as the call names them, the numbers that are known beforehand first."""
  from jax.experimental import pallas as pl

  _, totals, of_step, blocks, _, *arrays = refs
  core, step = pl.program_id(0), pl.program_id(1)
  i = core * most + step

  @pl.when(step < totals[core])  # the other core may have more of them
  def run() -> None:
    queries, begins, ends, keys, values, *scales, sums, highest, total = arrays
    key_scales, value_scales = scales or (None, None)
    block = keys.shape[-1]

    @pl.when((step == 0) | (of_step[jnp.maximum(i - 1, 0)] != of_step[i]))
    def begin_row() -> None:
      sums[...], highest[...], total[...] = jnp.zeros_like(sums), jnp.full_like(highest, LEAST), jnp.zeros_like(total)

    places = blocks[i] * block + jax.lax.broadcasted_iota(jnp.int32, (1, block), 1)
    seen = (places >= begins[0]) & (places < ends[0])  # [Q, block]
    for head in range(keys.shape[2]):
      query = queries[0, head]
      scores = jax.lax.dot(query, keys[0, 0, head].astype(query.dtype), preferred_element_type=jnp.float32)
      if key_scales is not None:
        scores *= key_scales[0, 0, head]
      weights, decay, highest[0, head] = _softmax_step(scores, seen, highest[0, head], settings)
      total[0, head] = decay * total[0, head] + jnp.sum(weights, axis=1, keepdims=True)
      if value_scales is not None:
        weights *= value_scales[0, 0, head]
      mixed = jax.lax.dot_general(
        weights.astype(query.dtype),
        values[0, 0, head].astype(query.dtype),
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
      )
      sums[0, head] = decay * sums[0, head] + mixed


def _softmax_step(
  scores: jax.Array, seen: jax.Array, highest: jax.Array, settings: AttentionSettings
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Exponentials of scores, what to multiply the sums so far by, and the highest score, to which all are relative."""
  scores *= settings.scale
  if settings.softcap is not None:
    scores = settings.softcap * jnp.tanh(scores / settings.softcap)
  scores = jnp.where(seen, scores, LEAST)
  new = jnp.maximum(highest, jnp.max(scores, axis=1, keepdims=True))
  return jnp.where(seen, jnp.exp(scores - new), 0.0), jnp.exp(highest - new), new


def _finish(sums: jax.Array, highest: jax.Array, total: jax.Array) -> Mixed:
  seen = total > 0
  total = jnp.where(seen, total, 1.0)
  return Mixed(sums / total[..., None], jnp.where(seen, highest + jnp.log(total), LEAST))


# --- GPUs: some programs for each row and head, which share its blocks and are put together afterwards ---


def _gpu_kernel(
  queries: Float[Array, "R K Q H"],
  cache: Sequence[jax.Array],
  place: Int[Array, "2"],
  rows: Int[Array, "R"],
  seen: Seen,
  settings: AttentionSettings,
  reader: Reader,
) -> Mixed:
  """As `_tpu_kernel`."""
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import triton as plgpu

  count, kv_heads, length, head_dim = queries.shape
  shape = (count, kv_heads, GPU_SPLITS, length)
  sums, highest, total = pl.pallas_call(
    functools.partial(_gpu_program, settings=settings, dot=plgpu.dot),
    grid=(count, kv_heads, GPU_SPLITS),
    out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((*shape, head_dim), shape, shape)],
    compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
    interpret=reader.interpret,
    name="ragged_attention",
  )(queries, *seen, _first_blocks(seen, GPU_BLOCK), _last_blocks(seen, GPU_BLOCK), place, rows, *cache)
  most = jnp.max(highest, axis=2, keepdims=True)
  share = jnp.exp(highest - most)
  sums, total = jnp.sum(share[..., None] * sums, axis=2), jnp.sum(share * total, axis=2)
  return _finish(sums, most[:, :, 0], total)


def _gpu_program(*refs: Any, settings: AttentionSettings, dot: Callable[..., jax.Array]) -> None:
  """A share of a row's blocks, for the queries of one head."""
  from jax.experimental import pallas as pl

  queries, begins, ends, firsts, lasts, place, rows, keys, values, *scales, sums, highest, total = refs
  key_scales, value_scales = scales or (None, None)
  row, head, part = (pl.program_id(axis) for axis in range(3))
  layer, slot, cached = place[0], rows[row], place[1] + head
  first, last = firsts[row], lasts[row]
  each = pl.cdiv(last - first, GPU_SPLITS)
  query, begin, end = queries[row, head], begins[row], ends[row]

  def step(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    mixed, most, weight = carry
    span = pl.ds(i * GPU_BLOCK, GPU_BLOCK)
    scores = dot(query, keys[layer, slot, cached, :, span].astype(query.dtype))
    if key_scales is not None:
      scores *= key_scales[layer, slot, cached, 0, span][None]
    places = (i * GPU_BLOCK + jnp.arange(GPU_BLOCK))[None]
    seen = (places >= begin[:, None]) & (places < end[:, None])
    weights, decay, new = _softmax_step(scores, seen, most[:, None], settings)
    weight = decay[:, 0] * weight + jnp.sum(weights, axis=1)
    if value_scales is not None:
      weights *= value_scales[layer, slot, cached, 0, span][None]
    value = values[layer, slot, cached, :, span].astype(query.dtype)
    return decay * mixed + dot(weights.astype(query.dtype), value.T), new[:, 0], weight

  start = jnp.zeros(query.shape, jnp.float32), jnp.full(len(query), LEAST), jnp.zeros(len(query), jnp.float32)
  begin_at = first + part * each
  found = jax.lax.fori_loop(begin_at, jnp.minimum(begin_at + each, last), step, start)
  sums[row, head, part], highest[row, head, part], total[row, head, part] = found
