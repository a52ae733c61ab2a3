"""Attention kernels of TPUs and GPUs behind `attention.attend`, for whole packed rows.

Under a mesh each device runs the kernel on its own rows and heads: the compiler cannot split one.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from absl import flags
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jaxtyping import Array, Bool, Float, Int, Shaped

from rlpr_jax.errors import InputError

if TYPE_CHECKING:
  from rlpr_jax.models.attention import AttentionSettings

TILE = 128  # whole blocks of either kernel: lanes of a TPU's registers, query rows of a Hopper's thread block
BLOCKS = (512, 384, 256)  # lengths of splash's blocks in a long sequence


def splash_attention(
  queries: Float[Array, "B T N H"],
  keys: Float[Array, "B T K H"],
  values: Float[Array, "B T K H"],
  segment_ids: Int[Array, "B T"],
  settings: "AttentionSettings",
  windowed: Bool[Array, ""] | None,
) -> Float[Array, "B T N H"]:
  """Splash attention, the block-sparse flash attention for TPUs that comes with JAX.

  No [T, T] array is held, forwards or backwards. Blocks that lie in the future or before the window are skipped; scores
  of other segments are computed and masked. T is padded to whole blocks.

  Args:
    queries: float32 or bfloat16, as keys and values; scores and their softmax are float32.
    windowed: whether this layer has the window; None for no.
  """

  def attend(queries, keys, values, segment_ids, windowed):
    length = queries.shape[1]
    block = block_length(length)

    queries *= jnp.asarray(settings.scale, queries.dtype)  # the kernel has no scale
    operands = [_pad(x, block).swapaxes(1, 2) for x in (queries, keys, values)]
    ids = _pad(segment_ids, block, -1)  # a segment of its own

    def mixed(window: int | None) -> Float[Array, "B N S H"]:
      kernel = _splash_kernel(queries.shape[2], ids.shape[1], block, window, settings.softcap)
      return jax.vmap(kernel)(*operands, splash.SegmentIds(ids, ids))

    # A kernel's mask is static: both kernels are compiled, and a layer runs its own.
    y = mixed(None) if windowed is None else jax.lax.cond(windowed, lambda: mixed(settings.window), lambda: mixed(None))
    return y[:, :, :length].swapaxes(1, 2)

  return _each_device(attend, settings, queries, keys, values, segment_ids, windowed)


def block_length(length: int) -> int:
  """Tokens in a block of a sequence of this length: of the large ones, that which pads it least."""
  if length <= BLOCKS[0]:
    return length + -length % TILE
  return min(BLOCKS, key=lambda block: -length % block)


def _pad(x: Shaped[Array, "B T ..."], block: int, value: int = 0) -> Shaped[Array, "B S ..."]:
  """With tokens of this value up to whole blocks."""
  return jnp.pad(x, [(0, 0), (0, -x.shape[1] % block), *[(0, 0)] * (x.ndim - 2)], constant_values=value)


def _splash_kernel(
  heads: int, length: int, block: int, window: int | None, softcap: float | None
) -> splash.SplashAttentionKernel:
  """The kernel for one row: queries [heads, length, H], keys and values [K, length, H], segment ids [length]."""
  shape = (length, length)
  mask = splash_mask.CausalMask(shape) if window is None else splash_mask.LocalMask(shape, (window - 1, 0), 0)
  sizes = splash.BlockSizes(
    block_q=block,
    block_kv=block,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_q_dq=block,
    block_kv_dq=block,
  )
  return splash.make_splash_mha(
    splash_mask.MultiHeadMask([mask] * heads),
    block_sizes=sizes,
    attn_logits_soft_cap=softcap,
    head_shards=1,
    q_seq_shards=1,
  )


def tokamax_attention(
  queries: Float[Array, "B T N H"],
  keys: Float[Array, "B T K H"],
  values: Float[Array, "B T K H"],
  first_visible: Int[Array, "B T"],
  settings: "AttentionSettings",
) -> Float[Array, "B T N H"]:
  """Flash attention for GPUs by tokamax, an optional dependency.

  A token sees from `first_visible` to itself. Of tokamax's implementations the first that serves is taken:
    - mosaic: bfloat16 on Hopper and Blackwell. No [T, T] array is held, forwards or backwards.
    - triton: from Ampere on, float32 too (in TF32). Backwards it holds a boolean mask [B, T, T]; with a soft cap it
      cannot go backwards, and is passed over.
    - xla: anywhere. It holds the scores, as backend "xla" does.
  T is padded to whole blocks.

  Raises:
    InputError: tokamax is not installed, or not for this JAX.
  """
  try:
    # Its public function turns causality into a range where there is one already, and then computes the future too.
    from tokamax._src.ops.attention import api, base
  except ImportError as error:
    raise InputError(
      f"config.model.attention: 'tokamax' needs the package tokamax ({error}): pip install '.[cuda13]', or take 'xla'"
    ) from error
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # tokamax would parse the command line, which may not be one of absl's
  names = ("mosaic_gpu", "triton", "xla") if settings.softcap is None else ("mosaic_gpu", "xla")

  def attend(queries, keys, values, first_visible):
    length = queries.shape[1]
    operands = [_pad(x, TILE) for x in (queries, keys, values)]
    mask = base.Mask(k_start=_pad(first_visible, TILE, length)[:, None], is_causal=True)
    for name in names:
      try:
        attention = api.IMPLEMENTATIONS[name]
        y = attention(*operands, mask=mask, logits_scale=settings.scale, logits_soft_cap=settings.softcap)
        return y[:, :length]
      except NotImplementedError:
        continue
    raise AssertionError("tokamax's xla serves everywhere")

  return _each_device(attend, settings, queries, keys, values, first_visible)


def _each_device(
  attend: Callable, settings: "AttentionSettings", queries, keys, values, of_tokens: Int[Array, "B T"], *whole
) -> Float[Array, "B T N H"]:
  """`attend`(queries, keys, values, of_tokens, *whole), under a mesh for each device's rows and heads by themselves."""
  sharding = settings.sharding
  if sharding.mesh is not None:
    heads, rows = sharding.spec(("batch", None, "heads", None)), sharding.spec(("batch", None))
    attend = jax.shard_map(
      attend,
      mesh=sharding.mesh,
      in_specs=(heads, heads, heads, rows, *(jax.sharding.PartitionSpec() for _ in whole)),
      out_specs=heads,
      check_vma=False,  # a kernel does not say over which axes its output varies
    )
  return attend(queries, keys, values, of_tokens, *whole)
