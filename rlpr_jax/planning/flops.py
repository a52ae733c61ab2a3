"""Floating-point operations of a function, counted from its jaxpr.

    flops.count(jnp.dot, jax.ShapeDtypeStruct((3, 4), jnp.float32), jax.ShapeDtypeStruct((4, 5), jnp.float32))  # 120

Products of matrices alone, a multiplication and an addition being two; they are nearly all there is in a transformer.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core


def count(function: Callable, *args: Any, trips: Sequence[int] = ()) -> int:
  """Of a call with these arguments, arrays or `ShapeDtypeStruct`s; nothing is computed. `trips` as in `of_jaxpr`.

  >>> count(jax.numpy.dot, jax.ShapeDtypeStruct((3, 4), "float32"), jax.ShapeDtypeStruct((4, 5), "float32"))
  120
  """
  return of_jaxpr(jax.make_jaxpr(function)(*args).jaxpr, trips)


def of_jaxpr(jaxpr: core.Jaxpr, trips: Sequence[int] = ()) -> int:
  """A loop's body counts as often as it runs, and of a branch the dearest side.

  Args:
    trips: how often a loop runs whose length the data decide; then one inside it, and so on.

  Raises:
    ValueError: there are products in such a loop, and `trips` says nothing of it.

  >>> matrix = jax.ShapeDtypeStruct((3, 3), "float32")
  >>> of_jaxpr(jax.make_jaxpr(lambda a: a @ a)(matrix).jaxpr)
  54
  """
  return sum(_of_equation(equation, trips) for equation in jaxpr.eqns)


def _of_equation(equation: core.JaxprEqn, trips: Sequence[int]) -> int:
  if equation.primitive.name == "dot_general":
    (contracted, _), _ = equation.params["dimension_numbers"]
    depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    return 2 * depth * math.prod(equation.outvars[0].aval.shape)
  name = equation.primitive.name
  inner = [of_jaxpr(jaxpr, trips[1:] if name == "while" else trips) for jaxpr in _inside(equation.params)]
  match name:
    case "scan":
      return equation.params["length"] * sum(inner)
    case "cond":
      return max(inner)
    case "while" if sum(inner):
      if not trips:
        raise ValueError("products in a while loop: how often it runs is not known")
      return trips[0] * sum(inner)
  return sum(inner)


def _inside(params: dict[str, Any]) -> list[core.Jaxpr]:
  leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, core.Jaxpr | core.ClosedJaxpr))
  closed = [leaf.jaxpr if isinstance(leaf, core.ClosedJaxpr) else leaf for leaf in leaves]
  return [leaf for leaf in closed if isinstance(leaf, core.Jaxpr)]
