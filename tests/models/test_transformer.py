"""The decoder against itself: packed, padded, cached, in bfloat16; its memory, and its size as a program.

Against transformers it is tested in tests/huggingface/test_families.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.gpu import shapes
from rlpr_jax import huggingface, models
from rlpr_jax.models import UNSEEN, CacheView, KVCache, logprobs, transformer
from rlpr_jax.training.optimizer import clipped_optimizer
from rlpr_jax.training.update import Trainable, UpdateProgram, UpdateSettings, loss, optimizer_step
from rlpr_jax.types import PackedRows
from tests.models import cases
from tests.models.cases import by_token, extend, pack, prefill, whole_logits

VOCAB = 64  # of the policy in conftest.py, and fewer than the cases have


def random_tokens(*shape, seed=0):
  return np.random.default_rng(seed).integers(0, VOCAB, shape).astype(np.int32)


def empty_cache(config, rows, capacity, dtype=jnp.float32):
  shape = (config.num_layers, rows, config.num_kv_heads)
  return KVCache(
    jnp.zeros((*shape, config.head_dim, capacity), dtype), jnp.zeros((*shape, capacity, config.head_dim), dtype)
  )


@pytest.mark.parametrize("name", ["llama", "qwen2_tied"])
def test_shards_hold_the_same_parameters_as_one_file(tmp_path, name):
  cases.torch_model(name).save_pretrained(tmp_path, max_shard_size="20KB")
  config, params = huggingface.load_pretrained(str(tmp_path))
  assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
  assert not (tmp_path / "model.safetensors").exists()
  single_config, single_params = cases.loaded(name)
  assert config == single_config
  jax.tree.map(np.testing.assert_array_equal, params, single_params)


def test_parameters_have_the_form_of_new_ones():
  for name in cases.CASES:
    config, params = cases.loaded(name)
    found, abstract = (
      jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (params, models.abstract_params(config))
    )
    assert found == abstract
    assert config.tie_embeddings == ("head" not in params)
  new = models.init_params(config, 0)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == abstract
  assert {x.dtype for x in jax.tree.leaves(new)} == {jnp.dtype(jnp.float32)}


def test_load_in_bfloat16(tmp_path):
  cases.torch_model("qwen2").save_pretrained(tmp_path)
  _, half = huggingface.load_pretrained(str(tmp_path), dtype=jnp.bfloat16)
  params = cases.loaded("qwen2")[1]
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(x.astype(jnp.bfloat16), y), params, half)
  assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}


# --- packed rows ---


def test_sequences_packed_into_one_row_are_as_if_alone(policy):
  lengths = (5, 9, 1, 9)
  sequences = [random_tokens(n, seed=n) for n in lengths]
  found = whole_logits(policy.model, policy.params, *pack(sequences, 30))[0]
  alone = [whole_logits(policy.model, policy.params, sequence[None])[0] for sequence in sequences]
  np.testing.assert_allclose(found[:24], np.concatenate(alone), atol=1e-5)
  assert np.all(np.isfinite(found))  # on padding too


def test_other_segments_and_later_tokens_cannot_be_seen(policy):
  def logits(sequences):
    return whole_logits(policy.model, policy.params, *pack(sequences, 16))[0]

  first, second = (random_tokens(n, seed=n) for n in (6, 8))
  before = logits([first, second])
  np.testing.assert_array_equal(logits([random_tokens(6, seed=50), second])[6:14], before[6:14])
  after = logits([first, np.concatenate([second[:5], random_tokens(3, seed=51)])])
  np.testing.assert_array_equal(after[:11], before[:11])
  assert np.max(np.abs(after[11:14] - before[11:14])) > 0.1


def test_the_amount_and_the_content_of_padding_change_nothing(policy):
  sequence = random_tokens(9)
  expected = whole_logits(policy.model, policy.params, sequence[None])[0]
  for length in (16, 30):
    tokens, positions, segment_ids = pack([sequence], length)
    for padding in (0, 7):
      tokens[0, 9:] = padding
      found = whole_logits(policy.model, policy.params, tokens, positions, segment_ids)[0, :9]
      np.testing.assert_allclose(found, expected, atol=1e-5)


def test_every_layer_runs_in_its_turn(policy):
  tokens = random_tokens(1, 9)
  swapped = policy.params | {"layers": jax.tree.map(lambda x: x[::-1], policy.params["layers"])}
  difference = whole_logits(policy.model, swapped, tokens) - whole_logits(policy.model, policy.params, tokens)
  assert np.max(np.abs(difference)) > 0.1


# --- cache ---


def cached_logits(model, params, tokens, lengths, prompt_lengths, width, capacity):
  """Logits [B, T, V] from one prefill of `width` padded slots, then one token at a time, each row at its own pace."""
  rows = np.arange(len(tokens))
  prompts = np.where(np.arange(width) < prompt_lengths[:, None], tokens[:, :width], 3)
  out = np.zeros((*tokens.shape, VOCAB), np.float32)
  out[:, :width], cache = prefill(model, params, prompts, capacity)
  for step in range(int(np.max(lengths - prompt_lengths))):
    places = np.minimum(prompt_lengths + step, lengths - 1)  # a row that is done reads its last token again
    logits, cache = extend(model, params, tokens[rows, places][:, None], places, cache)
    out[rows, places] = logits[:, 0]
  return out


@pytest.mark.parametrize(("width", "capacity"), [(9, 20), (14, 33)])
def test_prefill_and_decode_are_the_full_forward_pass(policy, width, capacity):
  tokens, lengths, prompt_lengths = random_tokens(3, 20), np.array([20, 13, 17]), np.array([6, 9, 1])
  expected = whole_logits(policy.model, policy.params, tokens)
  found = cached_logits(policy.model, policy.params, tokens, lengths, prompt_lengths, width, capacity)
  for row, end in enumerate(lengths):
    np.testing.assert_allclose(found[row, :end], expected[row, :end], atol=1e-4)


def test_some_tokens_at_once_on_top_of_a_cache(policy):
  """Scoring a suffix: several tokens, at a place of its own in each row, over what stood there before."""
  tokens, starts, suffix = random_tokens(3, 16), np.array([5, 12, 0]), random_tokens(3, 4, seed=9)
  _, cache = prefill(policy.model, policy.params, tokens, 18)
  found, _ = extend(policy.model, policy.params, suffix, starts, cache)
  spliced = tokens.copy()
  for row, start in enumerate(starts):
    spliced[row, start : start + 4] = suffix[row]
  expected = whole_logits(policy.model, policy.params, spliced)
  for row, start in enumerate(starts):
    np.testing.assert_allclose(found[row], expected[row, start : start + 4], atol=1e-4)


def test_an_empty_cache_extended_is_a_prefill(policy):
  tokens = random_tokens(2, 6)
  expected, expected_cache = prefill(policy.model, policy.params, tokens, 8)
  empty = empty_cache(policy.config, 2, 8)
  found, cache = extend(policy.model, policy.params, tokens, np.zeros(2, np.int32), empty)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), cache, expected_cache)


def test_positions_beyond_the_cache_are_not_written(policy):
  """Nor do they push out what is in it; their logits do not need the room."""
  tokens, starts = random_tokens(1, 6), np.zeros(1, np.int32)
  _, expected = prefill(policy.model, policy.params, tokens[:, :4], 4)
  found, cache = extend(policy.model, policy.params, tokens, starts, empty_cache(policy.config, 1, 4))
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), cache, expected)
  np.testing.assert_allclose(found, whole_logits(policy.model, policy.params, tokens), atol=1e-4)


# --- parts of caches ---

# Layers with windows shorter than the texts, soft caps and grouped queries; and none of these.
READERS = ("gemma2", "llama")


@functools.cache
def reader(name):
  """A model, its parameters, five texts of 20 tokens and their cache."""
  config = cases.config(name)
  model, params, tokens = models.definition(config), cases.random_params(config), random_tokens(5, 20)
  return model, params, tokens, prefill(model, params, tokens, 20)[1]


@functools.partial(jax.jit, static_argnums=0)
def read_on(model, params, tokens, positions, parts, segment_ids=None):
  """Logits of tokens after parts of caches, and the tokens' own keys and values."""
  decoder = nnx.merge(model, params)
  hidden, new = decoder.extend(tokens, positions, parts, segment_ids)
  return decoder.logits(hidden), new


def filled(rows, count):
  """Positions of `count` cache slots in the order of the text."""
  return np.broadcast_to(np.arange(count, dtype=np.int32), (rows, count))


@pytest.mark.parametrize("name", READERS)
def test_suffixes_of_one_row_are_as_if_alone(name):
  """As segments, after different parts of the row's text; the cache holds more of it than either follows."""
  model, params, tokens, cache = reader(name)
  segment_ids = np.array([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 2, 2], [1, 1, 1, 1, 1, 1], [1, 2, 3, 4, 0, 0], [0] * 6])
  starts = [(4, 15), (18, 2), (11,), (0, 20, 7, 20), ()]  # before the first token of each
  suffixes, positions = random_tokens(5, 6, seed=9), np.full((5, 6), 3)
  places = [[np.flatnonzero(ids == segment) for segment in range(1, ids.max() + 1)] for ids in segment_ids]
  for row, segments in enumerate(places):
    for start, place in zip(starts[row], segments, strict=True):
      positions[row, place] = start + np.arange(place.size)
  found, new = read_on(model, params, suffixes, positions, (CacheView(cache, filled(5, 20)),), segment_ids)
  assert np.all(np.isfinite(found))  # on padding too
  shape = new.values.shape
  assert shape == (*cache.values.shape[:3], 6, cache.values.shape[-1])
  assert new.keys.shape == (*shape[:3], shape[4], shape[3])
  for row, segments in enumerate(places):
    for start, place in zip(starts[row], segments, strict=True):
      text = np.concatenate([tokens[row, :start], suffixes[row, place]])[None]
      padded = np.pad(text, ((0, 0), (0, 26 - text.size)))  # one shape; what follows is not seen
      expected = whole_logits(model, params, padded)[0, start : text.size]
      np.testing.assert_allclose(found[row, place], expected, atol=1e-4)
      alone = prefill(model, params, padded, 26)[1]
      for ours, theirs in zip(by_token(new), by_token(alone), strict=True):
        np.testing.assert_allclose(ours[:, row, place], theirs[:, 0, start : text.size], atol=1e-4)


@pytest.mark.parametrize("name", READERS)
def test_rows_of_a_larger_cache(name):
  """In any order and some of them twice, and less than all of their slots."""
  model, params, tokens, cache = reader(name)
  rows, starts = np.array([4, 0, 4, 2], np.int32), np.array([13, 5, 9, 12])
  suffixes = random_tokens(4, 3, seed=9)
  found, _ = read_on(
    model,
    params,
    suffixes,
    starts[:, None] + np.arange(3),
    (CacheView(cache, filled(4, 13), rows),),
    np.ones((4, 3), int),
  )
  for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
    text = np.concatenate([tokens[row, :start], suffixes[i], np.zeros(10, np.int32)])[None, :16]
    np.testing.assert_allclose(found[i], whole_logits(model, params, text)[0, start : start + 3], atol=1e-4)


@pytest.mark.parametrize("num_shards", [1, 2, 3])
def test_rows_are_taken_from_each_part_of_the_cache(num_shards):
  """Whether they are asked for as one list or part by part. What a mesh makes of it is in test_sharding.py."""
  rng = np.random.default_rng(0)  # six rows, in parts of six, three or two
  cache = KVCache(*(rng.normal(size=(3, 6, 2, *shape)).astype(np.float32) for shape in ((4, 5), (5, 4))))
  rows = {1: [5, 0, 0, 3, 2, 4], 2: [2, 0, 2, 5, 3, 3], 3: [1, 1, 2, 3, 5, 4]}[num_shards]
  part = CacheView(cache, filled(6, 4), np.array(rows, np.int32))
  for layer in range(3):
    found = jax.jit(CacheView.layer, static_argnums=(2, 3))(part, layer, num_shards, "float32")
    np.testing.assert_array_equal(found.keys, cache.keys[layer][rows][..., :4])
    np.testing.assert_array_equal(found.values, cache.values[layer][rows][:, :, :4])
    np.testing.assert_array_equal(found.positions, part.positions)


@pytest.mark.parametrize("name", READERS)
def test_two_parts_are_as_one(name):
  """A text and what came after it, as in decoding: windows hold across both, and the slots' order says nothing.

  The rows' texts differ in length, and so do the empty slots of each part.
  """
  model, params, tokens, cache = reader(name)
  lengths, recent = np.array([9, 14, 4, 1, 13]), 5  # of the text; slots of what came after it, the last one empty
  suffixes, starts = random_tokens(5, 2, seed=9), lengths + recent - 1
  places = np.arange(14)
  text = CacheView(cache, np.where(places < lengths[:, None], places, UNSEEN).astype(np.int32))
  order = np.array([3, 0, 4, 1, 2])  # of the later slots
  kv_length = lengths[:, None] + order
  index = np.minimum(kv_length, 19)[None, :, :, None, None]  # the same place in the cache of the whole text
  newer = [np.take_along_axis(x, index, axis=2) for x in by_token(cache)]
  keys, values = (np.where((order < recent - 1)[:, None, None], x, 1e3) for x in newer)  # were it seen, it would show
  newer = KVCache(np.moveaxis(keys, 2, 4), np.moveaxis(values, 2, 3))
  after = CacheView(newer, np.where(order < recent - 1, kv_length, UNSEEN).astype(np.int32))
  positions = starts[:, None] + np.arange(2)
  two, _ = read_on(model, params, suffixes, positions, (text, after))
  swapped, _ = read_on(model, params, suffixes, positions, (after, text))
  one, _ = read_on(model, params, suffixes, positions, (CacheView(cache, filled(5, 20)),))
  np.testing.assert_allclose(two, one, atol=1e-4)
  np.testing.assert_allclose(swapped, one, atol=1e-4)
  for row, start in enumerate(starts):
    whole = np.concatenate([tokens[row, :start], suffixes[row], np.zeros(20, np.int32)])[None, :20]
    np.testing.assert_allclose(two[row], whole_logits(model, params, whole)[0, start : start + 2], atol=1e-4)
  earlier, _ = read_on(model, params, suffixes, positions, (text,))
  assert np.max(np.abs(earlier - two)) > 0.1  # the second part is read


# --- eight bits ---


def uneven(config, params, factors):
  """The same model, with channels of keys that are `factors` as large, and those of queries as small."""
  layers = dict(params["layers"])
  for name, by in (("query", 1 / factors), ("key", factors)):
    if config.qk_norm:
      scale = layers[f"{name}_norm"]["scale"]
      by = np.tile(by, scale.shape[-1] // by.size)
      layers[f"{name}_norm"] = {"scale": scale * by + config.norm_offset * (by - 1)}
    else:
      layers[name] = {part: x * by for part, x in layers[name].items()}
  return params | {"layers": layers}


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "olmo2_biases", "phi3_partial", "gemma2"])
def test_channels_of_unequal_size_in_eight_bits(name, monkeypatch):
  config = cases.config(name)
  params, tokens, prompt = cases.random_params(config), random_tokens(2, 24), 20
  pairs = config.rope.frequencies(config.head_dim).size
  factors = np.where(np.arange(pairs) % 3 == 1, np.float32(64), np.float32(1))
  factors = np.concatenate([factors, factors, np.full(config.head_dim - 2 * pairs, 16, np.float32)])
  expected = whole_logits(models.definition(config), params, tokens)[:, prompt:]
  model = models.definition(config, models.Runtime(int8_cache=True))

  def error(params):
    @jax.jit
    def read(params):
      decoder = nnx.merge(model, params)
      _, cache = decoder.prefill(jnp.asarray(tokens[:, :prompt]))
      places = jnp.broadcast_to(jnp.arange(24), tokens.shape)
      view = models.CacheView(cache, places[:, :prompt])
      return decoder.logits(decoder.extend(jnp.asarray(tokens[:, prompt:]), places[:, prompt:], (view,))[0])

    return np.sqrt(np.mean((read(params) - expected) ** 2))

  even, of_uneven = error(params), error(uneven(config, params, factors))
  assert 0 < even < 0.05 * np.std(expected)
  assert of_uneven < 1.5 * even
  monkeypatch.setattr(transformer.Layer, "balance", staticmethod(lambda queries, keys, _: (queries, keys)))
  assert error(uneven(config, params, factors)) > 3 * even


# --- bfloat16 ---


def test_bfloat16_compute_keeps_float32_parameters():
  config, params = cases.loaded("qwen2")
  half = models.definition(config, models.Runtime(compute_dtype="bfloat16"))
  tokens = random_tokens(2, 24)
  positions = np.broadcast_to(np.arange(24), tokens.shape)

  @jax.jit
  def forward(params):
    decoder = nnx.merge(half, params)
    hidden = decoder(jnp.asarray(tokens), jnp.asarray(positions), jnp.ones_like(tokens))
    loss = -jnp.mean(decoder.logprobs(hidden[:, :-1], jnp.asarray(tokens[:, 1:]))[0])
    return loss, (hidden, decoder.logits(hidden))

  (_, (hidden, logits)), gradients = jax.value_and_grad(forward, has_aux=True)(params)
  cached, cache = extend(half, params, tokens, np.zeros(2, np.int32), empty_cache(config, 2, 24, jnp.bfloat16))
  assert {hidden.dtype, cache.keys.dtype, cache.values.dtype} == {jnp.dtype(jnp.bfloat16)}
  assert {logits.dtype, cached.dtype} == {jnp.dtype(jnp.float32)}
  expected = whole_logits(models.definition(config), params, tokens)
  scale = np.max(np.abs(expected))
  assert 0 < np.max(np.abs(logits - expected)) < 0.05 * scale
  np.testing.assert_allclose(cached, logits, atol=0.05 * scale)
  assert {x.dtype for x in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.float32)}
  assert all(np.all(np.isfinite(x)) and np.any(x) for x in jax.tree.leaves(gradients))


# --- log-probabilities ---


def logprobs_by_hand(head, hidden, targets, temperature):
  """Float64 log-probabilities of the targets and entropies."""
  logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T / temperature
  logits -= logits.max(axis=-1, keepdims=True)
  logps = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
  return np.take_along_axis(logps, np.asarray(targets)[..., None], -1)[..., 0], -np.sum(np.exp(logps) * logps, axis=-1)


@pytest.fixture
def heads():
  rng = np.random.default_rng(0)
  head, hidden = rng.normal(size=(VOCAB, 16)), rng.normal(size=(3, 7, 16))
  return jnp.asarray(head, jnp.float32), jnp.asarray(hidden, jnp.float32), jnp.asarray(random_tokens(3, 7))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk", [1, 4, 7, 21, 1024])
def test_token_logprobs(monkeypatch, heads, temperature, chunk):
  monkeypatch.setattr(logprobs, "CHUNK", chunk)  # 4 does not divide the 21 tokens
  logps, entropy = models.token_logprobs(*heads, temperature)
  assert (logps.dtype, entropy.dtype) == (jnp.float32, jnp.float32)
  expected, expected_entropy = logprobs_by_hand(*heads, temperature)
  np.testing.assert_allclose(logps, expected, atol=1e-5)
  np.testing.assert_allclose(entropy, expected_entropy, atol=3e-6)  # no digits lost to the size of the logits


@pytest.mark.parametrize(("cap", "known"), [(None, None), (3.0, None), (None, VOCAB - 5), (3.0, VOCAB - 5)])
def test_gradients_of_token_logprobs_are_those_of_the_formula(monkeypatch, heads, cap, known):
  """Of log-probabilities and entropies, differentiated by JAX where all logits are held."""
  monkeypatch.setattr(logprobs, "CHUNK", 4)
  head, hidden, targets = heads
  targets, used = jnp.minimum(targets, VOCAB - 6), jnp.arange(7) < 5

  def plain(head, hidden):
    logits = jnp.einsum("bcd,vd->bcv", hidden, head)
    logits = (logits if cap is None else cap * jnp.tanh(logits / cap)) / 0.6
    logps = jax.nn.log_softmax(logits[..., :known])
    return jnp.take_along_axis(logps, targets[..., None], -1)[..., 0], -jnp.sum(jnp.exp(logps) * logps, -1)

  def ours(head, hidden):
    return models.token_logprobs(head, hidden, targets, 0.6, cap, known_tokens=known, used=jnp.tile(used, (3, 1)))

  def gradients(function):
    def loss(head, hidden):
      logps, entropy = function(head, hidden)
      return jnp.sum(jnp.where(used, jnp.sin(logps) + jnp.cos(entropy), 0.0))

    return jax.jit(jax.grad(loss, argnums=(0, 1)))(head, hidden)

  for found, expected in zip(gradients(ours), gradients(plain), strict=True):
    assert np.max(np.abs(expected)) > 0.1
    np.testing.assert_allclose(found, expected, atol=2e-6 * np.max(np.abs(expected)))


@pytest.mark.parametrize("wide", [False, True])
def test_gradients_of_a_linear_layer(wide):
  """Whichever side is the narrower, and with several axes on either."""
  rng = np.random.default_rng(0)
  sizes = (2, 3) if wide else (5, 7)
  x, weight = rng.normal(size=(4, 6, *sizes)), rng.normal(size=(*sizes, 3, 4))
  x, weight = jnp.asarray(x, jnp.float32), jnp.asarray(weight, jnp.float32)

  def gradients(function):
    return jax.grad(lambda x, weight: jnp.sum(jnp.sin(function(x, weight))), argnums=(0, 1))(x, weight)

  expected = gradients(lambda x, weight: jnp.tensordot(x, weight, axes=2))
  for found, exact in zip(gradients(functools.partial(transformer._multiply, 2)), expected, strict=True):
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_gradients_of_token_logprobs_do_not_depend_on_chunks(monkeypatch, heads, temperature):
  head, hidden, targets = heads
  weights = np.random.default_rng(1).normal(size=(2, 3, 7)).astype(np.float32)

  def chunked(head, hidden):
    logps, entropy = models.token_logprobs(head, hidden, targets, temperature)
    return jnp.sum(weights[0] * logps + weights[1] * entropy)

  def direct(head, hidden):
    logps = jax.nn.log_softmax(hidden @ head.T / temperature)
    entropy = -jnp.sum(jnp.exp(logps) * logps, axis=-1)
    return jnp.sum(
      weights[0] * jnp.take_along_axis(logps, np.asarray(targets)[..., None], -1)[..., 0] + weights[1] * entropy
    )

  expected = jax.grad(direct, argnums=(0, 1))(head, hidden)
  monkeypatch.setattr(logprobs, "CHUNK", 4)
  found = jax.grad(chunked, argnums=(0, 1))(head, hidden)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), found, expected)


def test_huge_logits_stay_finite():
  head, hidden = jnp.eye(4), jnp.array([[[1e4, 0, 0, 0]]])
  for target, expected in ((0, 0.0), (1, -1e4)):
    logps, entropy = models.token_logprobs(head, hidden, jnp.array([[target]]))
    np.testing.assert_allclose(logps, [[expected]], rtol=1e-6)
    np.testing.assert_array_equal(entropy, [[0.0]])


def test_soft_cap_of_token_logprobs(heads):
  """By hand: cap * tanh(logits / cap), and the temperature after it."""
  head, hidden, targets = heads
  logits = 5 * np.tanh(np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T / 5)
  expected, expected_entropy = logprobs_by_hand(np.eye(VOCAB), logits, targets, 0.6)
  logps, entropy = models.token_logprobs(head, hidden, targets, 0.6, cap=5.0)
  np.testing.assert_allclose(logps, expected, atol=1e-5)
  np.testing.assert_allclose(entropy, expected_entropy, atol=3e-6)


# --- memory and size of the compiled update ---

SETTINGS = UpdateSettings(0.8, clip_low=0.2, clip_high=0.27, entropy_coefficient=0.1, micro_batch_rows=8)
OPTIMIZER = clipped_optimizer("adamw", 1e-6, weight_decay=0.01, max_grad_norm=1.0)


def abstract_rows(rows, length):
  dtypes = (jnp.int32, jnp.int32, jnp.int32, jnp.bool_, jnp.float32, jnp.float32, jnp.float32)
  return PackedRows(*(jax.ShapeDtypeStruct((rows, length), dtype) for dtype in dtypes))


def lower_update(config, rows, dtype="float32", settings=SETTINGS):
  settings = dataclasses.replace(settings, micro_batch_rows=rows.tokens.shape[0])
  model = models.definition(config, models.Runtime(compute_dtype=dtype))
  params = models.abstract_params(config)
  state = jax.eval_shape(OPTIMIZER.init, params)
  return optimizer_step.lower(UpdateProgram(model, OPTIMIZER, settings), {}, Trainable(params, state), rows)


def temporary_bytes(lowered):
  return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory_of_the_update_does_not_grow_with_tokens_times_vocabulary(monkeypatch):
  """Twice the tokens and twice the vocabulary: less than one more array of [tokens, vocabulary] would take."""
  config = models.ModelConfig(4096, 16, 16, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=16)
  rows, length = 64, 32  # short rows: the scores of attention are small beside what is measured
  wide = dataclasses.replace(config, vocab_size=2 * config.vocab_size)
  every_logit = 4 * (2 * rows) * length * wide.vocab_size  # bytes
  monkeypatch.setattr(logprobs, "CHUNK", 128)

  def grown(settings):
    many = lower_update(wide, abstract_rows(2 * rows, length), settings=settings)
    few = lower_update(config, abstract_rows(rows, length), settings=settings)
    return temporary_bytes(many) - temporary_bytes(few)

  def all_at_once(self, hidden, targets, temperature=1.0):
    logps = jax.nn.log_softmax(self.logits(hidden) / temperature)
    entropy = -jnp.sum(jnp.exp(logps) * logps, axis=-1)
    return jnp.take_along_axis(logps, targets[..., None], axis=-1)[..., 0], entropy

  assert grown(SETTINGS) < 0.25 * every_logit
  monkeypatch.setattr(models.Decoder, "logprobs", all_at_once)
  # The measure sees such an array where there is one; 3/4 of it is the growth. Other settings, to be traced anew.
  assert grown(dataclasses.replace(SETTINGS, clip_high=0.28)) > 0.75 * every_logit


def test_remat_policies_keep_less_and_give_the_same_gradients():
  config = dataclasses.replace(cases.config("gemma2"), num_layers=8, windowed=(True, False) * 4)
  params, rows = cases.random_params(config), abstract_rows(8, 64)
  random = np.random.default_rng(0)
  values = PackedRows(
    tokens=random.integers(0, config.vocab_size, (8, 64)).astype(np.int32),
    positions=np.broadcast_to(np.arange(64, dtype=np.int32), (8, 64)),
    segment_ids=np.ones((8, 64), np.int32),
    mask=np.ones((8, 64), bool),
    old_logprobs=np.full((8, 64), -4.5, np.float32),
    advantages=random.normal(size=(8, 64)).astype(np.float32),
    weights=np.full((8, 64), 1 / 512, np.float32),
  )
  gradients, sizes = {}, {}
  for remat in ("none", "dots", "full"):
    model = models.definition(config, models.Runtime(remat=remat))
    gradient = jax.jit(jax.grad(lambda params, rows, model=model: loss(model, params, rows, SETTINGS)[0]))
    compiled = gradient.lower(params, rows).compile()
    gradients[remat], sizes[remat] = compiled(params, values), compiled.memory_analysis().temp_size_in_bytes
  largest = max(np.max(np.abs(x)) for x in jax.tree.leaves(gradients["none"]))
  assert largest > 1e-2
  # A policy moves fusions, and with them the order of sums over the tokens. Such a sum in float32 is off by about the
  # root of its length times eps / 2 (Higham and Mary, 2019), each of the two that are compared.
  apart = np.sqrt(rows.tokens.size) * np.finfo(np.float32).eps
  for remat in ("dots", "full"):
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, atol=apart * largest, rtol=0), gradients[remat], gradients["none"]
    )
  assert sizes["full"] < 0.8 * sizes["dots"]
  assert sizes["dots"] < 0.8 * sizes["none"]


def test_program_of_a_7b_update_does_not_grow_with_its_layers():
  """Qwen2.5-7B's sizes, traced and lowered from shapes alone; docs/models.md has the seconds."""
  texts = []
  for layers in (28, 56):
    config = dataclasses.replace(shapes.QWEN2_5_7B, num_layers=layers)
    lowered = lower_update(config, abstract_rows(8, 1024), "bfloat16")
    texts.append(lowered.as_text())
  assert "tensor<28x3584x28x128xf32>" in texts[0]
  assert "tensor<56x3584x28x128xf32>" in texts[1]
  assert texts[0].count("\n") == texts[1].count("\n")
