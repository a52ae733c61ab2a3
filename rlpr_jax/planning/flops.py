"""Floating-point operations of a function, counted from its jaxpr.

    flops.count(jnp.dot, jax.ShapeDtypeStruct((3, 4), jnp.float32), jax.ShapeDtypeStruct((4, 5), jnp.float32))  # 120

Products of matrices alone, a multiplication and an addition being two; they are nearly all there is in a transformer.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def count(function: Callable, *args: Any) -> int:
  """Of a call with these arguments, arrays or `ShapeDtypeStruct`s; nothing is computed."""
  return of_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def of_jaxpr(jaxpr: core.Jaxpr) -> int:
  """A loop's body counts as often as it runs, and of a branch the dearest side.

  Raises:
    ValueError: there are products in a loop whose length the data decide.
  """
  return sum(map(_of_equation, jaxpr.eqns))


def _of_equation(equation: core.JaxprEqn) -> int:
  if equation.primitive.name == "dot_general":
    (contracted, _), _ = equation.params["dimension_numbers"]
    depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    return 2 * depth * math.prod(equation.outvars[0].aval.shape)
  inner = [of_jaxpr(jaxpr) for jaxpr in _inside(equation.params)]
  match equation.primitive.name:
    case "scan":
      return equation.params["length"] * sum(inner)
    case "cond":
      return max(inner)
    case "while" if sum(inner):
      raise ValueError("products in a while loop: how often it runs is not known")
  return sum(inner)


def _inside(params: dict[str, Any]) -> list[core.Jaxpr]:
  leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, core.Jaxpr | core.ClosedJaxpr))
  closed = [leaf.jaxpr if isinstance(leaf, core.ClosedJaxpr) else leaf for leaf in leaves]
  return [leaf for leaf in closed if isinstance(leaf, core.Jaxpr)]
