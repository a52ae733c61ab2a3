"""The policy: one decoder that trains, samples and scores.

Layers are stacked along a leading axis and scanned, so 28 layers compile as one. The forward pass has three forms, and
they give the same numbers:
  - calling the decoder, over whole packed rows (training);
  - `prefill`, over prompts, into a new key/value cache;
  - `extend`, over the next few tokens of each row of a cache: one when decoding, some when scoring a reference answer.
In the cache, slot s of a row holds the token at position s. Tokens from position p on see the slots before p; a slot
beyond is unwritten or stale, and is overwritten before anything may see it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from rlpr_jax.models.attention import attend, rotate, segment_mask
from rlpr_jax.models.config import ModelConfig

Params = dict  # nested dictionary of arrays, as `nnx.split` and `nnx.to_pure_dict` give it


class KVCache(NamedTuple):
  """Keys (rotated) and values of every layer."""

  keys: Float[Array, "L B K S H"]
  values: Float[Array, "L B K S H"]


def empty_cache(config: ModelConfig, batch: int, length: int) -> KVCache:
  """A cache with `length` slots a row, in the compute dtype."""
  shape = (config.num_layers, batch, config.num_kv_heads, length, config.head_dim)
  return KVCache(jnp.zeros(shape, config.compute_dtype), jnp.zeros(shape, config.compute_dtype))


class RMSNorm(nnx.Module):
  """x / rms(x) * scale, computed in float32."""

  def __init__(self, size: int, eps: float):
    self.scale = nnx.Param(jnp.ones(size))
    self.eps = eps

  def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
    return (wide * self.scale[...]).astype(x.dtype)


class Layer(nnx.Module):
  """Pre-norm attention and SwiGLU."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    c = self.config = config

    def weight(*shape: int, fan_in: int) -> nnx.Param:
      return nnx.Param(jax.random.normal(rngs.params(), shape) * fan_in**-0.5)

    self.attention_norm = RMSNorm(c.embed_dim, c.norm_eps)
    self.query = weight(c.embed_dim, c.num_heads, c.head_dim, fan_in=c.embed_dim)
    self.key = weight(c.embed_dim, c.num_kv_heads, c.head_dim, fan_in=c.embed_dim)
    self.value = weight(c.embed_dim, c.num_kv_heads, c.head_dim, fan_in=c.embed_dim)
    self.out = weight(c.num_heads, c.head_dim, c.embed_dim, fan_in=c.num_heads * c.head_dim)
    if c.qkv_bias:
      self.query_bias = nnx.Param(jnp.zeros((c.num_heads, c.head_dim)))
      self.key_bias = nnx.Param(jnp.zeros((c.num_kv_heads, c.head_dim)))
      self.value_bias = nnx.Param(jnp.zeros((c.num_kv_heads, c.head_dim)))
    if c.qk_norm:
      self.query_norm = RMSNorm(c.head_dim, c.norm_eps)
      self.key_norm = RMSNorm(c.head_dim, c.norm_eps)
    self.mlp_norm = RMSNorm(c.embed_dim, c.norm_eps)
    self.gate = weight(c.embed_dim, c.mlp_dim, fan_in=c.embed_dim)
    self.up = weight(c.embed_dim, c.mlp_dim, fan_in=c.embed_dim)
    self.down = weight(c.mlp_dim, c.embed_dim, fan_in=c.mlp_dim)

  def project(self, x, positions):
    """Rotated queries [B, T, N, H], rotated keys and values [B, T, K, H] of normed input [B, T, D]."""
    dtype = x.dtype
    queries = jnp.einsum("btd,dnh->btnh", x, self.query[...].astype(dtype))
    keys = jnp.einsum("btd,dkh->btkh", x, self.key[...].astype(dtype))
    values = jnp.einsum("btd,dkh->btkh", x, self.value[...].astype(dtype))
    if self.config.qkv_bias:
      queries += self.query_bias[...].astype(dtype)
      keys += self.key_bias[...].astype(dtype)
      values += self.value_bias[...].astype(dtype)
    if self.config.qk_norm:
      queries, keys = self.query_norm(queries), self.key_norm(keys)
    theta = self.config.rope_theta
    return rotate(queries, positions, theta), rotate(keys, positions, theta), values

  def mix(self, x, attended):
    """Adds the attention's output and the MLP to the residual stream x [B, T, D]."""
    dtype = x.dtype
    x = x + jnp.einsum("btnh,nhd->btd", attended, self.out[...].astype(dtype))
    h = self.mlp_norm(x)
    h = jax.nn.silu(h @ self.gate[...].astype(dtype)) * (h @ self.up[...].astype(dtype))
    return x + h @ self.down[...].astype(dtype)


class Decoder(nnx.Module):
  """A decoder-only transformer. See the module's docstring for its two forms."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.config = config
    size = (config.vocab_size, config.embed_dim)
    self.embedding = nnx.Param(jax.random.normal(rngs.params(), size) * config.embed_dim**-0.5)
    make = nnx.vmap(lambda rngs: Layer(config, rngs=rngs), in_axes=0, out_axes=0)
    self.layers = nnx.split_rngs(splits=config.num_layers)(make)(rngs)
    self.final_norm = RMSNorm(config.embed_dim, config.norm_eps)
    if not config.tie_embeddings:
      self.head = nnx.Param(jax.random.normal(rngs.params(), size) * config.embed_dim**-0.5)

  def __call__(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]):
    """Hidden states [B, T, D] of packed rows, normed, ready for the head.

    Backwards, the outputs of the weights' matrix products are kept and everything else is computed again.
    """
    mask = segment_mask(segment_ids)
    definition, stacked = nnx.split(self.layers)

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    def body(x, weights):
      layer = nnx.merge(definition, weights)
      queries, keys, values = layer.project(layer.attention_norm(x), positions)
      return layer.mix(x, attend(queries, keys, values, mask)), None

    x, _ = jax.lax.scan(body, self._embed(tokens), stacked)
    return self.final_norm(x)

  def prefill(self, tokens: Int[Array, "B T"], capacity: int) -> tuple[Float[Array, "B T D"], KVCache]:
    """Hidden states of rows read from their beginning, and a cache of `capacity` slots that holds them."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, new = self._read(tokens, positions, None)
    pad = [(0, 0), (0, 0), (0, 0), (0, capacity - tokens.shape[1]), (0, 0)]
    return hidden, jax.tree.map(lambda x: jnp.pad(x.swapaxes(2, 3), pad), new)

  def extend(
    self, tokens: Int[Array, "B T"], starts: Int[Array, "B"], cache: KVCache
  ) -> tuple[Float[Array, "B T D"], KVCache]:
    """Hidden states of the next T tokens of each row, and the cache with them written in.

    Args:
      starts: the position of each row's first token here; it sees the slots before that, and no others.
      cache: positions at or beyond its length are not written.
    """
    positions = starts[:, None] + jnp.arange(tokens.shape[1])
    hidden, new = self._read(tokens, positions, cache)
    rows = jnp.arange(tokens.shape[0])[:, None]

    def write(old: Float[Array, "L B K S H"], new: Float[Array, "L B T K H"]) -> Float[Array, "L B K S H"]:
      return old.at[:, rows, :, positions].set(new.transpose(1, 2, 0, 3, 4), mode="drop")

    return hidden, jax.tree.map(write, cache, new)

  def _read(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], cache: KVCache | None):
    """Hidden states, and the tokens' keys and values as a `KVCache` of [L, B, T, K, H].

    The cache is read layer by layer and written by the caller, once: carried through the scan it would be copied.
    """
    mask = segment_mask(jnp.ones((1, tokens.shape[1]), jnp.int32))
    definition, stacked = nnx.split(self.layers)

    def body(x, scanned):
      weights, cached = scanned
      layer = nnx.merge(definition, weights)
      queries, keys, values = layer.project(layer.attention_norm(x), positions)
      if cached is not None:
        filled = jnp.arange(cached.keys.shape[2]) < positions[:, :1]
        cached = (cached.keys, cached.values, filled)
      return layer.mix(x, attend(queries, keys, values, mask, cached)), KVCache(keys, values)

    x, new = jax.lax.scan(body, self._embed(tokens), (stacked, cache))
    return self.final_norm(x), new

  def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Float32 logits. For whole sequences take `logprobs.token_logprobs`, which never holds them all."""
    return jnp.einsum(
      "...d,vd->...v", hidden, self.head_matrix.astype(hidden.dtype), preferred_element_type=jnp.float32
    )

  @property
  def head_matrix(self) -> Float[Array, "V D"]:
    return self.embedding[...] if self.config.tie_embeddings else self.head[...]

  def _embed(self, tokens):
    return self.embedding[...][tokens].astype(self.config.compute_dtype)


def definition(config: ModelConfig) -> nnx.GraphDef:
  """The static half of a decoder; with its parameters, `nnx.merge(definition, params)` is the module again."""
  return nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))[0]


def init_params(config: ModelConfig, seed: int) -> Params:
  """Random float32 parameters."""
  return nnx.to_pure_dict(nnx.split(Decoder(config, rngs=nnx.Rngs(seed)))[1])


def abstract_params(config: ModelConfig) -> Params:
  """Shapes and dtypes of `init_params`, without computing anything."""
  return nnx.to_pure_dict(nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))[1])
