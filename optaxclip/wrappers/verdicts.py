"""What the norms of a step say of it, the same on all devices."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from optaxclip import core
from optaxclip._arrays import groups, mesh


class Verdict(NamedTuple):
    """What a skip decides by. Both are boolean scalars.

    Attributes:
      finite: whether all norms are finite. That tells whether all gradients that were measured are.
      high: whether all are finite, and some norm is above the upper end of its band.
    """

    finite: jax.Array
    high: jax.Array


_HIGH, _NOT_FINITE = 1, 2


def of_norms(judged: core.Judged, leaves: core.Leaves) -> Verdict:
    """The verdict on all groups together, on all devices."""
    codes = jax.tree.leaves(groups.over_groups(_code, judged.norms, judged.limits))
    worst = jnp.zeros((), jnp.int32)
    for each in codes:
        worst = jnp.maximum(worst, jnp.max(each, initial=0))
    if any(each.ndim for each in codes):  # units, which may lie on different devices
        axes = mesh.may_vary_over(worst, leaves.axes)
        worst = jax.lax.pmax(worst, axes) if axes else worst
    return Verdict(finite=worst < _NOT_FINITE, high=worst == _HIGH)


def _code(norm: jax.Array, limit: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(norm), (norm > limit).astype(jnp.int32) * _HIGH, _NOT_FINITE)
