"""Attention to cached texts by kernels, step by step on the CPU, against sums in float64 and against plain XLA."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rlpr_jax import models
from rlpr_jax.errors import SettingError
from rlpr_jax.models import Reader, Runtime, Text, ragged
from rlpr_jax.models.kernels import AttentionSettings
from rlpr_jax.models.masks import Seen
from rlpr_jax.sampling import decode
from tests.models import cases

LAYERS, SLOTS, CAPACITY = 2, 5, 256
READERS = {
  "tpu": Reader("tpu", interpret=True),
  "tpu of two cores": Reader("tpu", cores=2, interpret=True),
  "gpu": Reader("gpu", interpret=True),
}


def mix_in_float64(queries, keys, values, rows, begins, ends, settings):
  """One query after the other. Shapes as of `ragged_attention`, of one layer; [R, T, N, H] and [R, T, N]."""
  count, length, heads, _ = queries.shape
  group = heads // keys.shape[1]
  mixed, lse = np.zeros(queries.shape), np.full(queries.shape[:3], ragged.LEAST)
  for row, token, head in itertools.product(range(count), range(length), range(heads)):
    seen = slice(begins[row, token], ends[row, token])
    key, value = (x[rows[row], head // group][:, seen].astype(float) for x in (keys, values))
    if key.shape[1]:
      scores = settings.scale * (queries[row, token, head].astype(float) @ key)
      if settings.softcap is not None:
        scores = settings.softcap * np.tanh(scores / settings.softcap)
      weights = np.exp(scores - scores.max())
      mixed[row, token, head] = value @ weights / weights.sum()
      lse[row, token, head] = scores.max() + np.log(weights.sum())
  return mixed, lse


def by_kv_head(x, kv_heads):
  """[R, T, N, ...] as [R, K, Q, ...]."""
  rows, length, heads, *rest = x.shape
  x = np.moveaxis(x.reshape(rows, length, kv_heads, heads // kv_heads, *rest), 1, 3)
  return x.reshape(rows, kv_heads, -1, *rest)


def case(heads, kv_heads, head_dim, length, seed=0, capacity=CAPACITY):
  """Queries, a cache, some of its rows, and what each query sees: lengths from nothing to all there is room for."""
  rng = np.random.default_rng(seed)
  cache = rng.normal(size=(2, LAYERS, SLOTS, kv_heads, head_dim, capacity)).astype(np.float32)
  rows = np.array([3, 0, 4, 1])
  queries = rng.normal(size=(rows.size, length, heads, head_dim)).astype(np.float32)
  ends = rng.integers(1, capacity, (rows.size, length))
  ends[0], ends[1] = 0, capacity
  begins = np.minimum(rng.integers(0, capacity, ends.shape), ends)  # some see nothing
  begins[1] = 0
  return queries, *cache, rows, begins.astype(np.int32), ends.astype(np.int32)


def mixed_by(reader, queries, keys, values, rows, begins, ends, settings):
  seen = Seen(jnp.asarray(begins), jnp.asarray(ends))
  arrays = (jnp.asarray(x) if isinstance(x, np.ndarray) else x for x in (queries, keys, values))
  return ragged.ragged_attention(*arrays, jnp.array(1), rows, seen, settings, reader)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
  ("heads", "kv_heads", "head_dim", "length", "softcap"),
  [(2, 2, 64, 1, None), (4, 2, 128, 1, 30.0), (7, 1, 64, 1, None), (14, 1, 256, 1, None), (4, 2, 64, 40, None)],
)
def test_kernels_mix_what_each_query_sees(reader, heads, kv_heads, head_dim, length, softcap):
  settings = AttentionSettings("xla", scale=head_dim**-0.5, softcap=softcap)
  queries, keys, values, rows, begins, ends = case(heads, kv_heads, head_dim, length)
  mixed, lse = mix_in_float64(queries, keys[1], values[1], rows, begins, ends, settings)
  found = mixed_by(READERS[reader], queries, keys, values, rows, begins, ends, settings)
  np.testing.assert_allclose(found.values, by_kv_head(mixed, kv_heads), atol=2e-6)
  np.testing.assert_allclose(found.lse, by_kv_head(lse, kv_heads), rtol=1e-6, atol=5e-6)
  assert (np.asarray(found.lse) == ragged.LEAST).any()  # the row that sees nothing


@pytest.mark.parametrize("reader", ["tpu", "gpu"])
def test_eight_bits(reader):
  """As the numbers that they stand for."""
  settings = AttentionSettings("xla", scale=0.125)
  queries, keys, values, rows, begins, ends = case(4, 2, 64, 2)
  packed = [ragged.Quantized.of(jnp.asarray(x), -2) for x in (keys, values)]
  wide = [np.asarray(x.numbers * x.scales) for x in packed]
  found = mixed_by(READERS[reader], queries, *packed, rows, begins, ends, settings)
  mixed, lse = mix_in_float64(queries, wide[0][1], wide[1][1], rows, begins, ends, settings)
  np.testing.assert_allclose(found.values, by_kv_head(mixed, 2), atol=2e-6)
  np.testing.assert_allclose(found.lse, by_kv_head(lse, 2), rtol=1e-6, atol=5e-6)


@pytest.mark.parametrize("reader", ["tpu", "gpu"])
def test_what_nobody_sees_changes_nothing(reader):
  """Nor is a block read in which no query of the row sees a token: not even NaN shows there."""
  settings = AttentionSettings("xla", scale=0.125)
  queries, keys, values, rows, _, _ = case(2, 1, 64, 1, capacity=512)
  begins, ends = np.full((4, 1), 140, np.int32), np.array([[200], [250], [256], [141]], np.int32)
  places = np.arange(512)
  seen = (places >= 128) & (places < 256)  # their block of either kernel, or two
  expected = mixed_by(READERS[reader], queries, keys, values, rows, begins, ends, settings)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(ragged, "MOST_TOKENS", 128)
    lost = [np.where(seen, x, np.nan) for x in (keys, values)]
    found = mixed_by(READERS[reader], queries, *lost, rows, begins, ends, settings)
  np.testing.assert_allclose(found.values, expected.values, atol=1e-6)
  np.testing.assert_allclose(found.lse, expected.lse, atol=1e-6)


def test_blocks_follow_the_lengths():
  """The grid of a TPU's kernel has a step for each block that is read, and one for a row that reads none."""
  rng = np.random.default_rng(0)
  ends = rng.integers(0, 1025, (64, 1))
  begins = np.where(rng.random((64, 1)) < 0.5, 0, np.maximum(ends - 200, 0))
  read = np.asarray(ragged.blocks_read(Seen(jnp.asarray(begins), jnp.asarray(ends)), block=128))
  by_hand = [
    len({place // 128 for place in range(begin, end)}) for begin, end in zip(begins[:, 0], ends[:, 0], strict=True)
  ]
  assert read.tolist() == by_hand
  assert 128 * read.sum() < 0.5 * 1024 * 64


def test_blocks_are_small_enough_and_divide_the_room():
  for capacity, width in itertools.product((128, 640, 1024, 5248, 8192), (64, 256, 1024, 8192)):
    block = ragged.block_length(capacity, width)
    assert capacity % block == 0 == block % 128
    assert block <= 512
    assert block == 128 or block * width <= 1 << 20


# --- whole models ---


@functools.partial(jax.jit, static_argnames=("model", "longest"))
def read_on(model, params, tokens, positions, cache, lengths, rows, segment_ids, longest):
  decoder = nnx.merge(model, params)
  text = Text(cache, lengths, longest, rows)
  hidden, new = decoder.extend(tokens, positions, (), segment_ids, text)
  return decoder.logits(hidden), new


@pytest.mark.parametrize("reader", ["tpu", "gpu"])
@pytest.mark.parametrize("name", ["gemma2", "llama"])
@pytest.mark.parametrize("int8", [False, True])
def test_suffixes_after_cached_texts(name, reader, int8):
  """Layers with windows and soft caps, several suffixes of a row, rows in any order: as plain XLA reads them."""
  config = dataclasses.replace(cases.config(name), head_dim=16 if name == "llama" else cases.config(name).head_dim)
  params = cases.random_params(config)
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, config.vocab_size, (5, 128)).astype(np.int32)
  make = functools.partial(Runtime, int8_cache=int8)
  plain = models.definition(config, make(decode_attention="xla"))
  kernel = models.definition(config, make(decode_attention=READERS[reader]))
  caches = [
    jax.jit(lambda params, model=model: nnx.merge(model, params).prefill(tokens))(params)[1]
    for model in (plain, kernel)
  ]
  rows, starts = np.array([4, 0, 4, 2]), np.array([13, 0, 120, 64])
  suffixes = rng.integers(0, config.vocab_size, (4, 5)).astype(np.int32)
  segment_ids = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 2, 2, 0], [0] * 5])
  positions = starts[:, None] + np.array([[0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1, 0, 1, 2], [0] * 5])
  after = np.full(4, 128), rows, segment_ids
  expected, old = read_on(plain, params, suffixes, positions, caches[0], *after, longest=128)
  found, new = read_on(kernel, params, suffixes, positions, caches[1], *after, longest=128)
  real = segment_ids > 0
  np.testing.assert_allclose(found[real], expected[real], atol=2e-5)
  assert np.isfinite(found).all()
  if not int8:
    old = old._replace(values=old.values.swapaxes(3, 4))  # as a kernel takes them
    for ours, theirs in zip(new, old, strict=True):
      ours, theirs = (np.moveaxis(np.asarray(x), -1, 2)[:, real] for x in (ours, theirs))
      np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_a_cache_that_no_kernel_reads(policy):
  """Is read by plain XLA, unless a kernel is asked for."""
  tokens = np.ones((2, 40), np.int32)

  def read(choice):
    model = models.definition(policy.config, Runtime(decode_attention=choice))
    _, cache = nnx.merge(model, policy.params).prefill(tokens)
    positions, lengths = np.full((2, 1), 40), np.full(2, 40)
    return read_on(model, policy.params, tokens[:, :1], positions, cache, lengths, None, np.ones((2, 1), int), 40)[0]

  np.testing.assert_allclose(read("ragged"), read("xla"), atol=1e-5)

  def make_slots(choice):
    model = models.definition(policy.config, Runtime(decode_attention=choice))
    return decode.empty_slots(model, policy.params, slots=2, capacity=40)

  make_slots(Reader("tpu", interpret=True))
  with pytest.raises(SettingError, match="decode_attention: ragged cannot read slots of 40 tokens, expected"):
    make_slots("ragged")


def test_by_device():
  class Device:
    def __init__(self, platform, kind):
      self.platform, self.device_kind = platform, kind

  def chosen(choice, *device):
    return models.for_device(Runtime(decode_attention=choice), Device(*device)).decode_attention

  assert chosen("auto", "tpu", "TPU v5 lite") == Reader("tpu")
  assert chosen("auto", "tpu", "TPU v5") == Reader("tpu", cores=2)
  assert chosen("auto", "gpu", "NVIDIA H100") == Reader("gpu")
  assert chosen("auto", "cpu", "cpu") is None
  assert chosen("xla", "tpu", "TPU v4") is None
  assert chosen("ragged", "tpu", "TPU v4") == Reader("tpu", cores=2, required=True)
  assert chosen("ragged", "cpu", "cpu") == Reader("tpu", interpret=True, required=True)
