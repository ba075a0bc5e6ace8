"""Norms of gradients that are outer products, without the products.

If an example meets a matrix once, its gradient for that matrix is an outer product: of the layer's input and the
derivative of the layer's output. The norm is the product of their two norms. The gradients of a batch take a hundred
times the memory of the vectors, and nearly all of the time of a pass over them. So this module evaluates the function
that calculates the gradients, but delays each outer product until something other than its norm is needed. If the
function returns the product, it is never calculated.

Nothing is assumed about layers: only the last operation must be such a product. It is not if weights are used at
several places of an example (convolutions, recurrent networks, sequences).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optaxclip._jaxprs import reading
from optaxclip._numerics import arithmetic, tree_norms

# These operations only rearrange or round the numbers, and keep the norm: see `_keeps_norm`.
_SAME_NORM = ("convert_element_type", "reshape", "transpose")


class Outer:
    """The outer product of two arrays, or one for each entry of their leading dimensions.

    Attributes:
      factors: the two arrays.
      leading: how many leading dimensions index products.
      array: calculates the product.
    """

    def __init__(self, factors: tuple[Any, Any], leading: int, array: Callable[[], Any]) -> None:
        self.factors, self.leading, self.array = factors, leading, array

    def norm(self) -> jax.Array:
        """Returns the 2-norm. It is finite if all entries of the product are."""
        dims = [tuple(range(self.leading, factor.ndim)) for factor in self.factors]
        left, right = tree_norms.separate_norms(self.factors, dims, [(), ()], 2)
        highest = arithmetic.largest(self.factors[0], dims[0]) * arithmetic.largest(self.factors[1], dims[1])
        whole = left * right
        whole = jnp.where(jnp.isfinite(highest), jnp.minimum(whole, jnp.finfo(whole.dtype).max), highest)
        return tree_norms.norm_of_norms(whole.reshape(-1), (), 2)


def as_array(value: Any) -> Any:
    """Returns the array that a value is or stands for."""
    return value.array() if isinstance(value, Outer) else value


def evaluate(function: Callable[..., Any], *args: Any) -> Any:
    """Returns `function(*args)`, with an `Outer` for each leaf that is an outer product.

    If this jax's jaxprs can't be read, every leaf is an array.
    """
    if not reading.IS_POSSIBLE:
        return function(*args)
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
    found = _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(args))
    return jax.tree.unflatten(jax.tree.structure(shape), found)


def _evaluate(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    values: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    for equation in jaxpr.eqns:
        found = _carry_out(jaxpr, equation, [reading.value_of(variable, values) for variable in equation.invars])
        values.update(zip(equation.outvars, found, strict=True))
    return [reading.value_of(variable, values) for variable in jaxpr.outvars]


def _carry_out(jaxpr: Any, equation: Any, values: list[Any]) -> list[Any]:
    name = equation.primitive.name
    if name == "jit":  # it may return an outer product
        inner = equation.params["jaxpr"]
        return _evaluate(inner.jaxpr, inner.consts, values)
    first = values[0] if values else None

    def carried_out() -> list[Any]:
        return reading.carry_out(jaxpr, equation, [as_array(value) for value in values])

    if name in _SAME_NORM and isinstance(first, Outer) and _keeps_norm(equation):
        return [Outer(first.factors, first.leading, lambda: carried_out()[0])]
    if name == "dot_general" and _is_outer(equation):
        leading = equation.params["dimension_numbers"][1]
        arrays = [as_array(value) for value in values]
        left, right = (jnp.moveaxis(x, dims, range(len(dims))) for x, dims in zip(arrays, leading, strict=True))
        return [Outer((left, right), len(leading[0]), lambda: carried_out()[0])]
    return carried_out()


def _keeps_norm(equation: Any) -> bool:
    """Whether a conversion only rounds: it drops no imaginary part, and its range is no narrower."""
    before, after = (variable.aval.dtype for variable in (equation.invars[0], equation.outvars[0]))
    if not (jnp.issubdtype(before, jnp.inexact) and jnp.issubdtype(after, jnp.inexact)):
        return False
    is_same_kind = jnp.issubdtype(before, jnp.complexfloating) == jnp.issubdtype(after, jnp.complexfloating)
    return is_same_kind and jnp.finfo(after).maxexp >= jnp.finfo(before).maxexp


def _is_float(variable: Any) -> bool:
    return jnp.issubdtype(variable.aval.dtype, jnp.inexact)


def _is_outer(equation: Any) -> bool:
    """Whether a product sums over nothing and is larger than its factors."""
    left, right = (variable.aval for variable in equation.invars)
    (product,) = (variable.aval for variable in equation.outvars)
    ((summed, _), _) = equation.params["dimension_numbers"]
    one_each = math.prod(left.shape[dim] for dim in summed) == 1
    return one_each and _is_float(equation.outvars[0]) and product.size > left.size + right.size
