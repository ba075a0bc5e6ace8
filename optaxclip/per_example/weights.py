"""Weights of the examples in a batch: 0 for padding, or how much each example is worth.

A gradient is clipped first and weighted afterwards, so an example adds at most its weight times the bound.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip._arguments import checks
from optaxclip._arrays import dtypes, layouts
from optaxclip.per_example.problems import Problem, Weights

_LARGEST_EXPONENT = 126  # the reciprocal of 2^127 is subnormal


class Shares(NamedTuple):
    """The weights of the examples, for sums and means.

    Attributes:
      relative: the weight of each example, as a multiple of `unit`; None if all weights are 1.
      unit: a power of two near the largest weight, so that sums of weighted gradients do not underflow.
      total: the sum of `relative` over all examples on all devices.
    """

    relative: Weights
    unit: jax.Array | int
    total: jax.Array | int

    def sum(self, weighted: jax.Array) -> jax.Array:
        """Returns the weighted sum, given a sum by relative weights."""
        return weighted if self.relative is None else weighted * jnp.asarray(self.unit, _real(weighted))

    def mean(self, weighted: jax.Array) -> jax.Array:
        """Returns the weighted mean, given a sum by relative weights; 0 if the weights add up to 0."""
        if self.relative is None:
            return weighted / self.total
        total = jnp.asarray(self.total, _real(weighted))
        mean = weighted / jnp.where(total == 0, jnp.ones_like(total), total)
        return jnp.where(total == 0, jnp.zeros_like(mean), mean)


def of_call(problem: Problem, number: int, weights: Any) -> Shares:
    """Returns the shares of the examples, of which this device has `number`.

    Raises:
      ValueError: if `weights` is no vector of that many real numbers, or varies over more mesh axes than the examples.
    """
    if weights is None:
        return Shares(None, 1, number * math.prod(jax.lax.axis_size(name) for name in problem.apart))
    require_vector(number, weights)
    given = jnp.asarray(weights)
    if more := layouts.varying(given) - set(problem.apart):
        raise ValueError(
            f"weights differ between devices along mesh axes {tuple(sorted(more))}, but examples do not: shard weights "
            "like the first axis of the batch"
        )
    wide = layouts.varying_over(given.astype(dtypes.accumulator(given.dtype)), problem.apart)
    finite = jnp.where(counts(wide), wide, jnp.zeros_like(wide))
    largest = jnp.max(jax.lax.stop_gradient(jnp.abs(finite)))
    unit = _power_of_two_at_least(jax.lax.pmax(largest, problem.apart) if problem.apart else largest)
    relative = finite / unit
    total = jnp.sum(relative)
    total = jax.lax.psum(total, problem.apart) if problem.apart else total
    return Shares(relative, unit, total)


def counts(weights: jax.Array) -> jax.Array:
    """Whether each weight, in float32 or wider, counts: it is finite, and neither 0 nor subnormal."""
    # Subnormals are 0 on most devices, in comparisons and sums, but may differ from 0 on others.
    return jnp.isfinite(weights) & (jnp.abs(weights) >= jnp.finfo(weights.dtype).tiny)


def require_free(fun: Callable[..., Any], args: Sequence[Any]) -> None:
    """Raises ValueError if `fun` has an argument `weights` that these positional arguments do not fill."""
    try:
        names = list(inspect.signature(fun).parameters)
    except (TypeError, ValueError):  # a C function
        return
    if "weights" in names[len(args) :]:
        raise ValueError(
            "weights= takes the weights of the examples, but the function has an argument of that name: pass it by "
            "position, or rename it"
        )


def require_vector(number: int, weights: Any) -> None:
    """Raises ValueError unless `weights` is a vector of that many real numbers or booleans."""
    is_array = isinstance(weights, jax.Array | np.ndarray) and (weights.dtype == bool or checks.is_real(weights))
    if not is_array or weights.shape != (number,):
        got = f"{weights.dtype} of shape {weights.shape}" if hasattr(weights, "dtype") else repr(weights)
        raise ValueError(f"weights must be an array of {number} real numbers, one per example, got {got}")


def _real(array: jax.Array) -> Any:
    return dtypes.accumulator(array.dtype)


def _power_of_two_at_least(x: jax.Array) -> jax.Array:
    """Returns the smallest power of two that is at least x; 1 for 0."""
    mantissa, exponent = jnp.frexp(x)
    exponent = jnp.where(mantissa == 0.5, exponent - 1, exponent)
    exponent = jnp.minimum(exponent, jnp.full_like(exponent, _LARGEST_EXPONENT))
    return jnp.ldexp(jnp.ones_like(x), jnp.where(x > 0, exponent, jnp.zeros_like(exponent)))
