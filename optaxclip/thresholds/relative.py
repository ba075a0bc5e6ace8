"""The threshold that is relative to the parameters."""

from typing import Any

import jax
import jax.numpy as jnp

from optaxclip._arguments import bounds, checks
from optaxclip._arrays import groups
from optaxclip.core import Threshold
from optaxclip.thresholds.fixed import from_bounds


def relative_to_params(ratio: bounds.Bound, *, floor: bounds.Bound = 0.0, offset: bounds.Bound = 0.0) -> Threshold:
    r"""A norm may be at most :math:`ratio \cdot \max(\|w\|, floor) + offset`, w being the parameters of its group.

    Args:
      ratio: share of the parameters' norm, at least 0: as for `constant`.
      floor: parameters with a smaller norm count as this large, so that zero-initialised ones can move; likewise.
      offset: what is permitted besides, in the units of the norm; likewise.

    Returns:
      A Threshold without state; with a schedule it counts its steps.

    Edge cases:
      Parameters of norm 0, without `floor` and `offset`, let nothing through, and stay 0 for ever. Parameters whose
      norm is infinite or NaN bound nothing.

    Raises:
      ValueError: if an argument is negative or NaN; at update, without `params`.

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip import clip_by, norms, thresholds
      >>> tx = clip_by(norms.leaf_norm(), thresholds.relative_to_params(0.1, floor=1e-3))
      >>> params = jnp.array([3.0, 4.0])
      >>> updates, _ = tx.update(jnp.array([30.0, 40.0]), tx.init(params), params)
      >>> print(updates)
      [0.3 0.4]

    See also:
      `adaptive_grad_clip`; `norms.relative_change`, by single coordinates.
    """
    checks.bound("ratio", ratio)
    checks.bound("floor", floor)
    checks.bound("offset", offset)

    def permitted(norm: jax.Array, share: Any, low: Any, more: Any) -> jax.Array:
        if share is None:
            return jnp.full_like(norm, bounds.highest(norm.dtype))
        share, low, more = [bounds.as_array(value, norm.dtype, none=0) for value in (share, low, more)]
        return jnp.asarray(share * jnp.maximum(norm, low) + more)

    return from_bounds(
        lambda norms, param_norms, *given: (0.0, groups.over_groups(permitted, param_norms(), *given)),
        ratio,
        floor,
        offset,
    )
