"""Attention kernels of TPUs and GPUs behind `attention.attend`, for whole packed rows.

Under a mesh each device runs the kernel on its own rows and heads: the compiler cannot split one.
"""

import dataclasses
import functools
import importlib.metadata
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import Array, Bool, Float, Int, Shaped

from rlpr_jax.errors import SettingError
from rlpr_jax.models.masks import Places, Spans, alignment, visible_blocks
from rlpr_jax.sharding import Sharding

Kernel = Callable[..., jax.Array]
TILE = 128  # whole blocks of either kernel: lanes of a TPU's registers, query rows of a Hopper's thread block
BLOCKS = (512, 384, 256)  # lengths of splash's blocks in a long sequence


@dataclasses.dataclass(frozen=True)
class AttentionSettings:
  """Settings of attention that all layers share."""

  backend: str  # xla | blockwise | splash | tokamax | tokamax_or_xla, which is what "auto" becomes on a GPU
  scale: float  # of the scores
  softcap: float | None = None  # scores become cap * tanh(scores / cap)
  window: int | None = None  # tokens that a layer with a window sees, the newest one included
  sharding: Sharding = Sharding()


def splash_attention(
  queries: Float[Array, "B T N H"],
  keys: Float[Array, "B T K H"],
  values: Float[Array, "B T K H"],
  places: Places,
  settings: AttentionSettings,
) -> Float[Array, "B T N H"]:
  """Splash attention, the block-sparse flash attention for TPUs that comes with JAX.

  No [T, T] array is held, forwards or backwards. Blocks that lie in the future or before the window are skipped, and in
  rows of groups all of which no token sees another. T is padded to whole blocks.

  Args:
    queries: float32 or bfloat16, as keys and values; scores and their softmax are float32.
    places: stems end, and branches begin, at multiples of `masks.alignment(T)`.
  """

  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

  def attend(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    ids: tuple[jax.Array, ...],
    windowed: jax.Array | None,
  ) -> jax.Array:
    length = queries.shape[1]
    block = block_length(length)

    queries *= jnp.asarray(settings.scale, queries.dtype)  # the kernel has no scale
    queries, keys, values = (pad(x, block).swapaxes(1, 2) for x in (queries, keys, values))
    padded = [pad(x, block, -1) for x in ids]  # a segment and a group of its own

    def mixed(window: int | None) -> Float[Array, "B N S H"]:
      if len(ids) == 1:
        kernel = _splash_kernel(queries.shape[1], queries.shape[2], block, window, settings.softcap)
        return jax.vmap(kernel)(queries, keys, values, splash.SegmentIds(padded[0], padded[0]))
      # Not vmap: over what a kernel is told of its blocks that would be a loop, with copies of each row.
      together = _Row(queries, keys, values, Spans.of(*padded), padded[1])
      rows = [_Row(*jax.tree.map(lambda x, row=row: x[row], together)) for row in range(len(queries))]
      return jnp.stack([_splash_row(row, block, window, settings.softcap) for row in rows])

    # A kernel's window is static: both kernels are compiled, and a layer runs its own.
    y = mixed(None) if windowed is None else jax.lax.cond(windowed, lambda: mixed(settings.window), lambda: mixed(None))
    return y[:, :, :length].swapaxes(1, 2)

  ids = [jnp.asarray(x) for x in (places.segment_ids, places.group_ids) if x is not None]
  return each_device(attend, settings, queries, keys, values, ids, places.windowed)


def block_length(length: int) -> int:
  """Tokens in a block of a sequence of this length: of the large ones, that which pads it least.

  >>> block_length(200), block_length(700), block_length(1024)
  (256, 384, 512)
  """
  if length <= BLOCKS[0]:
    return length + -length % TILE
  return min(BLOCKS, key=lambda block: -length % block)


def pad(x: Shaped[Array, "B T ..."], block: int, value: int = 0) -> Shaped[Array, "B S ..."]:
  """With tokens of this value up to whole blocks."""
  return jnp.pad(x, [(0, 0), (0, -x.shape[1] % block), *[(0, 0)] * (x.ndim - 2)], constant_values=value)


def _splash_kernel(heads: int, length: int, block: int, window: int | None, softcap: float | None) -> Kernel:
  """The kernel for one row of plain sequences: queries [heads, length, H], keys and values [K, length, H], ids."""
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

  shape = (length, length)
  mask = splash_mask.CausalMask(shape) if window is None else splash_mask.LocalMask(shape, (window - 1, 0), 0)
  return splash.make_splash_mha(
    splash_mask.MultiHeadMask([mask] * heads),
    block_sizes=_block_sizes(block),
    attn_logits_soft_cap=softcap,
    head_shards=1,
    q_seq_shards=1,
  )


def _block_sizes(block: int) -> Any:
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

  return splash.BlockSizes(
    block_q=block,
    block_kv=block,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_q_dq=block,
    block_kv_dq=block,
  )


class _Row(NamedTuple):
  """Operands of the kernel, or several rows of them."""

  queries: Float[Array, "*B N S H"]
  keys: Float[Array, "*B K S H"]
  values: Float[Array, "*B K S H"]
  spans: Spans  # of its places, [*B, S]
  group_ids: Int[Array, "*B S"]


def _splash_row(row: _Row, block: int, window: int | None, softcap: float | None) -> Float[Array, "N S H"]:
  """The kernel on one row of groups."""
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as mask_info

  runs, coded = visible_blocks(row.spans, window, block), _encode(row.spans)

  def info(axis: int) -> mask_info.MaskInfo:
    """For loops over blocks along an axis, inside one over the other."""
    dtype = jnp.int8 if len(runs) <= jnp.iinfo(jnp.int8).max else jnp.int32
    return mask_info.MaskInfo(
      data_next=_next_block(runs, axis)[None].astype(dtype),
      mask_next=None,
      block_mask=runs[None].astype(dtype),
      partial_mask_blocks=None,
      q_sequence=coded,  # type: ignore[arg-type]  # as jax's own dynamic masks have it
    )

  kernel = splash.SplashAttentionKernel(
    info(1),
    info(1),
    info(0),
    block_sizes=_block_sizes(block),
    is_mqa=False,
    save_residuals=False,
    mask_value=splash.DEFAULT_MASK_VALUE,
    attn_logits_soft_cap=softcap,
    residual_checkpoint_name=None,
    mask_function=_sees(row.queries.shape[1], window),
    interpret=False,
  )
  mixed = kernel(row.queries, row.keys, row.values, splash.SegmentIds(row.group_ids, row.group_ids))
  assert isinstance(mixed, jax.Array)  # without residuals
  return mixed


def visible_share(segment_ids: np.ndarray, group_ids: np.ndarray) -> float:
  """Share of the blocks of some rows [R, T] that splash runs in a layer without a window.

  >>> visible_share(np.ones((1, 1024), int), np.ones((1, 1024), int))  # all but those in the future
  0.75
  """
  block = block_length(segment_ids.shape[1])
  ids, groups = (pad(jnp.asarray(x), block, -1) for x in (segment_ids, group_ids))
  blocks = jax.vmap(lambda spans: visible_blocks(spans, None, block))(Spans.of(ids, groups))
  return float(jnp.mean(blocks))


def _next_block(runs: Bool[Array, "A A"], axis: int) -> Int[Array, "A A"]:
  """What a kernel fetches where it has nothing to do: the next block along the axis that runs, or the last that did."""
  count = len(runs)
  numbers = jnp.arange(count)[:, None] if axis == 0 else jnp.arange(count)
  at = jnp.where(runs, numbers, count)
  coming = jax.lax.cummin(at, axis=axis, reverse=True)
  latest = jax.lax.cummax(jnp.where(runs, numbers, 0), axis=axis)
  return jnp.where(coming == count, latest, coming)


def _encode(spans: Spans) -> Int[Array, "S"]:
  """A query's place, where its branch begins and where its stem ends, in one number; `_sees` reads it."""
  length = len(spans.group)
  bits, low = (length - 1).bit_length(), alignment(length).bit_length() - 1
  return jnp.arange(length) | (spans.branch >> low) << bits | (spans.stem_end >> low) << (2 * bits - low)


@functools.cache  # one object for each, since kernels are compiled for it
def _sees(length: int, window: int | None) -> Kernel:
  """Whether a query sees a key, of one group: of its number by `_encode`, and the key's place."""
  bits, low = (length - 1).bit_length(), alignment(length).bit_length() - 1
  short = bits - low

  def sees(query: jax.Array, key: jax.Array) -> jax.Array:
    place = query & (2**bits - 1)
    branch = (jax.lax.shift_right_logical(query, jnp.full_like(query, bits)) & (2**short - 1)) << low
    stem_end = jax.lax.shift_right_logical(query, jnp.full_like(query, bits + short)) << low
    in_stem = key < stem_end
    seen = (key <= place) & (in_stem | (key >= branch))
    if window is not None:
      seen &= jnp.where(in_stem, key + (branch - stem_end), key) > place - window
    return seen

  return sees


def tokamax_attention(
  queries: Float[Array, "B T N H"],
  keys: Float[Array, "B T K H"],
  values: Float[Array, "B T K H"],
  places: Places,
  settings: AttentionSettings,
) -> Float[Array, "B T N H"] | None:
  """Flash attention for GPUs by tokamax, an optional dependency.

  T is padded to whole blocks. Of tokamax's implementations the first is taken that can be traced, forwards and
  backwards, for JAX's default device:
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
  first, until = places.first_visible(settings.window), places.visible_until()
  operands = (queries, keys, values, (first,) if until is None else (first, until))
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
      return each_device(attend, settings, *operands)
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
  implementation: Kernel | None,
  mask: Callable[..., Any],
  settings: AttentionSettings,
  queries: jax.Array,
  keys: jax.Array,
  values: jax.Array,
  visible: tuple[jax.Array, ...],
) -> jax.Array:
  """One implementation, on one device; None for one that tokamax could not import.

  Args:
    visible: `first_visible`, and `visible_until` where there are branches.
  """
  if implementation is None:
    raise ImportError("tokamax has no such implementation here")
  length = queries.shape[1]
  bounds = {"k_start": pad(visible[0], TILE, length)[:, None]}
  if len(visible) > 1:
    bounds["q_end"] = pad(visible[1], TILE, length + -length % TILE)[:, None]
  y = implementation(
    *(pad(x, TILE) for x in (queries, keys, values)),
    mask=mask(**bounds, is_causal=True),
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
  of_tokens: tuple[jax.Array, ...],
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  """The output, and gradients of queries, keys and values for a gradient of its shape."""
  y, backwards = jax.vjp(lambda q, k, v: each_device(attend, settings, q, k, v, of_tokens), queries, keys, values)
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


def each_device(
  attend: Kernel,
  settings: AttentionSettings,
  queries: jax.Array,
  keys: jax.Array,
  values: jax.Array,
  of_tokens: Sequence[jax.Array],
  *whole: Bool[Array, ""] | None,
) -> Float[Array, "B T N H"]:
  """`attend`(queries, keys, values, of_tokens, *whole), under a mesh for each device's rows and heads by themselves.

  `of_tokens` are numbers of each token, [B, T].
  """
  sharding = settings.sharding
  if sharding.mesh is not None:
    heads, rows = sharding.spec(("batch", None, "heads", None)), sharding.spec(("batch", None))
    attend = jax.shard_map(
      attend,
      mesh=sharding.mesh,
      in_specs=(heads, heads, heads, (rows,) * len(of_tokens), *(jax.sharding.PartitionSpec() for _ in whole)),
      out_specs=heads,
      check_vma=False,  # a kernel does not say over which axes its output varies
    )
  return attend(queries, keys, values, tuple(of_tokens), *whole)
