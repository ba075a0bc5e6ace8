"""Smooth clips of single coordinates."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip._arguments import bounds, checks
from optaxclip._arguments.bounds import Bound
from optaxclip._arrays import dtypes
from optaxclip._numerics import arithmetic
from optaxclip.clippers.elementwise import brought_to, by_leaf, of_rank


def tanh_clip(max_delta: Bound) -> optax.GradientTransformationExtraArgs:
    r"""Smoothly keeps every coordinate below `max_delta` in modulus.

    .. math:: u_i \leftarrow \delta \tanh(u_i / \delta)

    Args:
      max_delta: the bound :math:`\delta`, at least 0, in the units of the gradient: a number, an array, an optax
        schedule, or a prefix pytree of these. A coordinate of `max_delta` becomes 0.76 of it.

    Returns:
      A transformation without state (`optax.EmptyState`). A schedule adds a step count.

    Raises:
      ValueError: if `max_delta` is negative or NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.contrib.tanh_clip(1.0)
      >>> updates, _ = tx.update(jnp.array([0.1, 1.0, -3.0, jnp.inf]), tx.init(None))
      >>> print([round(float(each), 3) for each in updates])
      [0.1, 0.762, -0.995, 1.0]

    Notes:
      - Guarantees: no coordinate grows, none changes its sign, and none is larger than `max_delta` rounded to the
        leaf's dtype. Value and derivative are accurate over the whole float range. A coordinate below 1.7e-4 of
        `max_delta` is returned unchanged: in float32 the result rounds to it.
      - Edge cases: an infinite coordinate becomes `max_delta`; NaN stays NaN. A bound of 0 gives zeros; inf changes
        nothing. Complex coordinates keep their direction, and their modulus is bounded. Integer, boolean, float0 and
        key leaves are returned unchanged.
      - Placement: before the optimizer. It changes the direction of the gradient. It also shrinks ordinary coordinates:
        by 1 % at 0.17 of `max_delta`.
      - Differs from the papers: they analyse classes of smooth clips, not only this one, and name no default bound.

    References:
      Williamson, Eisenmann, Stillfjord, Analysis of a class of stochastic component-wise soft-clipping schemes, 2024,
      arXiv:2406.16640.

      Armacki, Bajović, Jakovetić, Kar, Sharp high-probability rates for nonlinear SGD under heavy-tailed noise via
      symmetrization, 2025, arXiv:2507.09093.

    See also:
      `clip`, which is not smooth; `contrib.arcsinh_clip`, which keeps large coordinates apart;
      `smooth_clip_by_global_norm`, which keeps the direction.

      Notebook: `notebooks/which_clipper.ipynb`, all methods compared, with `clip`.
    """
    checks.bound("max_delta", max_delta)
    return optax.GradientTransformationExtraArgs(*by_leaf(functools.partial(_squash_leaf, _TANH), max_delta))


def arcsinh_clip(scale: Bound) -> optax.GradientTransformationExtraArgs:
    r"""Compresses coordinates beyond `scale` roughly logarithmically: large ones shrink but keep their order.

    .. math:: u_i \leftarrow c \operatorname{arsinh}(u_i / c)

    There is no bound: for every factor of 10, the result grows by 2.3 times `scale`.

    Args:
      scale: c, at least 0, in the units of the gradient: a number, an array, an optax schedule, or a prefix pytree of
        these. A coordinate of `scale` becomes 0.88 of it. A coordinate of 100 times `scale` becomes 5.3 times `scale`.

    Returns:
      A transformation without state (`optax.EmptyState`). A schedule adds a step count.

    Raises:
      ValueError: if `scale` is negative or NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.contrib.arcsinh_clip(1.0)
      >>> updates, _ = tx.update(jnp.array([0.1, 1.0, -100.0, 1e6]), tx.init(None))
      >>> print([round(float(each), 3) for each in updates])
      [0.1, 0.881, -5.298, 14.509]

    Notes:
      - Guarantees: no coordinate grows, and none changes its sign. Value and derivative are accurate over the whole
        float range. A coordinate below 1.7e-4 of `scale` is returned unchanged: in float32 the result rounds to it.
      - Edge cases: an infinite coordinate counts as the largest number of its dtype. In float32, with a scale of 1, it
        becomes 89. NaN stays NaN. A scale of 0 gives zeros; inf changes nothing. Complex coordinates keep their
        direction, and their modulus shrinks. Integer, boolean, float0 and key leaves are returned unchanged.
      - Placement: before the optimizer. It changes the direction of the gradient. It also shrinks ordinary coordinates:
        by 1 % at 0.25 of `scale`.
      - Differs from the paper: it analyses a class of smooth clips, not only this one. The form with a scale is from
        the sampler nutpie, in its triangular_adapter.py.

    References:
      Williamson, Eisenmann, Stillfjord, Analysis of a class of stochastic component-wise soft-clipping schemes, 2024,
      arXiv:2406.16640.

    See also:
      `contrib.tanh_clip`, which has a bound; `clip`.

      Notebook: `notebooks/which_clipper.ipynb`, all methods compared, with `clip`.
    """
    checks.bound("scale", scale)
    return optax.GradientTransformationExtraArgs(*by_leaf(functools.partial(_squash_leaf, _ARCSINH), scale))


class _Curve(NamedTuple):
    """An odd function with slope 1 at 0 that flattens; for arguments of at least 0.

    Attributes:
      value: (size, scale) -> the function at size / scale, a quotient that may overflow.
      slope: quotient -> the derivative.
    """

    value: Callable[[jax.Array, jax.Array], jax.Array]
    slope: Callable[[jax.Array], jax.Array]


def _ratio(size: jax.Array, scale: jax.Array) -> jax.Array:
    """size / scale, which may overflow."""
    # The barrier keeps XLA (jax 0.8 to 0.12) from multiplying by the reciprocal of a constant scale: the reciprocal of
    # 1e38 is subnormal, which counts as 0.
    return arithmetic.quotient(size, jax.lax.optimization_barrier(scale))


_FAR = 2.0**60  # beyond this, the arsinh of x is log(2 x)


def _arcsinh(size: jax.Array, scale: jax.Array) -> jax.Array:
    ratio = _ratio(size, scale)
    logarithm = jnp.log(jnp.maximum(size, scale)) - jnp.log(scale) + np.log(2.0)
    return jnp.where(ratio > _FAR, logarithm, jnp.arcsinh(jnp.minimum(ratio, _FAR)))


def _slope_of_arcsinh(x: jax.Array) -> jax.Array:
    near = jnp.minimum(x, 2.0**30)  # the square of a much larger x overflows
    return jnp.where(x > near, 1 / jnp.maximum(x, 1), 1 / jnp.sqrt(1 + near * near))


def _slope_of_tanh(x: jax.Array) -> jax.Array:
    near = jnp.minimum(x, 40.0)  # the square of the cosh of a much larger x overflows
    return jnp.where(x > near, 0, 1 / jnp.square(jnp.cosh(near)))


_TANH = _Curve(lambda size, scale: jnp.tanh(_ratio(size, scale)), _slope_of_tanh)
_ARCSINH = _Curve(_arcsinh, _slope_of_arcsinh)


def _squash_leaf(curve: _Curve, leaf: jax.Array, scale: Any) -> jax.Array:
    scale = jnp.asarray(bounds.as_array(scale, dtypes.accumulator(leaf.dtype)))
    return _squash(curve, leaf, of_rank(jnp.maximum(scale, 0), leaf.ndim))


# At module level and jitted, so that leaves of one shape and dtype share one trace.
@functools.partial(jax.jit, static_argnums=0)
def _squash(curve: _Curve, leaf: jax.Array, scale: jax.Array) -> jax.Array:
    """The leaf, with each modulus n brought to `scale * curve(n / scale)`."""
    modulus = arithmetic.modulus(leaf)
    size = jnp.minimum(modulus, bounds.highest(leaf.dtype))  # inf counts as the largest float
    info = jnp.finfo(size.dtype)
    has_scale = scale >= info.tiny  # a subnormal scale is 0
    squashed = _on_curve(curve, size, jnp.where(has_scale & (scale < jnp.inf), scale, jnp.ones_like(scale)))
    # By rounding, the result may exceed the input.
    goal = jnp.where(has_scale | jnp.isnan(size), jnp.minimum(squashed, size), jnp.zeros_like(size))
    # Below this, the curve is a straight line in floating point: the difference is x^3 / 6 or x^3 / 3, less than one
    # ulp.
    is_kept = (has_scale & (modulus <= scale * (float(np.sqrt(info.eps)) / 2))) | jnp.isnan(scale)
    if jnp.iscomplexobj(leaf):
        return jnp.where(is_kept, leaf, brought_to(leaf, goal))
    return jnp.where(is_kept, leaf, jnp.where(leaf < 0, -goal, goal).astype(leaf.dtype))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _on_curve(curve: _Curve, size: jax.Array, scale: jax.Array) -> jax.Array:
    return scale * curve.value(size, scale)


@_on_curve.defjvp
def _on_curve_jvp(curve: _Curve, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """Formulas that use only the quotient: the derivative of a division squares the scale, which may underflow."""
    (size, scale), (d_size, d_scale) = primals, tangents
    value = curve.value(size, scale)
    x = jnp.minimum(_ratio(size, scale), 2.0**126)
    slope = curve.slope(x)
    return scale * value, slope * d_size + (value - x * slope) * d_scale
