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
    r"""Clips every coordinate to at most `max_delta` in modulus, like `optax.clip`.

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
      - Guarantees: a clipped coordinate is exactly `max_delta`, rounded to the leaf's dtype. If that dtype can't hold
        `max_delta`, it is the largest number of that dtype. Coordinates within the bound are returned unchanged.
      - Edge cases: an infinite coordinate is clipped; NaN stays NaN. A bound of 0 gives zeros; inf changes nothing.
        Complex coordinates keep their direction and are clipped by modulus. Integer, boolean, float0 and key leaves are
        returned unchanged.
      - Placement: before the optimizer. Clipping by value changes the direction of the gradient; clipping by norm does
        not.
      - Differs from the paper: Mikolov clips the errors that flow back into the hidden neurons, to [-15, 15]. Use
        `clip_cotangents` with `clip(15.0)` for that. This function clips the complete gradient of the parameters.

    References:
      Mikolov, Statistical Language Models Based on Neural Networks, PhD thesis, Brno University of Technology, 2012.

    See also:
      `clip_by_value` for separate ends, `clip_by_global_norm` to keep the direction.

      Notebook: `notebooks/exploding_gradients.ipynb`, why gradients explode and vanish.
    """
    checks.bound("max_delta", max_delta)

    def interval(high: Any, dtype: Any) -> tuple[Any, Any]:
        # A traced negative bound can't be refused. It acts as 0, so that no coordinate changes its sign.
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
        of these. None means no lower end.
      max_value: the upper end, of the same kinds. If the two cross, the upper end wins.

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
      - Guarantees: as for `clip`, at each end.
      - Edge cases: an infinite coordinate is clipped if there is an end on its side; NaN stays NaN. Complex coordinates
        keep their direction and are clipped by modulus; a coordinate of 0 stays 0. Integer, boolean, float0 and key
        leaves are returned unchanged.
      - Placement: before the optimizer. An interval that is not symmetric about 0 biases the gradient.
      - Differs from PyTorch: PyTorch has one bound for both sides, as `clip` has.

    References:
      `torch.nn.utils.clip_grad_value_`.

    See also:
      `clip` for an interval around 0.

      Notebook: `notebooks/exploding_gradients.ipynb`, why gradients explode and vanish, with `clip`.
    """
    if min_value is None and max_value is None:
        raise ValueError("min_value and max_value are both None: pass at least one of them")
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
        Integer, boolean, float0 and key leaves are returned unchanged.
      - Placement: before the clipper: `chain(zero_nonfinite(), clip_by_global_norm(1.0), adam(1e-3))`. It hides the
        cause of the failure, and a gradient with zeroed coordinates points in another direction. To skip and count the
        whole step instead, use `skip_nonfinite`.
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
    """Clips each coordinate to `interval(*bounds, dtype)`."""

    def clip_leaf(leaf: jax.Array, *ends: Any) -> jax.Array:
        low, high = interval(*ends, dtypes.accumulator(leaf.dtype))
        return _clip_modulus(leaf, low, high) if jnp.iscomplexobj(leaf) else _between(leaf, low, high)

    return optax.GradientTransformationExtraArgs(*by_leaf(clip_leaf, *given))


def by_leaf(clip_leaf: Callable[..., jax.Array], *given: Bound) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`init` and `update` of a transformation that applies `clip_leaf(leaf, *bounds)` to every leaf of floats."""

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


# At module level and jitted, so that leaves of one shape and dtype share one trace.
@jax.jit
def _between(leaf: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """A leaf of real numbers, clipped to two ends, which are in float32 or wider."""
    wide = low.dtype
    has_low, has_high = jnp.isfinite(low) | (low > 0), jnp.isfinite(high) | (high < 0)  # an infinite end is no end
    largest = bounds.highest(leaf.dtype)
    low, high = (_usable_end(end, largest).astype(leaf.dtype) for end in (low, high))
    low, high, has_low, has_high = (of_rank(end, leaf.ndim) for end in (low, high, has_low, has_high))
    above = has_high & (leaf.astype(wide) >= _next(high.astype(wide), 1))
    below = has_low & (leaf.astype(wide) <= _next(low.astype(wide), -1))
    return jnp.where(above | below, jnp.where(above, high, low), leaf)


def of_rank(end: jax.Array, ndim: int) -> jax.Array:
    """An end with as many dimensions as the leaf; a scalar stays a scalar."""
    return jnp.expand_dims(end, range(ndim - end.ndim)) if end.ndim else end


def _usable_end(end: Any, largest: float) -> jax.Array:
    """An end that the leaf's dtype can hold; 0 if it is subnormal, since XLA (jax 0.8 to 0.12) compares it as 0."""
    end = arithmetic.saturated(jnp.asarray(end), largest)
    return jnp.where(jnp.abs(end) < jnp.finfo(end.dtype).tiny, jnp.zeros_like(end), end)


def _next(end: jax.Array, direction: int) -> jax.Array:
    """The next float32, or wider, above or below an end. Coordinates are compared with that number.

    In a comparison with the end itself, XLA (jax 0.8 to 0.12) turns the selects into a minimum and a maximum, which
    flush subnormals. The next number in the leaf's own dtype may not exist: in a dtype without infinity, it is NaN
    beyond the largest number.
    """
    end = jax.lax.stop_gradient(end)  # `nextafter` has no derivative, and a comparison needs none
    return jnp.nextafter(end, jnp.full_like(end, direction * jnp.finfo(end.dtype).max))


def _clip_modulus(leaf: jax.Array, low: Any, high: Any) -> jax.Array:
    modulus = arithmetic.modulus(leaf)
    goal = jnp.where(modulus > high, high, jnp.where(modulus < low, low, modulus))
    return jnp.where(goal == modulus, leaf, brought_to(leaf, goal))


def brought_to(leaf: jax.Array, goal: jax.Array) -> jax.Array:
    """Complex numbers of the modulus `goal`, each in its own direction."""
    direction = _direction(leaf)
    return scaling.rescale(direction, scaling.factor(arithmetic.modulus(direction), goal))


def _direction(leaf: jax.Array) -> jax.Array:
    """The numbers, with each infinite one replaced by a finite one of the same direction."""
    parts = (jnp.real(leaf), jnp.imag(leaf))
    is_nan = jnp.isnan(parts[0]) | jnp.isnan(parts[1])
    infinite = (jnp.isinf(parts[0]) | jnp.isinf(parts[1])) & ~is_nan
    unit = jax.lax.complex(*(jnp.where(jnp.isinf(part), jnp.sign(part), jnp.zeros_like(part)) for part in parts))
    return jnp.where(infinite, unit, leaf)
