"""A threshold that is relative to the parameters."""

from typing import Any

import jax
import jax.numpy as jnp

from optaxclip._arguments import bounds, checks
from optaxclip._arrays import groups
from optaxclip.core import Threshold
from optaxclip.thresholds.fixed import from_bounds


def relative_to_params(ratio: bounds.Bound, *, floor: bounds.Bound = 0.0, offset: bounds.Bound = 0.0) -> Threshold:
    r"""Bounds a norm by :math:`ratio \cdot \max(\|w\|, floor) + offset`, with w the parameters of its group.

    Args:
      ratio: the permitted share of the parameters' norm, at least 0: the kinds that `constant` takes.
      floor: parameters with a smaller norm count as `floor`, so that zero-initialised parameters can move. At least 0,
        of the same kinds as `ratio`.
      offset: added to the bound, at least 0, in the units of the norm, of the same kinds as `ratio`.

    Returns:
      A Threshold without state. A schedule adds a step count.

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

      LARC, the clip of NVIDIA apex, before SGD: no step changes a leaf by more than 0.02 of its norm.

      >>> import optax
      >>> rate = optax.exponential_decay(0.5, 1000, 0.5)
      >>> larc = clip_by(norms.leaf_norm(), thresholds.relative_to_params(lambda step: 0.02 / rate(step)))
      >>> tx = optax.chain(larc, optax.sgd(rate))
      >>> updates, _ = tx.update(jnp.array([30.0, 40.0]), tx.init(params), params)
      >>> print([round(float(each), 3) for each in updates])  # a norm of 0.02 * 5
      [-0.06, -0.08]

    Notes:
      - Edge cases: without `floor` and `offset`, parameters of norm 0 never move. If the norm of the parameters is
        non-finite, there is no bound.
      - LARC: momentum comes after the clip, as in apex.
      - Differs from apex: a leaf whose parameters are all 0 is not clipped by apex, but stays 0 here unless you pass
        `floor=`. apex multiplies weight decay by the same factor, and adds the norm of the weight decay to that of the
        gradient. Here, put `optax.add_decayed_weights` before the clip: the bound then applies to the norm of the sum.

    References:
      You, Gitman, Ginsburg, Large batch training of convolutional networks, arXiv:1708.03888, 2017 (LARS).
      LARC in NVIDIA apex, with its default of clipping.

    See also:
      `adaptive_grad_clip`; `norms.relative_change`, for single coordinates.
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
