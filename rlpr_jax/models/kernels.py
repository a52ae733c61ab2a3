"""Attention kernels of TPUs and GPUs behind `attention.attend`, for whole packed rows.

Under a mesh each device runs the kernel on its own rows and heads: the compiler cannot split one.
"""

import dataclasses
import functools
import importlib.metadata
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jaxtyping import Array, Bool, Float, Int, Shaped

from rlpr_jax.errors import SettingError
from rlpr_jax.sharding import Sharding
from rlpr_jax.types import AnyArray

Kernel = Callable[..., jax.Array]
TILE = 128  # whole blocks of either kernel: lanes of a TPU's registers, query rows of a Hopper's thread block
BLOCKS = (512, 384, 256)  # lengths of splash's blocks in a long sequence


@dataclasses.dataclass(frozen=True)
class AttentionSettings:
  """Settings of attention that all layers share."""

  backend: str  # xla | splash | tokamax | tokamax_or_xla, which is what "auto" becomes on a GPU
  scale: float  # of the scores
  softcap: float | None = None  # scores become cap * tanh(scores / cap)
  window: int | None = None  # tokens that a layer with a window sees, the newest one included
  sharding: Sharding = Sharding()


def splash_attention(
  queries: Float[Array, "B T N H"],
  keys: Float[Array, "B T K H"],
  values: Float[Array, "B T K H"],
  segment_ids: Int[AnyArray, "B T"],
  settings: AttentionSettings,
  windowed: Bool[Array, ""] | None,
) -> Float[Array, "B T N H"]:
  """Splash attention, the block-sparse flash attention for TPUs that comes with JAX.

  No [T, T] array is held, forwards or backwards. Blocks that lie in the future or before the window are skipped; scores
  of other segments are computed and masked. T is padded to whole blocks.

  Args:
    queries: float32 or bfloat16, as keys and values; scores and their softmax are float32.
    windowed: whether this layer has the window; None for no.
  """

  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

  def attend(
    queries: jax.Array, keys: jax.Array, values: jax.Array, segment_ids: jax.Array, windowed: jax.Array | None
  ) -> jax.Array:
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
  """Tokens in a block of a sequence of this length: of the large ones, that which pads it least.

  >>> block_length(200), block_length(700), block_length(1024)
  (256, 384, 512)
  """
  if length <= BLOCKS[0]:
    return length + -length % TILE
  return min(BLOCKS, key=lambda block: -length % block)


def _pad(x: Shaped[Array, "B T ..."], block: int, value: int = 0) -> Shaped[Array, "B S ..."]:
  """With tokens of this value up to whole blocks."""
  return jnp.pad(x, [(0, 0), (0, -x.shape[1] % block), *[(0, 0)] * (x.ndim - 2)], constant_values=value)


def _splash_kernel(heads: int, length: int, block: int, window: int | None, softcap: float | None) -> Kernel:
  """The kernel for one row: queries [heads, length, H], keys and values [K, length, H], segment ids [length]."""
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

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
  settings: AttentionSettings,
) -> Float[Array, "B T N H"] | None:
  """Flash attention for GPUs by tokamax, an optional dependency.

  A token sees from `first_visible` to itself. T is padded to whole blocks. Of tokamax's implementations the first is
  taken that can be traced, forwards and backwards, for JAX's default device:
    - mosaic_gpu: bfloat16 on Hopper and Blackwell. No [T, T] array is held, forwards or backwards.
    - triton: from Ampere on, float32 too (in TF32). Backwards it holds a boolean mask [B, T, T], and has no soft cap.
    - xla: anywhere. It holds the scores, as backend "xla" does, and is taken for backend "tokamax" alone.
  That one is not for such a device or dtype is nothing to tell; any other failure is said on stderr, once.

  Returns:
    The mixed values; None if none serves and the backend is "tokamax_or_xla".

  Raises:
    SettingError: none serves and the backend is "tokamax".
  """
  required = settings.backend == "tokamax"
  names = ["mosaic_gpu", "triton", "xla"] if required else ["mosaic_gpu", "triton"]
  operands = (queries, keys, values, first_visible)
  try:
    implementations, mask = import_tokamax()
  except Exception as error:  # a package made for another JAX may raise anything
    if required:
      raise _no_tokamax(f"{_versions()} ({_line(error)})") from error
    _warn(f"{_versions()} ({_line(error)}), going on with plain XLA, which holds all scores")
    return None
  failures = {}
  for name, following in zip(names, [*names[1:], "" if required else "plain XLA"], strict=True):
    attend = functools.partial(attend_tokamax, implementations.get(name), mask, settings)
    try:
      # Backwards too: what fails there fails when a gradient is taken, where nothing else can be tried.
      jax.eval_shape(functools.partial(_with_gradients, attend, settings), *operands)
      return _each_device(attend, settings, *operands)
    except NotImplementedError as error:
      failures[name] = _line(error)
    except Exception as error:
      failures[name] = _line(error)
      if following:
        _warn(f"{name} of {_versions()} cannot be traced ({failures[name]}), going on with {following}")
  if required:
    reasons = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
    raise _no_tokamax(f"{_versions()} cannot be traced ({reasons})")
  return None


def _no_tokamax(why: str) -> SettingError:
  why = why.replace("{", "{{").replace("}", "}}")
  return SettingError(f"{{attention}}: 'tokamax', but {why}; take 'xla'")


def import_tokamax() -> tuple[Mapping[str, Kernel], Callable[..., Any]]:
  """Tokamax's implementations by name, and its mask.

  Private, since its public function has no argument for the first key that a query sees, and would need a [T, T] mask.
  """
  from tokamax._src.ops.attention import api, base

  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # tokamax 0.0.12 would parse the command line, which may not be one of absl's
  logging.getLogger("absl").addFilter(_is_news)
  return api.IMPLEMENTATIONS, base.Mask


def _is_news(record: logging.LogRecord) -> bool:
  """Not what tokamax says, with all its arguments, of each kernel that was not tuned for its shapes."""
  return "Autotuning cache miss" not in str(record.msg)


def attend_tokamax(
  implementation: Kernel | None, mask: Callable[..., Any], settings: AttentionSettings, *operands: jax.Array
) -> jax.Array:
  """One implementation, on one device; None for one that tokamax could not import."""
  if implementation is None:
    raise ImportError("tokamax has no such implementation here")
  *packed, first_visible = operands
  length = first_visible.shape[1]
  y = implementation(
    *(_pad(x, TILE) for x in packed),
    mask=mask(k_start=_pad(first_visible, TILE, length)[:, None], is_causal=True),
    logits_scale=settings.scale,
    logits_soft_cap=settings.softcap,
  )
  return y[:, :length]


def _with_gradients(
  attend: Kernel,
  settings: AttentionSettings,
  queries: jax.Array,
  keys: jax.Array,
  values: jax.Array,
  of_tokens: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  """The output, and gradients of queries, keys and values for a gradient of its shape."""
  y, backwards = jax.vjp(lambda *x: _each_device(attend, settings, *x, of_tokens), queries, keys, values)
  return y, backwards(y)


def _versions() -> str:
  try:
    return f"tokamax {importlib.metadata.version('tokamax')} with jax {jax.__version__}"
  except importlib.metadata.PackageNotFoundError:
    return f"tokamax, of the extra cuda13, is not installed beside jax {jax.__version__}"


def _line(error: Exception) -> str:
  return " ".join(f"{type(error).__name__}: {error}".split())[:200]


@functools.cache  # once a process
def _warn(what: str) -> None:
  print(f"warning: attention: {what}", file=sys.stderr, flush=True)


def _each_device(
  attend: Kernel,
  settings: AttentionSettings,
  queries: jax.Array,
  keys: jax.Array,
  values: jax.Array,
  of_tokens: Int[AnyArray, "B T"],
  *whole: jax.Array | None,
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
