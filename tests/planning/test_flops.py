"""Counted operations against counts by hand."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from rlpr_jax.models import UNSEEN, CacheView
from rlpr_jax.planning import flops

B, T, S = 2, 5, 7  # rows, tokens read, tokens in the cache


def ones(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def ids(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.int32)


def test_a_product_takes_two_operations_an_element_and_term():
  assert flops.count(jnp.dot, ones(3, 4), ones(4, 5)) == 2 * 3 * 4 * 5
  assert flops.count(functools.partial(jnp.einsum, "bij,bkj->bik"), ones(6, 3, 4), ones(6, 5, 4)) == 6 * 2 * 3 * 4 * 5
  assert flops.count(jnp.add, ones(3, 4), ones(3, 4)) == 0


def test_a_loop_counts_as_often_as_it_runs():
  def loop(x, w):
    return jax.lax.scan(lambda x, _: (x @ w, None), x, length=7)[0]

  def nested(x, w):
    return jax.lax.fori_loop(0, 3, lambda _, x: jax.jit(loop)(x, w), x)

  assert flops.count(loop, ones(3, 4), ones(4, 4)) == 7 * 2 * 3 * 4 * 4
  assert flops.count(nested, ones(3, 4), ones(4, 4)) == 3 * 7 * 2 * 3 * 4 * 4


def test_a_loop_of_unknown_length():
  def search(x, w):
    return jax.lax.while_loop(lambda x: jnp.sum(x) < 9, lambda x: x @ w, x)

  with pytest.raises(ValueError, match="while"):
    flops.count(search, ones(3, 4), ones(4, 4))
  assert flops.count(lambda x: jax.lax.while_loop(lambda x: x < 9, lambda x: x + 1, x), ones()) == 0


def test_a_branch_is_its_dearest_side():
  def branch(x, w):
    return jax.lax.cond(jnp.sum(x) > 0, lambda: x, lambda: x @ w)

  assert flops.count(branch, ones(3, 4), ones(4, 4)) == 2 * 3 * 4 * 4


def of_layers(config, tokens, seen):
  """`tokens` in all rows, each compared with `seen` others."""
  heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
  weights = config.embed_dim * (2 * heads * head_dim + 2 * kv_heads * head_dim + 3 * config.mlp_dim)
  return config.num_layers * tokens * (2 * weights + 4 * heads * head_dim * seen)


def test_a_decoder(policy):
  config = policy.config
  with_head = 2 * B * T * config.embed_dim * config.vocab_size

  def prefill(params, tokens):
    return nnx.merge(policy.model, params).prefill(tokens)

  def train(params, tokens):
    decoder = nnx.merge(policy.model, params)
    positions = jnp.broadcast_to(jnp.arange(T), tokens.shape)
    return decoder.logprobs(decoder(tokens, positions, jnp.ones_like(tokens)), tokens)

  def extend(params, tokens):
    decoder = nnx.merge(policy.model, params)
    text = CacheView(decoder.empty_cache(B, S + 4), jnp.full((B, S), UNSEEN))
    return decoder.extend(tokens, jnp.broadcast_to(jnp.arange(T), tokens.shape), (text,))

  assert flops.count(prefill, policy.params, ids(B, T)) == of_layers(config, B * T, T)
  assert flops.count(train, policy.params, ids(B, T)) == of_layers(config, B * T, T) + with_head
  assert flops.count(extend, policy.params, ids(B, T)) == of_layers(config, B * T, T + S)
