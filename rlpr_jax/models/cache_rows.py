"""Rows of a cache, written in place on the devices that have them.

Rows are written one by one, unrolled, for each such write happens in place. A scatter would have the whole
cache copied first, on every platform, and the TPU compiler of libtpu 0.0.42 fails on a loop.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from rlpr_jax.sharding import Sharding
from rlpr_jax.types import AnyArray

CACHE = ("layers", "batch", "kv_heads", None, None)
ROWS = ("batch",)
EVERYWHERE = (None,)


def append_tokens(
  begin: Int[Array, "R"], sharding: Sharding, axis: int, old: Shaped[Array, "L S K *C"], new: Shaped[Array, "L R K *N"]
) -> Shaped[Array, "L S K *C"]:
  """Writes N tokens into the first R / parts rows of each part of a cache, from their own places on; `axis`: tokens."""

  def rows(old: jax.Array, new: jax.Array, begin: jax.Array) -> jax.Array:
    for row in range(begin.size):
      place: list[int | jax.Array] = [0, row, 0, 0, 0]
      place[axis] = begin[row]
      old = jax.lax.dynamic_update_slice(old, new[:, row : row + 1], place)
    return old

  return _on_each_part(rows, sharding, (old, new, begin), (CACHE, CACHE, ROWS))


def fill_rows(
  old: Shaped[Array, "L S K *C"],
  new: Shaped[Array, "L P K *N"],
  source: Int[AnyArray, "I"],
  target: Int[AnyArray, "I"],
  sharding: Sharding,
) -> Shaped[Array, "L S K *C"]:
  """Writes rows of another cache to the beginning of rows of this one, or nowhere where the target is S."""

  def rows(old: jax.Array, new: jax.Array, source: jax.Array, target: jax.Array) -> jax.Array:
    total, others = old.shape[1], new.shape[1]
    parts = sharding.spec(ROWS)[0] if sharding.mesh else None
    part = jax.lax.axis_index(parts) if parts else 0
    for i in range(source.size):
      row = _row(new, jnp.clip(source[i] - part * others, 0, others - 1), axis=1)
      if parts:  # from the device that has it
        row = jax.lax.psum(jnp.where(source[i] // others == part, row, 0), parts)
      place = (0, jnp.clip(target[i] - part * total, 0, total - 1), 0, 0, 0)
      row = jnp.where(target[i] // total == part, row, jax.lax.dynamic_slice(old, place, row.shape))
      old = jax.lax.dynamic_update_slice(old, row, place)
    return old

  return _on_each_part(rows, sharding, (old, new, source, target), (CACHE, CACHE, EVERYWHERE, EVERYWHERE))


def copy_rows(
  x: Shaped[Array, "..."], source: Int[Array, "M"], target: Int[Array, "M"], sharding: Sharding, axis: int
) -> Shaped[Array, "..."]:
  """Copies row `source[i]` to row `target[i]`, each part of a mesh its own M / parts, counted in it; `axis`: rows.

  >>> copy_rows(jnp.arange(4), source=jnp.array([3]), target=jnp.array([0]), sharding=Sharding(), axis=0).tolist()
  [3, 1, 2, 3]
  """

  def rows(x: jax.Array, source: jax.Array, target: jax.Array) -> jax.Array:
    def copy(i: jax.Array, x: jax.Array) -> jax.Array:
      return jax.lax.dynamic_update_slice_in_dim(x, _row(x, source[i], axis), target[i], axis)

    return jax.lax.fori_loop(0, source.size, copy, x)

  axes = CACHE if axis else ("batch", *[None] * (x.ndim - 1))
  return _on_each_part(rows, sharding, (x, source, target), (axes, ROWS, ROWS))


def _row(x: Shaped[Array, "..."], row: Int[Array, ""], axis: int) -> Shaped[Array, "..."]:
  return jax.lax.dynamic_slice_in_dim(x, row, 1, axis)


def _on_each_part(
  function: Callable[..., jax.Array],
  sharding: Sharding,
  operands: Sequence[AnyArray],
  axes: Sequence[Sequence[str | None]],
) -> jax.Array:
  """Calls `function` on each device's parts of the operands, whose axes are named so; the result is like the first."""
  if sharding.mesh is None:
    return function(*operands)
  specs = tuple(map(sharding.spec, axes))
  return jax.shard_map(function, mesh=sharding.mesh, in_specs=specs, out_specs=specs[0])(*operands)
