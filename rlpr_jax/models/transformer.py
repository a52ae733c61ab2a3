"""The policy: one decoder that trains, samples and scores.

Layers are stacked along a leading axis and scanned, so 28 layers compile as one. The forward pass has three forms, and
they give the same numbers:
  - calling the decoder, over whole packed rows (training);
  - `prefill`, over prompts, which gives their keys and values;
  - `extend`, over a few tokens of each row that follow what parts of a cache hold: one when decoding, some when scoring
    a reference answer. It reads the cache and writes nothing.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Shaped

from rlpr_jax.errors import SettingError
from rlpr_jax.models import ragged
from rlpr_jax.models.attention import Cached, attend, rotate, softcap
from rlpr_jax.models.blockwise import RESIDUALS
from rlpr_jax.models.config import ModelConfig, Reader, Runtime, choose_reader
from rlpr_jax.models.kernels import AttentionSettings
from rlpr_jax.models.logprobs import drop_unknown, token_logprobs
from rlpr_jax.models.masks import UNSEEN, Places
from rlpr_jax.models.ragged import Quantized
from rlpr_jax.models.weights import WEIGHTS, axis_sizes, key_path, param_axes
from rlpr_jax.sharding import Sharding, fit
from rlpr_jax.types import AnyArray, Params

Tokens = Int[AnyArray, "B T"]  # ids of tokens, or of their places or segments
_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "silu": jax.nn.silu,
  "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}
KeyPath = tuple[jax.tree_util.DictKey, ...]
_REMAT = {
  "none": jax.checkpoint_policies.everything_saveable,
  "dots": jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(RESIDUALS),
  ),
  "full": jax.checkpoint_policies.nothing_saveable,
}


class KVCache(NamedTuple):
  """Keys (rotated) and values of every layer, in the compute dtype or `Quantized`; S tokens.

  Both lie as plain XLA's products of attention take them: queries times keys, and weights times values. Where a kernel
  reads texts, values lie as keys do, [L, B, K, H, S]: whole registers of a TPU are of tokens then, whatever the size of
  a head is (`Decoder.value_axis`).
  """

  keys: Float[Array, "L B K H S"] | Quantized
  values: Float[Array, "L B K S H"] | Float[Array, "L B K H S"] | Quantized

  def map(self, function: Callable[..., jax.Array], *others: "KVCache", value_axis: int = 3) -> "KVCache":
    """`function(axis, x, *others)` of each array and those of other caches in its place; `axis` is that of tokens.

    Args:
      value_axis: that of tokens in the values.
    """
    return KVCache(
      *(
        jax.tree.map(functools.partial(function, axis), *parts)
        for axis, parts in zip((4, value_axis), zip(self, *others, strict=True), strict=True)
      )
    )

  @property
  def rows(self) -> int:
    return jax.tree.leaves(self)[0].shape[1]


class Text(NamedTuple):
  """What rows of a cache hold from their first slot on, as `Decoder.extend` reads it."""

  cache: KVCache
  lengths: Int[Array, "B"]  # tokens of each row that may be seen
  longest: int  # of all rows; plain XLA reads so much of each
  rows: Int[AnyArray, "B"] | None = None  # of the cache; None for the first B, on a mesh of each part

  def view(self) -> "CacheView":
    """The same for plain XLA."""
    places = jnp.arange(self.longest)
    return CacheView(self.cache, jnp.where(places < self.lengths[:, None], places, UNSEEN), self.rows)

  def numbers(self, num_shards: int) -> Int[AnyArray, "B"]:
    """The rows' numbers, where the cache's rows are split so many ways."""
    if self.rows is not None:
      return self.rows
    first = np.arange(num_shards)[:, None] * (self.cache.rows // num_shards)
    return (first + np.arange(self.lengths.size // num_shards)).ravel()


class CacheView(NamedTuple):
  """Some tokens of a cache, as `Decoder.extend` reads them."""

  cache: KVCache
  positions: Int[Array, "B S"]  # of the tokens in the first S slots of a row; UNSEEN where there is none
  rows: Int[AnyArray, "B"] | None = None  # of the cache that are read; None for the first B, on a mesh of each part

  def layer(self, number: Int[Array, ""], num_shards: int, dtype: str, value_axis: int = 3) -> Cached:
    """Takes the tokens' keys and values of one layer; the cache's rows, and `rows`, are split `num_shards` ways."""
    keys, values = (
      (part.numbers * part.scales).astype(dtype) if isinstance(part, Quantized) else part
      for part in self.cache.map(functools.partial(self._take, number, num_shards), value_axis=value_axis)
    )
    return Cached(keys, values if value_axis == 3 else values.swapaxes(2, 3), self.positions)

  def _take(
    self, number: Int[Array, ""], num_shards: int, axis: int, x: Shaped[Array, "L R K *T"]
  ) -> Shaped[Array, "B K *S"]:
    layers, all_rows, *rest = x.shape
    rows, slots = self.positions.shape
    rest[axis - 2] = slots
    split = x.reshape(layers, num_shards, all_rows // num_shards, *x.shape[2:])  # each device takes from its own rows
    if self.rows is None:
      return jax.lax.dynamic_slice(split, (number, 0, 0, 0, 0, 0), (1, num_shards, rows // num_shards, *rest)).reshape(
        rows, *rest
      )
    local = self.rows.reshape(num_shards, -1) - jnp.arange(num_shards)[:, None] * (all_rows // num_shards)
    taken = jax.vmap(lambda part, rows: part[number, rows], in_axes=(1, 0))(split, local)
    return jax.lax.slice_in_dim(taken.reshape(rows, *x.shape[2:]), 0, slots, axis=axis - 1)


class LayerKind(NamedTuple):
  """In what layers differ, in one of them or stacked; None where none of them has it, so that nothing is computed."""

  windowed: Bool[Array, "*L"] | None
  unrotated: Bool[Array, "*L"] | None

  @classmethod
  def of(cls, config: ModelConfig) -> "LayerKind":
    """Of all layers."""
    return cls(*(jnp.array(flags) if any(flags) else None for flags in (config.windowed, config.unrotated)))


class RMSNorm(nnx.Module):
  """x / rms(x) * scale, or * (1 + scale) in Gemma, computed in float32."""

  def __init__(self, size: int, config: ModelConfig):
    self.offset = float(config.norm_offset)
    self.scale = nnx.Param(jnp.full(size, 1 - self.offset))
    self.eps = config.norm_eps

  def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
    return (wide * (self.offset + self.scale[...].astype(jnp.float32))).astype(x.dtype)


class Linear(nnx.Module):
  """x W, and its bias and low-rank adapter where the config has one. W may have several axes on either side."""

  def __init__(self, name: str, config: ModelConfig, *, rngs: nnx.Rngs):
    weight = WEIGHTS[name]
    shape, std = weight.shape(config), weight.init_std(config)
    self.ins = weight.inputs  # axes of W that come in
    self.weight = nnx.Param(jax.random.normal(rngs.params(), shape) * std)
    if name in config.biases:
      self.bias = nnx.Param(jnp.zeros(shape[self.ins :]))
    if config.lora and name in config.lora.targets:
      self.lora_scale = config.lora.alpha / config.lora.rank
      self.lora_a = nnx.Param(jax.random.normal(rngs.params(), (*shape[: self.ins], config.lora.rank)) * std)
      self.lora_b = nnx.Param(jnp.zeros((config.lora.rank, *shape[self.ins :])))

  def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
    y = _multiply(self.ins, x, self.weight[...].astype(x.dtype))
    if hasattr(self, "bias"):
      y += self.bias[...].astype(x.dtype)
    if hasattr(self, "lora_a"):
      low = jnp.tensordot(x, self.lora_a[...].astype(x.dtype), axes=self.ins)
      y += self.lora_scale * jnp.tensordot(low, self.lora_b[...].astype(x.dtype), axes=1)
    return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(ins: int, x: Float[Array, "..."], weight: Float[Array, "..."]) -> Float[Array, "..."]:
  """x W over the last axes of x; `ins`: how many.

  Of its own for the gradient of W, in which the CPU's compiler transposes what is named first: that is the narrower of
  x and y here, where the other may be the gradient of a whole MLP, computed again element by element for it.
  """
  return jnp.tensordot(x, weight, axes=ins)


def _multiply_backwards(ins: int, operands: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, ...]:
  x, weight = operands
  outs, tokens = weight.ndim - ins, tuple(range(x.ndim - ins))
  of_x = jnp.tensordot(gradient, weight, axes=(tuple(range(-outs, 0)), tuple(range(-outs, 0))))
  if x.size <= gradient.size:
    return of_x, jnp.tensordot(x, gradient, axes=(tokens, tokens))
  of_weight = jnp.tensordot(gradient, x, axes=(tokens, tokens))
  return of_x, jnp.moveaxis(of_weight, tuple(range(outs)), tuple(range(-outs, 0)))


_multiply.defvjp(lambda ins, x, weight: (jnp.tensordot(x, weight, axes=ins), (x, weight)), _multiply_backwards)


def _powers_of_two(sizes: Float[Array, "K H"]) -> Float[Array, "K H"]:
  """The powers of two nearest to sizes, over the smallest of a head; none above 2^10."""
  exponents = jnp.log2(jnp.maximum(sizes, 1e-30))
  return jnp.ldexp(1.0, jnp.round(jnp.minimum(exponents - exponents.min(axis=-1, keepdims=True), 10)).astype(jnp.int32))


class Layer(nnx.Module):
  """Attention and a gated MLP, with norms before both; in Gemma after both as well, in OLMo 2 only there."""

  def __init__(self, config: ModelConfig, runtime: Runtime, *, rngs: nnx.Rngs):
    self.config, self.runtime = config, runtime

    def linear(name: str) -> Linear:
      return Linear(name, config, rngs=rngs)

    if config.pre_norms:
      self.attention_norm = RMSNorm(config.embed_dim, config)
    self.query, self.key, self.value, self.out = map(linear, ("query", "key", "value", "out"))
    if config.qk_norm:
      queries, keys = (config.num_heads, config.num_kv_heads) if config.qk_norm_whole else (1, 1)
      self.query_norm = RMSNorm(queries * config.head_dim, config)
      self.key_norm = RMSNorm(keys * config.head_dim, config)
    if config.pre_norms:
      self.mlp_norm = RMSNorm(config.embed_dim, config)
    self.gate, self.up, self.down = map(linear, ("gate", "up", "down"))
    if config.post_norms:
      self.post_attention_norm = RMSNorm(config.embed_dim, config)
      self.post_mlp_norm = RMSNorm(config.embed_dim, config)

  def project(
    self, x: Float[Array, "B T D"], positions: Tokens, kind: LayerKind
  ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """Rotated queries, rotated keys, and values of the residual stream."""
    config, constrain = self.config, self.runtime.sharding.constrain
    if config.pre_norms:
      x = self.attention_norm(x)
    queries = constrain(self.query(x), "batch", "sequence", "heads", None)
    keys = constrain(self.key(x), "batch", "sequence", "kv_heads", None)
    values = constrain(self.value(x), "batch", "sequence", "kv_heads", None)
    if config.qk_norm:
      queries, keys = self._norm_heads(self.query_norm, queries), self._norm_heads(self.key_norm, keys)
    rotation = self._rotation(kind)
    return rotate(queries, positions, *rotation), rotate(keys, positions, *rotation), values

  def key_powers(self) -> Float[Array, "K H"]:
    """Powers of two near the usual size of each channel of the keys; a rotary pair of channels has one."""
    return _powers_of_two(self._key_sizes())

  @staticmethod
  def balance(
    queries: Float[Array, "B T N H"], keys: Float[Array, "B T K H"], powers: Float[Array, "K H"]
  ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"]]:
    """Divides the channels of keys by `key_powers`, and multiplies those of queries by them.

    Their products stay as they are to the last bit, but keys are fit for eight bits with one scale a head then: biases
    make some channels of Qwen2.5's keys a hundred times as large as others.
    """
    return queries * jnp.repeat(powers, queries.shape[2] // keys.shape[2], axis=0).astype(queries.dtype), (
      keys / powers.astype(keys.dtype)
    )

  def _key_sizes(self) -> Float[Array, "K H"]:
    """Root of the mean square of each channel of the keys, by the weights, were their input white."""
    config, weight = self.config, self.key.weight[...].astype(jnp.float32)
    if config.pre_norms:
      norm = self.attention_norm
      weight = weight * (norm.offset + norm.scale[...].astype(jnp.float32))[:, None, None]
    squares = jnp.sum(weight**2, axis=0)
    if hasattr(self.key, "bias"):
      squares += self.key.bias[...].astype(jnp.float32) ** 2
    sizes = jnp.sqrt(squares)
    if config.qk_norm:
      sizes = self._norm_heads(self.key_norm, sizes[None, None])[0, 0]
    half = config.rope.frequencies(config.head_dim).size
    first, second, rest = jnp.split(sizes, [half, 2 * half], axis=-1)
    of_pairs = jnp.hypot(first, second)
    return jnp.concatenate([of_pairs, of_pairs, jnp.sqrt(2.0) * jnp.abs(rest)], axis=-1)

  def _norm_heads(self, norm: RMSNorm, x: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
    """Norms queries or keys, each head alone or all of them together."""
    return norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape) if self.config.qk_norm_whole else norm(x)

  def _rotation(self, kind: LayerKind) -> tuple[Float[Array, "..."], Float[Array, ""] | float]:
    """Frequencies of the rotary embedding in this layer, and the factor by which it multiplies what it rotates."""
    config = self.config
    frequencies = jnp.asarray(config.rope.frequencies(config.head_dim))
    factor: jax.Array | float = config.rope.attention_factor
    if config.local_rope is not None and kind.windowed is not None:
      frequencies = jnp.where(kind.windowed, config.local_rope.frequencies(config.head_dim), frequencies)
      factor = jnp.where(kind.windowed, config.local_rope.attention_factor, factor)
    if kind.unrotated is not None:  # by an angle of zero, which changes no bit
      frequencies, factor = jnp.where(kind.unrotated, 0, frequencies), jnp.where(kind.unrotated, 1, factor)
    return frequencies, factor

  def mix(self, x: Float[Array, "B T D"], attended: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
    """Adds the attention's output and the MLP to the residual stream."""
    config, constrain = self.config, self.runtime.sharding.constrain
    y = self.out(attended)
    x = x + constrain(self.post_attention_norm(y) if config.post_norms else y, "batch", "sequence", "embed")
    h = self.mlp_norm(x) if config.pre_norms else x
    h = constrain(_ACTIVATIONS[config.activation](self.gate(h)) * self.up(h), "batch", "sequence", "mlp")
    y = self.down(h)
    return x + constrain(self.post_mlp_norm(y) if config.post_norms else y, "batch", "sequence", "embed")


class Decoder(nnx.Module):
  """A decoder-only transformer. See the module's docstring for its three forms."""

  def __init__(self, config: ModelConfig, runtime: Runtime, *, rngs: nnx.Rngs):
    self.config, self.runtime = config, runtime

    def table(name: str) -> nnx.Param[jax.Array]:
      weight = WEIGHTS[name]
      return nnx.Param(jax.random.normal(rngs.params(), weight.shape(config)) * weight.init_std(config))

    self.embedding = table("embedding")
    make = nnx.vmap(lambda rngs: Layer(config, runtime, rngs=rngs), in_axes=0, out_axes=0)
    self.layers = nnx.split_rngs(splits=config.num_layers)(make)(rngs)
    self.final_norm = RMSNorm(config.embed_dim, config)
    if not config.tie_embeddings:
      self.head = table("head")
    self.attention = AttentionSettings(
      backend=runtime.attention,
      scale=(config.query_pre_attn_scalar or config.head_dim) ** -0.5,
      softcap=config.attention_softcap,
      window=config.window,
      sharding=runtime.sharding,
    )

  def __call__(
    self, tokens: Tokens, positions: Tokens, segment_ids: Tokens, group_ids: Tokens | None = None
  ) -> Float[Array, "B T D"]:
    """Hidden states of packed rows, normed, ready for the head.

    The first segment of a group is the stem of the others, as in `masks.Places`; without `group_ids` each is alone.
    Backwards, what `runtime.remat` says is kept and everything else is computed again.
    """
    positions, segment_ids = jnp.asarray(positions), jnp.asarray(segment_ids)
    group_ids = None if group_ids is None else jnp.asarray(group_ids)
    definition, stacked = nnx.split(self.layers)

    @functools.partial(jax.checkpoint, policy=_REMAT[self.runtime.remat])
    def body(x: jax.Array, scanned: tuple[Any, Any]) -> tuple[jax.Array, None]:
      weights, kind = scanned
      layer = nnx.merge(definition, weights)
      queries, keys, values = layer.project(x, positions, kind)
      places = Places(segment_ids, kind.windowed, group_ids=group_ids)
      return layer.mix(x, attend(queries, keys, values, places, self.attention)), None

    x, _ = jax.lax.scan(body, self._embed(tokens), (stacked, LayerKind.of(self.config)))
    return self.final_norm(x)

  def prefill(self, tokens: Tokens) -> tuple[Float[Array, "B T D"], KVCache]:
    """Hidden states of rows read from their beginning, and their keys and values."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return self._read(tokens, positions, jnp.ones_like(tokens), ())

  def extend(
    self,
    tokens: Tokens,
    positions: Tokens,
    views: Sequence[CacheView],
    segment_ids: Tokens | None = None,
    text: Text | None = None,
  ) -> tuple[Float[Array, "B T D"], KVCache]:
    """Hidden states of tokens that follow what parts of a cache hold, and their own keys and values.

    Nothing is written: where the new keys and values go is the caller's to say.

    Args:
      positions: of the tokens in the text; consecutive within a segment.
      text: what comes first; read by a kernel where `Runtime.decode_attention` says so and it can.
      segment_ids: texts that go on from the same row do not see each other; None for one text a row.
    """
    return self._read(tokens, positions, jnp.ones_like(tokens) if segment_ids is None else segment_ids, views, text)

  def empty_cache(self, rows: int, length: int) -> KVCache:
    """A cache of zeros, `rows` of `length` tokens, in the compute dtype, on the devices where it is to lie."""
    config, runtime = self.config, self.runtime

    def zeros(axis: int) -> jax.Array | Quantized:
      """`axis`: that of tokens."""
      sizes = (config.head_dim, length) if axis == 4 else (length, config.head_dim)
      shape = (config.num_layers, rows, config.num_kv_heads, *sizes)
      # Not zeros that are quantised: the compiler would do that, number by number, before the program is ever run.
      return Quantized.zeros(shape, 7 - axis) if runtime.int8_cache else jnp.zeros(shape, runtime.compute_dtype)

    return jax.tree.map(self.place_cache, KVCache(zeros(4), zeros(self.value_axis)))

  @property
  def value_axis(self) -> int:
    """The axis of tokens in cached values; that of a head's numbers is the other of the last two."""
    return 4 if isinstance(self.runtime.decode_attention, Reader) else 3

  def _store(self, keys: Float[Array, "*B T K H"], values: Float[Array, "*B T K H"]) -> KVCache:
    axis = self.value_axis - 5
    keys, values = jnp.moveaxis(keys, -3, -1), jnp.moveaxis(values, -3, axis)
    if not self.runtime.int8_cache:
      return KVCache(keys, values)
    return KVCache(Quantized.of(keys, -2), Quantized.of(values, -3 - axis))

  def _read(
    self,
    tokens: Tokens,
    positions: Tokens,
    segment_ids: Tokens,
    views: Sequence[CacheView],
    text: Text | None = None,
  ) -> tuple[Float[Array, "B T D"], KVCache]:
    """Hidden states, and the tokens' keys and values.

    The cache is indexed by layer inside the scan, so that of each layer only what is read is touched.
    """
    definition, stacked = nnx.split(self.layers)
    num_shards = self.runtime.sharding.num_shards("batch")
    reader = None if text is None else self._text_reader(text)
    if text is not None and reader is None:
      views = [text.view(), *views]

    # Of all layers at once: they depend on the weights alone, and need not be computed again for each token.
    all_powers = jax.vmap(lambda x: nnx.merge(definition, x).key_powers())(stacked) if self.runtime.int8_cache else None

    def body(x: jax.Array, scanned: tuple[Any, Any, jax.Array, Any]) -> tuple[jax.Array, KVCache]:
      weights, kind, number, powers = scanned
      layer = nnx.merge(definition, weights)
      queries, keys, values = layer.project(x, positions, kind)
      if powers is not None:
        queries, keys = layer.balance(queries, keys, powers)
      cached = [view.layer(number, num_shards, self.runtime.compute_dtype, self.value_axis) for view in views]
      places = Places(segment_ids, kind.windowed, positions)
      mixed = None
      if text is not None and reader is not None:
        seen = places.seen_of_text(self.attention.window)
        seen = seen._replace(ends=jnp.where(segment_ids > 0, jnp.minimum(seen.ends, text.lengths[:, None]), 0))
        rows = text.numbers(num_shards)
        mixed = ragged.ragged_attention(queries, *text.cache, number, rows, seen, self.attention, reader)
      attended = attend(queries, keys, values, places, self.attention, cached, mixed)
      return layer.mix(x, attended), self._store(keys, values)

    numbers = jnp.arange(self.config.num_layers)
    x, new = jax.lax.scan(body, self._embed(tokens), (stacked, LayerKind.of(self.config), numbers, all_powers))
    return self.final_norm(x), jax.tree.map(self.place_cache, new)

  def _text_reader(self, text: Text) -> Reader | None:
    """The kernel that reads a cached text; None where plain XLA does."""
    reader = self.runtime.decode_attention
    return reader if isinstance(reader, Reader) and not self._obstacle(reader, text.cache) else None

  def _obstacle(self, reader: Reader, cache: KVCache) -> str | None:
    """Why a kernel cannot read a cache; None if it can."""
    config, capacity = self.config, jax.tree.leaves(cache)[0].shape[-1]
    sizes = config.num_heads, config.num_kv_heads, config.head_dim, capacity
    return ragged.obstacle(reader.kernel, *sizes, self.runtime.sharding)

  def check_readable(self, cache: KVCache) -> None:
    """Checks that the kernel that is asked for can read a cache.

    Raises:
      SettingError: it cannot, and why.
    """
    reader = self.runtime.decode_attention
    if isinstance(reader, Reader) and reader.required and (why := self._obstacle(reader, cache)):
      raise SettingError(f"{{decode_attention}}: ragged cannot read {why}; take 'auto' or 'xla'")

  def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """Float32 logits. For whole sequences take `logprobs`, which never holds them all."""
    head = self._head.astype(hidden.dtype)
    logits = jnp.einsum("btd,vd->btv", hidden, head, preferred_element_type=jnp.float32)
    return drop_unknown(softcap(logits, self.config.final_softcap), self.config.known_tokens)

  def logprobs(
    self,
    hidden: Float[Array, "B T D"],
    targets: Tokens,
    temperature: float = 1.0,
    used: Bool[AnyArray, "B T"] | None = None,
  ) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probability of each target and entropy there, as `logprobs.token_logprobs` gives them."""
    return token_logprobs(
      self._head,
      hidden,
      targets,
      temperature,
      cap=self.config.final_softcap,
      sharding=self.runtime.sharding,
      known_tokens=self.config.known_tokens,
      used=used,
    )

  @property
  def _head(self) -> Float[Array, "V D"]:
    return self.embedding[...] if self.config.tie_embeddings else self.head[...]

  def _embed(self, tokens: Tokens) -> Float[Array, "B T D"]:
    constrain = self.runtime.sharding.constrain
    # Whole rows of the table: looked up in parts of rows, they would have to be put together on every device.
    table = constrain(self.embedding[...].astype(self.runtime.compute_dtype), "vocab", None)
    x = table[constrain(jnp.asarray(tokens), "batch", "sequence")]
    if self.config.scale_embeddings:
      x *= jnp.asarray(self.config.embed_dim**0.5, x.dtype)
    return constrain(x, "batch", "sequence", "embed")

  def place_cache(self, cache: Shaped[Array, "L B K *T"]) -> Shaped[Array, "L B K *T"]:
    """Tells the compiler how an array of a cache is to lie."""
    return self.runtime.sharding.constrain(cache, "layers", "batch", "kv_heads", None, None)


ModelGraph = nnx.GraphDef[Decoder]  # a decoder without its parameters: `nnx.merge(graph, params)` is the module again


def definition(config: ModelConfig, runtime: Runtime = Runtime()) -> ModelGraph:
  """The static half of a decoder; with its parameters, `nnx.merge(definition, params)` is the module again.

  Raises:
    InputError: the model's axes do not divide by the mesh.

  >>> config = ModelConfig(8, 4, 4, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=2)
  >>> decoder = nnx.merge(definition(config), init_params(config, seed=0))
  >>> decoder.logits(decoder.prefill(jnp.array([[5, 6, 7]]))[0]).shape
  (1, 3, 8)
  """
  fitted = fit(runtime.sharding, axis_sizes(config))
  runtime = for_device(dataclasses.replace(runtime, sharding=fitted), _device(fitted))
  return nnx.split(nnx.eval_shape(lambda: Decoder(config, runtime, rngs=nnx.Rngs(0))))[0]


def default_attention(platform: str) -> str:
  """Which attention "auto" is on a platform, as its devices name it; of a GPU plain XLA where tokamax cannot serve.

  >>> default_attention("tpu"), default_attention("cpu")
  ('splash', 'blockwise')
  """
  return {"tpu": "splash", "gpu": "tokamax_or_xla", "cpu": "blockwise"}.get(platform, "xla")


def for_device(runtime: Runtime, device: Any) -> Runtime:
  """With what "auto" is on a device, which may be only described.

  >>> for_device(Runtime(), jax.devices("cpu")[0]).attention
  'blockwise'
  """
  attention, reader = runtime.attention, runtime.decode_attention
  if attention == "auto":
    attention = default_attention(device.platform)
  if isinstance(reader, str):
    reader = choose_reader(reader, device.platform, device.device_kind, getattr(device, "compute_capability", ""))
  return dataclasses.replace(runtime, attention=attention, decode_attention=reader)


def _device(sharding: Sharding) -> Any:
  return jax.devices()[0] if sharding.mesh is None else sharding.mesh.devices.flat[0]


def place(params: Params, sharding: Sharding) -> Params:
  """Tells the compiler how parameters, or any part of their tree, are to lie."""
  return jax.tree_util.tree_map_with_path(lambda path, x: sharding.constrain(x, *param_axes(key_path(path))), params)


@functools.partial(jax.jit, static_argnames=("dtype", "source", "sharding"))
def cast(params: Params, dtype: str, source: Sharding, sharding: Sharding) -> Params:
  """Parameters that lie as `source` says, in the dtype in which they are computed with; norms stay as they are.

  They come to lie as `sharding` says once they are cast: fewer bytes are moved.
  """

  def cast_weight(path: KeyPath, x: jax.Array) -> jax.Array:
    return x if path[-1].key == "scale" else x.astype(dtype)

  return place(place(jax.tree_util.tree_map_with_path(cast_weight, params), source), sharding)


def abstract_params(config: ModelConfig, sharding: Sharding = Sharding()) -> Params:
  """Shapes, dtypes (float32) and shardings of the parameters, without computing anything.

  >>> config = ModelConfig(8, 4, 4, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=2)
  >>> abstract_params(config)["layers"]["query"]["weight"].shape
  (1, 4, 2, 2)
  """
  sharding = fit(sharding, axis_sizes(config))
  shapes = nnx.to_pure_dict(nnx.split(nnx.eval_shape(lambda: Decoder(config, Runtime(), rngs=nnx.Rngs(0))))[1])

  def place(path: KeyPath, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    axes = param_axes(key_path(path))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.named(axes))

  return jax.tree_util.tree_map_with_path(place, shapes)


def init_params(config: ModelConfig, seed: int, sharding: Sharding = Sharding()) -> Params:
  """Random float32 parameters, each device computing its own part.

  >>> config = ModelConfig(8, 4, 4, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=2)
  >>> init_params(config, seed=0)["embedding"].shape
  (8, 4)
  """

  def make() -> Params:
    return nnx.to_pure_dict(nnx.split(Decoder(config, Runtime(), rngs=nnx.Rngs(seed)))[1])

  return jax.jit(make, out_shardings=jax.tree.map(lambda x: x.sharding, abstract_params(config, sharding)))()
