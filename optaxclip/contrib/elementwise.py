"""Clips of single coordinates without a kink."""

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
    r"""Keeps every coordinate below `max_delta` in modulus, without a kink.

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
        leaf's dtype. It is right over the whole float range, in the value and in the derivative. A coordinate
        below 1.7e-4 of `max_delta`, where float32 has no number between it and the result, is returned bit for bit.
      - Edge cases: an infinite coordinate becomes `max_delta`, NaN passes. A bound of 0 gives zeros, inf changes
        nothing. Complex coordinates keep their direction, and their modulus is bounded. Integer, boolean, float0 and
        key leaves pass untouched.
      - Placement: before the optimizer. It changes the direction of the gradient, and shrinks ordinary coordinates,
        too: by 1 % at 0.17 of `max_delta`.
      - Differs from the papers: they analyse classes of clips without a kink, not this one alone, and name no bound
        that would do as a default.

    References:
      Williamson, Eisenmann, Stillfjord, Analysis of a class of stochastic component-wise soft-clipping schemes, 2024,
      arXiv:2406.16640.

      Armacki, Bajović, Jakovetić, Kar, Sharp high-probability rates for nonlinear SGD under heavy-tailed noise via
      symmetrization, 2025, arXiv:2507.09093.

    See also:
      `clip`, with a kink; `contrib.arcsinh_clip`, which keeps large coordinates apart; `smooth_clip_by_global_norm`,
      which keeps the direction.

      Notebook: `notebooks/which_clipper.ipynb`, all methods compared, with `clip`.
    """
    checks.bound("max_delta", max_delta)
    return optax.GradientTransformationExtraArgs(*by_leaf(functools.partial(_squash_leaf, _TANH), max_delta))


def arcsinh_clip(scale: Bound) -> optax.GradientTransformationExtraArgs:
    r"""Replaces coordinates beyond `scale` by about their logarithm, so that large ones shrink and stay in order.

    .. math:: u_i \leftarrow c \operatorname{arsinh}(u_i / c)

    There is no bound: the result grows by 2.3 `scale` with every factor of 10.

    Args:
      scale: c, at least 0, in the units of the gradient: a number, an array, an optax schedule, or a prefix pytree of
        these. A coordinate of `scale` becomes 0.88 of it, one of 100 times as much 5.3.

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
      - Guarantees: no coordinate grows, and none changes its sign. It is right over the whole float range, in the value
        and in the derivative. A coordinate below 1.7e-4 of `scale`, where float32 has no number between it and the
        result, is returned bit for bit.
      - Edge cases: an infinite coordinate counts as the largest number of its dtype: 89 times `scale` for a scale of 1
        in float32. NaN passes. A scale of 0 gives zeros, inf changes nothing. Complex coordinates keep their
        direction; what shrinks is the modulus. Integer, boolean, float0 and key leaves pass untouched.
      - Placement: before the optimizer. It changes the direction of the gradient, and shrinks ordinary coordinates,
        too: by 1 % at 0.25 of `scale`.
      - Differs from the paper: it analyses a class of clips without a kink, not this one alone. The form with a scale
        is that of the sampler nutpie, in its triangular_adapter.py.

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
    """An odd function of slope 1 at 0 that flattens, for arguments of at least 0.

    Attributes:
      value: (size, scale) -> the function at size / scale, a quotient that may be no float.
      slope: its derivative, from that quotient.
    """

    value: Callable[[jax.Array, jax.Array], jax.Array]
    slope: Callable[[jax.Array], jax.Array]


def _ratio(size: jax.Array, scale: jax.Array) -> jax.Array:
    """size / scale, which may be no float."""
    # Behind a barrier, because XLA (jax 0.8 to 0.12) multiplies by the reciprocal of a scale that is a constant, and
    # that of 1e38 is subnormal, so 0.
    return arithmetic.quotient(size, jax.lax.optimization_barrier(scale))


_FAR = 2.0**60  # from here on the arsinh of x is log(2 x)


def _arcsinh(size: jax.Array, scale: jax.Array) -> jax.Array:
    ratio = _ratio(size, scale)
    logarithm = jnp.log(jnp.maximum(size, scale)) - jnp.log(scale) + np.log(2.0)
    return jnp.where(ratio > _FAR, logarithm, jnp.arcsinh(jnp.minimum(ratio, _FAR)))


def _slope_of_arcsinh(x: jax.Array) -> jax.Array:
    near = jnp.minimum(x, 2.0**30)  # the square of a much larger one is no float
    return jnp.where(x > near, 1 / jnp.maximum(x, 1), 1 / jnp.sqrt(1 + near * near))


def _slope_of_tanh(x: jax.Array) -> jax.Array:
    near = jnp.minimum(x, 40.0)  # the square of the cosh of a much larger one is no float
    return jnp.where(x > near, 0, 1 / jnp.square(jnp.cosh(near)))


_TANH = _Curve(lambda size, scale: jnp.tanh(_ratio(size, scale)), _slope_of_tanh)
_ARCSINH = _Curve(_arcsinh, _slope_of_arcsinh)


def _squash_leaf(curve: _Curve, leaf: jax.Array, scale: Any) -> jax.Array:
    scale = jnp.asarray(bounds.as_array(scale, dtypes.accumulator(leaf.dtype)))
    return _squash(curve, leaf, of_rank(jnp.maximum(scale, 0), leaf.ndim))


# At module level and jitted, so that it is traced once for all leaves of a kind.
@functools.partial(jax.jit, static_argnums=0)
def _squash(curve: _Curve, leaf: jax.Array, scale: jax.Array) -> jax.Array:
    """A leaf, each modulus n of which becomes `scale * curve(n / scale)`."""
    modulus = arithmetic.modulus(leaf)
    size = jnp.minimum(modulus, bounds.highest(leaf.dtype))  # an infinite one counts as the largest
    info = jnp.finfo(size.dtype)
    has_scale = scale >= info.tiny  # a subnormal scale is 0
    squashed = _on_curve(curve, size, jnp.where(has_scale & (scale < jnp.inf), scale, jnp.ones_like(scale)))
    # Rounded, the result may be larger than what came in.
    goal = jnp.where(has_scale | jnp.isnan(size), jnp.minimum(squashed, size), jnp.zeros_like(size))
    # Below this the curve is a straight line: what it takes away is x^3 / 6 or x^3 / 3, a part of the last place.
    is_kept = (has_scale & (modulus <= scale * (float(np.sqrt(info.eps)) / 2))) | jnp.isnan(scale)
    if jnp.iscomplexobj(leaf):
        return jnp.where(is_kept, leaf, brought_to(leaf, goal))
    return jnp.where(is_kept, leaf, jnp.where(leaf < 0, -goal, goal).astype(leaf.dtype))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _on_curve(curve: _Curve, size: jax.Array, scale: jax.Array) -> jax.Array:
    return scale * curve.value(size, scale)


@_on_curve.defjvp
def _on_curve_jvp(curve: _Curve, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """By formulas of the quotient alone: the derivative of a division squares the denominator, which may underflow."""
    (size, scale), (d_size, d_scale) = primals, tangents
    value = curve.value(size, scale)
    x = jnp.minimum(_ratio(size, scale), 2.0**126)
    slope = curve.slope(x)
    return scale * value, slope * d_size + (value - x * slope) * d_scale
