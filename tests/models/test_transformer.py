"""The decoder against transformers in torch, and against itself: packed, padded, cached, in bfloat16."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from rlpr_jax import models
from rlpr_jax.models import logprobs

torch.set_num_threads(1)  # its threads spin while they wait, which is slow beside those of jax
VOCAB = 64
FAMILIES = {
  # Grouped queries, a head that is not embed_dim / heads, own head, odd numbers for what has a default.
  "llama": transformers.LlamaConfig(
    hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
    head_dim=12, vocab_size=VOCAB, rms_norm_eps=1e-3, rope_parameters={"rope_type": "default", "rope_theta": 500.0},
  ),
  "llama_tied": transformers.LlamaConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
    vocab_size=VOCAB, tie_word_embeddings=True,
  ),
  "qwen2": transformers.Qwen2Config(
    hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3,
    vocab_size=VOCAB, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
  ),
  "qwen2_tied": transformers.Qwen2Config(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=1,
    vocab_size=VOCAB, tie_word_embeddings=True,
  ),
}  # fmt: skip


@functools.cache
def torch_model(name):
  """A random model in float32 in which nothing is left at one or zero, neither norms nor biases."""
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_config(FAMILIES[name], attn_implementation="eager").eval()
  for parameter_name, parameter in model.named_parameters():
    offset = 1.0 if "norm" in parameter_name else 0.0
    scale = 0.3 if parameter.ndim == 1 else parameter.shape[1] ** -0.5
    parameter.data = offset + scale * torch.randn(parameter.shape)
  model.tie_weights()
  return model


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
  """Saves a random model as transformers does and loads it as we do: (config, params)."""

  @functools.cache
  def save(name, max_shard_size="1GB"):
    directory = tmp_path_factory.mktemp(name)
    torch_model(name).save_pretrained(directory, max_shard_size=max_shard_size)
    return directory, *models.load_pretrained(str(directory))

  return save


@functools.partial(jax.jit, static_argnums=0)
def compute_logits(config, params, tokens, positions, segment_ids):
  decoder = nnx.merge(models.definition(config), params)
  return decoder.logits(decoder(tokens, positions, segment_ids))


def full_logits(config, params, tokens, positions=None, segment_ids=None):
  positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape) if positions is None else positions
  segment_ids = np.ones_like(tokens) if segment_ids is None else segment_ids
  return np.asarray(compute_logits(config, params, tokens, positions, segment_ids))


@functools.partial(jax.jit, static_argnums=(0, 3))
def prefill(config, params, tokens, capacity):
  """Logits and cache."""
  decoder = nnx.merge(models.definition(config), params)
  hidden, cache = decoder.prefill(tokens, capacity)
  return decoder.logits(hidden), cache


@functools.partial(jax.jit, static_argnums=0)
def extend(config, params, tokens, starts, cache):
  """Logits and cache."""
  decoder = nnx.merge(models.definition(config), params)
  hidden, cache = decoder.extend(tokens, starts, cache)
  return decoder.logits(hidden), cache


def random_tokens(*shape, seed=0):
  return np.random.default_rng(seed).integers(0, VOCAB, shape).astype(np.int32)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(saved, name):
  _, config, params = saved(name)
  assert config.tie_embeddings == ("head" not in params) == name.endswith("tied")
  tokens = random_tokens(3, 40)
  with torch.no_grad():
    expected = torch_model(name)(torch.tensor(tokens)).logits.numpy()
  found = full_logits(config, params, tokens)
  assert found.dtype == np.float32
  assert np.std(expected) > 0.5
  np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen2_tied"])
def test_shards_hold_the_same_parameters_as_one_file(saved, name):
  directory, config, params = saved(name, max_shard_size="20KB")
  assert len(list(directory.glob("model-*.safetensors"))) > 2
  assert not (directory / "model.safetensors").exists()
  _, single_config, single_params = saved(name)
  assert config == single_config
  jax.tree.map(np.testing.assert_array_equal, params, single_params)


def test_parameters_have_the_form_of_new_ones(saved):
  for name in FAMILIES:
    _, config, params = saved(name)
    found, abstract = (
      jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (params, models.abstract_params(config))
    )
    assert found == abstract
  new = models.init_params(config, 0)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == abstract
  assert {x.dtype for x in jax.tree.leaves(new)} == {jnp.dtype(jnp.float32)}


def test_load_in_bfloat16(saved):
  directory, _, params = saved("qwen2")
  _, half = models.load_pretrained(str(directory), dtype=jnp.bfloat16)
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(x.astype(jnp.bfloat16), y), params, half)
  assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("name", ["llama", "qwen2_tied"])
def test_gradients_are_those_of_torch(saved, name):
  """Of the mean loss of the next token, by the embedding (which may be the head as well) and by inner weights."""
  _, config, params = saved(name)
  tokens = random_tokens(2, 24)
  model = torch_model(name)
  model.zero_grad()
  logits = model(torch.tensor(tokens)).logits[:, :-1]
  torch.nn.functional.cross_entropy(
    logits.reshape(-1, VOCAB), torch.tensor(tokens[:, 1:]).long().reshape(-1)
  ).backward()

  def loss(params):
    decoder = nnx.merge(models.definition(config), params)
    positions = jnp.broadcast_to(jnp.arange(24), tokens.shape)
    hidden = decoder(jnp.asarray(tokens), positions, jnp.ones_like(tokens))
    return -jnp.mean(models.token_logprobs(decoder.head_matrix, hidden[:, :-1], jnp.asarray(tokens[:, 1:]))[0])

  found = jax.jit(jax.grad(loss))(params)
  layer = model.model.layers[1]
  pairs = [
    (found["embedding"], model.model.embed_tokens.weight),
    (found["final_norm"]["scale"], model.model.norm.weight),
    (found["layers"]["key"][1].reshape(config.embed_dim, -1).T, layer.self_attn.k_proj.weight),
    (found["layers"]["out"][1].reshape(-1, config.embed_dim).T, layer.self_attn.o_proj.weight),
    (found["layers"]["down"][1].T, layer.mlp.down_proj.weight),
  ]
  if config.qkv_bias:
    pairs.append((found["layers"]["query_bias"][1].reshape(-1), layer.self_attn.q_proj.bias))
  for ours, theirs in pairs:
    theirs = theirs.grad.numpy()
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.max(np.abs(theirs)) + 1e-8)


# --- packed rows ---


def pack(sequences, length):
  """One row of tokens, positions and segment ids."""
  tokens, positions, segment_ids = (np.zeros((1, length), np.int32) for _ in range(3))
  start = 0
  for segment, sequence in enumerate(sequences, start=1):
    end = start + len(sequence)
    tokens[0, start:end], positions[0, start:end] = sequence, np.arange(len(sequence))
    segment_ids[0, start:end] = segment
    start = end
  return tokens, positions, segment_ids


def test_sequences_packed_into_one_row_are_as_if_alone(policy):
  lengths = (5, 9, 1, 9)
  sequences = [random_tokens(n, seed=n) for n in lengths]
  found = full_logits(policy.config, policy.params, *pack(sequences, 30))[0]
  alone = [full_logits(policy.config, policy.params, sequence[None])[0] for sequence in sequences]
  np.testing.assert_allclose(found[:24], np.concatenate(alone), atol=1e-5)
  assert np.all(np.isfinite(found))  # on padding too


def test_other_segments_and_later_tokens_cannot_be_seen(policy):
  def logits(sequences):
    return full_logits(policy.config, policy.params, *pack(sequences, 16))[0]

  first, second = (random_tokens(n, seed=n) for n in (6, 8))
  before = logits([first, second])
  np.testing.assert_array_equal(logits([random_tokens(6, seed=50), second])[6:14], before[6:14])
  after = logits([first, np.concatenate([second[:5], random_tokens(3, seed=51)])])
  np.testing.assert_array_equal(after[:11], before[:11])
  assert np.max(np.abs(after[11:14] - before[11:14])) > 0.1


def test_the_amount_and_the_content_of_padding_change_nothing(policy):
  sequence = random_tokens(9)
  expected = full_logits(policy.config, policy.params, sequence[None])[0]
  for length in (16, 30):
    tokens, positions, segment_ids = pack([sequence], length)
    for padding in (0, 7):
      tokens[0, 9:] = padding
      found = full_logits(policy.config, policy.params, tokens, positions, segment_ids)[0, :9]
      np.testing.assert_allclose(found, expected, atol=1e-5)


def test_every_layer_runs_in_its_turn(policy):
  tokens = random_tokens(1, 9)
  swapped = policy.params | {"layers": jax.tree.map(lambda x: x[::-1], policy.params["layers"])}
  difference = full_logits(policy.config, swapped, tokens) - full_logits(policy.config, policy.params, tokens)
  assert np.max(np.abs(difference)) > 0.1


# --- cache ---


def cached_logits(config, params, tokens, lengths, prompt_lengths, width, capacity):
  """Logits [B, T, V] from one prefill of `width` padded slots, then one token at a time, each row at its own pace."""
  rows = np.arange(len(tokens))
  prompts = np.where(np.arange(width) < prompt_lengths[:, None], tokens[:, :width], 3)
  out = np.zeros((*tokens.shape, config.vocab_size), np.float32)
  out[:, :width], cache = prefill(config, params, prompts, capacity)
  for step in range(int(np.max(lengths - prompt_lengths))):
    places = np.minimum(prompt_lengths + step, lengths - 1)  # a row that is done reads its last token again
    logits, cache = extend(config, params, tokens[rows, places][:, None], places, cache)
    out[rows, places] = logits[:, 0]
  return out


@pytest.mark.parametrize(
  ("name", "width", "capacity"), [("tiny", 9, 20), ("tiny", 14, 33), ("llama", 9, 20), ("qwen2", 14, 33)]
)
def test_prefill_and_decode_are_the_full_forward_pass(saved, policy, name, width, capacity):
  config, params = (policy.config, policy.params) if name == "tiny" else saved(name)[1:]
  tokens, lengths, prompt_lengths = random_tokens(3, 20), np.array([20, 13, 17]), np.array([6, 9, 1])
  expected = full_logits(config, params, tokens)
  found = cached_logits(config, params, tokens, lengths, prompt_lengths, width, capacity)
  for row, end in enumerate(lengths):
    np.testing.assert_allclose(found[row, :end], expected[row, :end], atol=1e-4)


def test_some_tokens_at_once_on_top_of_a_cache(policy):
  """Scoring a suffix: several tokens, at a place of its own in each row, over what stood there before."""
  tokens, starts, suffix = random_tokens(3, 16), np.array([5, 12, 0]), random_tokens(3, 4, seed=9)
  _, cache = prefill(policy.config, policy.params, tokens, 18)
  found, _ = extend(policy.config, policy.params, suffix, starts, cache)
  spliced = tokens.copy()
  for row, start in enumerate(starts):
    spliced[row, start : start + 4] = suffix[row]
  expected = full_logits(policy.config, policy.params, spliced)
  for row, start in enumerate(starts):
    np.testing.assert_allclose(found[row], expected[row, start : start + 4], atol=1e-4)


def test_an_empty_cache_extended_is_a_prefill(policy):
  tokens = random_tokens(2, 6)
  expected, expected_cache = prefill(policy.config, policy.params, tokens, 8)
  empty = models.empty_cache(policy.config, 2, 8)
  found, cache = extend(policy.config, policy.params, tokens, np.zeros(2, np.int32), empty)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), cache, expected_cache)


def test_positions_beyond_the_cache_are_not_written(policy):
  """Nor do they push out what is in it."""
  tokens, starts = random_tokens(1, 6), np.zeros(1, np.int32)
  _, expected = prefill(policy.config, policy.params, tokens[:, :4], 4)
  _, cache = extend(policy.config, policy.params, tokens, starts, models.empty_cache(policy.config, 1, 4))
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), cache, expected)


# --- bfloat16 ---


def test_bfloat16_compute_keeps_float32_parameters(saved):
  _, config, params = saved("qwen2")
  half = dataclasses.replace(config, compute_dtype="bfloat16")
  tokens = random_tokens(2, 24)
  positions = np.broadcast_to(np.arange(24), tokens.shape)

  @jax.jit
  def forward(params):
    decoder = nnx.merge(models.definition(half), params)
    hidden = decoder(jnp.asarray(tokens), jnp.asarray(positions), jnp.ones_like(tokens))
    loss = -jnp.mean(models.token_logprobs(decoder.head_matrix, hidden[:, :-1], jnp.asarray(tokens[:, 1:]))[0])
    return loss, (hidden, decoder.logits(hidden))

  (_, (hidden, logits)), gradients = jax.value_and_grad(forward, has_aux=True)(params)
  cached, cache = extend(half, params, tokens, np.zeros(2, np.int32), models.empty_cache(half, 2, 24))
  assert {hidden.dtype, cache.keys.dtype, cache.values.dtype} == {jnp.dtype(jnp.bfloat16)}
  assert {logits.dtype, cached.dtype} == {jnp.dtype(jnp.float32)}
  expected = full_logits(config, params, tokens)
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
  head, hidden = jnp.eye(4), jnp.array([[1e4, 0, 0, 0]])
  for target, expected in ((0, 0.0), (1, -1e4)):
    logps, entropy = models.token_logprobs(head, hidden, jnp.array([target]))
    np.testing.assert_allclose(logps, [expected], rtol=1e-6)
    np.testing.assert_array_equal(entropy, [0.0])


def test_memory_of_the_gradient_does_not_grow_with_tokens_times_vocabulary():
  vocab, dim = 8192, 8

  def temporary_bytes(tokens):
    def loss(head, hidden, targets):
      logps, entropy = models.token_logprobs(head, hidden, targets)
      return jnp.sum(logps) + jnp.sum(entropy)

    shapes = [((vocab, dim), jnp.float32), ((tokens, dim), jnp.float32), ((tokens,), jnp.int32)]
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  few, many = 2 * logprobs.CHUNK, 16 * logprobs.CHUNK
  chunk = logprobs.CHUNK * vocab * 4
  assert chunk <= temporary_bytes(few) < 8 * chunk  # the measure does see the logits of a chunk
  assert temporary_bytes(many) - temporary_bytes(few) < 0.5 * chunk  # [tokens, vocabulary] would be 14 chunks more
