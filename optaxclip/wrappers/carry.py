"""Adds what a clip removes to the gradient of the next step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip._arguments import bounds, checks
from optaxclip._arrays import dtypes, mesh, states, trees
from optaxclip._arrays.beside import each_leaf, require_beside, zeros_like
from optaxclip._arrays.parameters import drop_missing, fill_missing, parameters
from optaxclip._arrays.trees import Tree
from optaxclip._numerics import arithmetic
from optaxclip.core import Updates


class CarryState(NamedTuple):
    """State of `with_carry`.

    Attributes:
      carry: like the parameters, what was clipped away and not yet added back.
      inner_state: the state of the wrapped transformation.
    """

    carry: Updates
    inner_state: Tree


def with_carry(
    inner: optax.GradientTransformation, *, state_dtype: jax.typing.DTypeLike | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Adds what a clipper removed to the next gradient, which removes the bias of clipping.

    .. math:: u \leftarrow \operatorname{clip}(g + c), \qquad c \leftarrow g + c - u

    The carry grows without limit while the *mean* gradient is beyond the bound; see the Notes.

    Args:
      inner: the clipper, or a chain of clippers. Pass no optimizer: its changes would be carried too.
      state_dtype: dtype of the carry, a real float dtype of at least 16 bits. None: the parameter's dtype, or float32
        if that has fewer than 16 bits. In 16 bits the carry is rounded at every step.

    Returns:
      An optax transformation. Its state is one number per coordinate, and the inner state.

    Raises:
      ValueError: if `inner` is not a transformation, or `state_dtype` is not such a dtype; at update, if a gradient
        inside `shard_map` has not been reduced yet.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.with_carry(optaxclip.clip(2.0))
      >>> update, state = jax.jit(tx.update), tx.init(jnp.zeros(1))
      >>> for grad in (5.0, -1.0, -1.0, -1.0):
      ...     updates, state = update(jnp.array([grad]), state)
      ...     print(updates[0], state.carry[0])
      2.0 3.0
      2.0 0.0
      -1.0 0.0
      -1.0 0.0

    Notes:
      - Guarantees: the updates keep the bound of `inner`. The sum of all updates so far, plus the carry, is the sum of
        all gradients so far, up to rounding.
      - Growth: while the mean gradient is beyond the bound, the carry grows by the difference at every step. Runs that
        clip all of their first steps are an example. The carry is added back much later, as fast as the bound allows,
        so the parameters overshoot. To avoid this, clip without a carry until the mean gradient is within the bound,
        then start with a fresh carry.
      - Non-finite gradients: a coordinate whose gradient or update is non-finite keeps its carry, and its update is
        that of `inner`. A clip by norm then returns the other coordinates of the group unclipped, with their whole
        carry. If that can happen, put `skip_nonfinite` around `with_carry`.
      - Overflow: if gradient plus carry exceeds the largest float, the largest float takes its place.
      - Placement: in place of the clipper: `chain(with_carry(clip(1.0)), sgd(1e-3))`. The proofs are for clips of
        coordinates and of norms, and for plain gradient descent.

    References:
      Elesedy, Hutter, U-Clip: on-average unbiased stochastic gradient clipping, 2023, arXiv:2302.02971.

    See also:
      `clip`, `clip_by_global_norm`.

      Notebook: `notebooks/bias.ipynb`, the bias of clipping and its cure.
    """
    checks.static_together(state_dtype=state_dtype)
    checks.transformation("inner", inner)
    dtype = checks.state_dtype(state_dtype)
    wrapped = optax.with_extra_args_support(inner)

    def init(params: Tree) -> CarryState:
        return CarryState(zeros_like(parameters(params), dtype), wrapped.init(params))

    def update(updates: Updates, state: Tree, params: Tree = None, **extra_args: Any) -> tuple[Updates, CarryState]:
        state = states.of_kind(CarryState, state, "with_carry")
        filled = fill_missing(updates, state.carry)
        require_beside(filled, state.carry)
        mesh.require_reduced(filled, state.carry, called="carry")
        # A parameter whose gradient is missing gets no update, so its carry must not count in a norm.
        usable = _where_missing(updates, jax.tree.map(jnp.zeros_like, state.carry), state.carry)
        total, _ = each_leaf(lambda grad, carry: (_total(grad, carry).astype(_dtype(grad)), carry), filled, usable)
        clipped, inner_state = wrapped.update(total, state.inner_state, params, **extra_args)
        _, carry, _ = each_leaf(_left_over, filled, state.carry, clipped)
        carry = _where_missing(updates, state.carry, carry)
        return drop_missing(updates, clipped), CarryState(carry, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _where_missing(updates: Updates, then: Any, otherwise: Any) -> Any:
    """`then` where `updates` has None, `otherwise` where it has an array."""
    return jax.tree.map(
        lambda grad, one, other: one if grad is None else other,
        updates,
        then,
        otherwise,
        is_leaf=trees.is_none,
    )


def _dtype(leaf: Any) -> Any:
    return jnp.result_type(leaf)


def _total(grad: Any, carry: Any) -> Any:
    """Gradient plus carry, in the wider dtype; finite in the gradient's dtype if the gradient is."""
    wide = np.promote_types(dtypes.wide(_dtype(grad)), dtypes.wide(_dtype(carry)))
    grad = jnp.asarray(grad)
    total = arithmetic.saturated(grad.astype(wide) + carry.astype(wide), bounds.highest(grad.dtype))
    return jnp.where(jnp.isfinite(grad), total, grad.astype(wide))


def _left_over(grad: Any, carry: Any, clipped: Any) -> tuple[Any, Any, Any]:
    total = _total(grad, carry)
    rest = arithmetic.narrowed(total - jnp.asarray(clipped).astype(total.dtype), carry.dtype)
    usable = jnp.isfinite(jnp.asarray(grad)) & jnp.isfinite(clipped)
    return grad, jnp.where(usable, rest, carry), clipped
