"""Whether the norms of a step are finite and within their band, the same on all devices."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from optaxclip import core
from optaxclip._arrays import groups, mesh


class Verdict(NamedTuple):
    """What the decision to skip is based on. Both are boolean scalars.

    Attributes:
      finite: whether all norms, and so all measured gradients, are finite.
      high: whether all norms are finite, and one is above the upper end of its band.
    """

    finite: jax.Array
    high: jax.Array


_HIGH, _NOT_FINITE = 1, 2


def of_norms(judged: core.Judged, leaves: core.Leaves) -> Verdict:
    """The verdict over all groups and all devices."""
    codes = jax.tree.leaves(groups.over_groups(_code, judged.norms, judged.limits))
    worst = jnp.zeros((), jnp.int32)
    for each in codes:
        worst = jnp.maximum(worst, jnp.max(each, initial=0))
    if any(each.ndim for each in codes):  # units, which may be on different devices
        axes = mesh.may_vary_over(worst, leaves.axes)
        worst = jax.lax.pmax(worst, axes) if axes else worst
    return Verdict(finite=worst < _NOT_FINITE, high=worst == _HIGH)


def _code(norm: jax.Array, limit: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(norm), (norm > limit).astype(jnp.int32) * _HIGH, _NOT_FINITE)
