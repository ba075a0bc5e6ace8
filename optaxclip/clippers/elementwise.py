"""Clippers of single coordinates: no norm, so plain transformations."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optaxclip._arguments import bounds, checks
from optaxclip._arguments.bounds import Bound
from optaxclip._arrays import dtypes, groups, mesh
from optaxclip._arrays.beside import each_leaf
from optaxclip._arrays.trees import Tree
from optaxclip._numerics import arithmetic, scaling
from optaxclip.core import State, Updates


def clip(max_delta: Bound) -> optax.GradientTransformationExtraArgs:
    r"""Clips every coordinate to at most `max_delta` in modulus; name and argument as in optax.

    .. math:: u_i \leftarrow \min(\max(u_i, -\delta), \delta)

    Args:
      max_delta: the bound, at least 0, in the units of the gradient: a number, an array, an optax schedule, or a prefix
        pytree of these.

    Returns:
      A transformation without state (`optax.EmptyState`). A schedule adds a step count.

    Raises:
      ValueError: if `max_delta` is negative or NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.clip(1.0)
      >>> updates, _ = tx.update(jnp.array([0.5, -3.0, jnp.inf]), tx.init(None))
      >>> print(updates)
      [ 0.5 -1.   1. ]

    Notes:
      - Guarantees: a clipped coordinate is exactly `max_delta`, rounded to the leaf's dtype, or the largest number of
        that dtype if `max_delta` is beyond it. Coordinates within the bound are returned unchanged.
      - Edge cases: an infinite coordinate is clipped, NaN passes. A bound of 0 gives zeros, inf changes nothing.
        Complex coordinates keep their direction and are clipped by modulus. Integer, boolean, float0 and key leaves
        pass untouched.
      - Placement: before the optimizer. Clipping by value changes the direction of the gradient; clipping by norm does
        not.
      - Differs from the paper: Mikolov clips the errors that flow back into the hidden neurons, to [-15, 15]. That is
        `clip_cotangents` with `clip(15.0)`. This clips the complete gradient of the parameters.

    References:
      Mikolov, Statistical Language Models Based on Neural Networks, PhD thesis, Brno University of Technology, 2012.

    See also:
      `clip_by_value` for separate ends, `clip_by_global_norm` to keep the direction.

      Notebook: `notebooks/exploding_gradients.ipynb`, why gradients explode and vanish.
    """
    checks.bound("max_delta", max_delta)

    def interval(high: Any, dtype: Any) -> tuple[Any, Any]:
        # A traced bound can't be refused when it is negative. As 0 it at least turns no coordinate around.
        high = jnp.maximum(bounds.as_array(high, dtype), 0)
        return -high, high

    return _clip_values(interval, max_delta)


def clip_by_value(
    min_value: Bound | None = None, max_value: Bound | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Clips every coordinate to the interval from `min_value` to `max_value`.

    .. math:: u_i \leftarrow \min(\max(u_i, min), max)

    Args:
      min_value: the lower end, in the units of the gradient: a number, an array, an optax schedule, or a prefix pytree
        of these. None is no lower end.
      max_value: the upper end, of the same kinds. It wins where the two cross.

    Returns:
      A transformation without state (`optax.EmptyState`). A schedule adds a step count.

    Raises:
      ValueError: if both ends are None, one is NaN, or `min_value` is larger than `max_value`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.clip_by_value(-1.0, 2.0)
      >>> updates, _ = tx.update(jnp.array([-3.0, 0.5, 3.0]), tx.init(None))
      >>> print(updates)
      [-1.   0.5  2. ]

    Notes:
      - Guarantees: as for `clip`, with either end for the bound.
      - Edge cases: an infinite coordinate is clipped where there is an end on its side, NaN passes. Complex coordinates
        keep their direction and are clipped by modulus; a coordinate of 0 stays 0. Integer, boolean, float0 and key
        leaves pass untouched.
      - Placement: before the optimizer. Intervals that are not symmetric about 0 shift the mean of the gradient, which
        is a bias.
      - Differs from PyTorch: there one bound serves both sides, as in `clip`.

    References:
      `torch.nn.utils.clip_grad_value_`.

    See also:
      `clip` for an interval around 0.

      Notebook: `notebooks/exploding_gradients.ipynb`, why gradients explode and vanish, with `clip`.
    """
    if min_value is None and max_value is None:
        raise ValueError("give min_value, max_value, or both; got None for both")
    low = -jnp.inf if min_value is None else min_value
    high = jnp.inf if max_value is None else max_value
    checks.bound("min_value", low, signed=True)
    checks.bound("max_value", high, signed=True)
    checks.ordered("min_value", low, "max_value", high)
    return _clip_values(
        lambda low, high, dtype: (bounds.as_array(low, dtype, none=-math.inf), bounds.as_array(high, dtype)),
        low,
        high,
    )


def zero_nonfinite() -> optax.GradientTransformationExtraArgs:
    r"""Sets every coordinate that is infinite or NaN to 0.

    .. math:: u_i \leftarrow u_i \text{ if finite, else } 0

    Returns:
      A transformation without state (`optax.EmptyState`).

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.zero_nonfinite()
      >>> updates, _ = tx.update(jnp.array([1.0, jnp.nan, -jnp.inf]), tx.init(None))
      >>> print(updates)
      [1. 0. 0.]

    Notes:
      - Guarantees: finite coordinates are returned unchanged. A complex coordinate is finite if both parts are.
        Integer, boolean, float0 and key leaves pass untouched.
      - Placement: before the clipper: `chain(zero_nonfinite(), clip_by_global_norm(1.0), adam(1e-3))`. It hides what
        goes wrong, and a gradient with holes points elsewhere. `skip_nonfinite` skips the whole step and counts it.
      - Differs from optax: `optax.zero_nans` lets infinity pass, and records in its state which leaves had a NaN.

    References:
      `optax.zero_nans`.

    See also:
      `skip_nonfinite`, `clip`.

      Notebook: `notebooks/which_clipper.ipynb`, all methods compared.
    """

    def init(params: Tree) -> State:
        del params
        return optax.EmptyState()

    def update(updates: Updates, state: State, params: Tree = None, **extra_args: Any) -> tuple[Updates, State]:
        del params, extra_args
        mesh.require_reduced(updates)
        (zeroed,) = each_leaf(lambda leaf: (jnp.where(jnp.isfinite(leaf), leaf, jnp.zeros_like(leaf)),), updates)
        return zeroed, state

    return optax.GradientTransformationExtraArgs(init, update)


def _clip_values(interval: Callable[..., tuple[Any, Any]], *given: Bound) -> optax.GradientTransformationExtraArgs:
    """A clip of each coordinate to `interval(*bounds, dtype)`."""

    def clip_leaf(leaf: jax.Array, *ends: Any) -> jax.Array:
        low, high = interval(*ends, dtypes.accumulator(leaf.dtype))
        return _clip_modulus(leaf, low, high) if jnp.iscomplexobj(leaf) else _between(leaf, low, high)

    return optax.GradientTransformationExtraArgs(*by_leaf(clip_leaf, *given))


def by_leaf(clip_leaf: Callable[..., jax.Array], *given: Bound) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`init` and `update` of what does `clip_leaf(leaf, *bounds)` with every leaf of floats."""

    def init(params: Tree) -> State:
        del params
        return bounds.init(*given)

    def update(updates: Updates, state: State, params: Tree = None, **extra_args: Any) -> tuple[Updates, State]:
        del params, extra_args
        mesh.require_reduced(updates)
        resolved, state = bounds.resolve(given, state, updates)
        flat, treedef = jax.tree.flatten(updates)
        clipped = [
            clip_leaf(jnp.asarray(leaf), *ends) if dtypes.is_inexact(leaf) else leaf
            for leaf, *ends in zip(flat, *(groups.entries(bound, treedef) for bound in resolved), strict=True)
        ]
        return treedef.unflatten(clipped), state

    return init, update


# At module level and jitted, so that it is traced once for all leaves of a kind.
@jax.jit
def _between(leaf: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """A leaf of real numbers within two ends, which are in float32 or wider."""
    wide = low.dtype
    has_low, has_high = jnp.isfinite(low) | (low > 0), jnp.isfinite(high) | (high < 0)  # as infinities they are none
    largest = bounds.highest(leaf.dtype)
    low, high = (_usable_end(end, largest).astype(leaf.dtype) for end in (low, high))
    low, high, has_low, has_high = (of_rank(end, leaf.ndim) for end in (low, high, has_low, has_high))
    above = has_high & (leaf.astype(wide) >= _next(high.astype(wide), 1))
    below = has_low & (leaf.astype(wide) <= _next(low.astype(wide), -1))
    return jnp.where(above | below, jnp.where(above, high, low), leaf)


def of_rank(end: jax.Array, ndim: int) -> jax.Array:
    """An end for all coordinates as it is, one of fewer dimensions than the leaf with as many."""
    return jnp.expand_dims(end, range(ndim - end.ndim)) if end.ndim else end


def _usable_end(end: Any, largest: float) -> jax.Array:
    """An end that a leaf can hold, 0 for a subnormal one: XLA (jax 0.8 to 0.12) compares that as 0."""
    end = arithmetic.saturated(jnp.asarray(end), largest)
    return jnp.where(jnp.abs(end) < jnp.finfo(end.dtype).tiny, jnp.zeros_like(end), end)


def _next(end: jax.Array, direction: int) -> jax.Array:
    """The float32, or wider, next to an end, upwards or downwards. That is what a coordinate is compared with.

    Compared with the end itself, the selects are a minimum and a maximum to XLA (jax 0.8 to 0.12), which flush
    subnormals. The leaf's own dtype need not have a next number: beyond the largest one that is NaN where there is no
    infinity.
    """
    end = jax.lax.stop_gradient(end)  # `nextafter` has no derivative, and a comparison needs none
    return jnp.nextafter(end, jnp.full_like(end, direction * jnp.finfo(end.dtype).max))


def _clip_modulus(leaf: jax.Array, low: Any, high: Any) -> jax.Array:
    modulus = arithmetic.modulus(leaf)
    goal = jnp.where(modulus > high, high, jnp.where(modulus < low, low, modulus))
    return jnp.where(goal == modulus, leaf, brought_to(leaf, goal))


def brought_to(leaf: jax.Array, goal: jax.Array) -> jax.Array:
    """Complex numbers of the modulus `goal`, each in its direction."""
    direction = _direction(leaf)
    return scaling.rescale(direction, scaling.factor(arithmetic.modulus(direction), goal))


def _direction(leaf: jax.Array) -> jax.Array:
    """A finite number of the same direction, where a complex number is infinite."""
    parts = (jnp.real(leaf), jnp.imag(leaf))
    is_nan = jnp.isnan(parts[0]) | jnp.isnan(parts[1])
    infinite = (jnp.isinf(parts[0]) | jnp.isinf(parts[1])) & ~is_nan
    unit = jax.lax.complex(*(jnp.where(jnp.isinf(part), jnp.sign(part), jnp.zeros_like(part)) for part in parts))
    return jnp.where(infinite, unit, leaf)
