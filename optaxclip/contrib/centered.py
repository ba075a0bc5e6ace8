"""Clips the distance of a gradient from the last update, instead of its norm."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip import thresholds
from optaxclip._arguments import bounds, checks
from optaxclip._arguments.bounds import Bound
from optaxclip._arrays import dtypes, mesh, states
from optaxclip._arrays.beside import each_leaf, zeros_like
from optaxclip._arrays.parameters import drop_missing, fill_missing, parameters
from optaxclip._arrays.trees import Tree
from optaxclip._numerics import arithmetic
from optaxclip.clippers.momentum import clip_together
from optaxclip.core import Leaves, Updates


class CenteredClipState(NamedTuple):
    """State of `centered_clip`.

    Attributes:
      clip_center: like the parameters, the last update.
      bound_state: `bounds.ScheduleState` if the bound follows a schedule, else `optax.EmptyState()`.
    """

    clip_center: Updates
    bound_state: bounds.ScheduleState | optax.EmptyState


def centered_clip(
    max_norm: Bound, *, state_dtype: jax.typing.DTypeLike | None = None, axes: mesh.Axes = "auto"
) -> optax.GradientTransformationExtraArgs:
    r"""Moves the update towards the gradient, by a global norm of at most `max_norm` per step.

    .. math:: v \leftarrow v + (g - v) \min(1, c / \|g - v\|)

    The updates start at 0. With a gradient of norm 100 and a bound of 1, they need 100 steps to reach it.

    Args:
      max_norm: the bound c on the distance between gradient and last update, at least 0, in the units of the gradient:
        a number, an array, or an optax schedule. :math:`\tau` in the paper.
      state_dtype: dtype of the last update, a real float dtype of at least 16 bits. None: the parameter's dtype, or
        float32 if that has fewer than 32 bits.
      axes: which mesh axes split the leaves; see `clip_by`.

    Returns:
      An optax transformation. Its state is one number per coordinate. A schedule adds a step count.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.contrib.centered_clip(1.0)
      >>> params = jnp.zeros(2)
      >>> update, state = jax.jit(tx.update), tx.init(params)
      >>> for grads in ([0.0, 0.5], [30.0, 0.5], [0.5, 0.5]):  # the second is a spike
      ...     updates, state = update(jnp.array(grads), state, params)
      ...     print(updates)
      [0.  0.5]
      [1.  0.5]
      [0.5 0.5]

    Notes:
      - Guarantees: the update differs from the last one by a norm of at most `max_norm * (1 + 1e-5)` in float32. A
        gradient within `max_norm` of the last update is returned unchanged, however large it is.
      - Edge cases: a non-finite gradient is returned unchanged, and the next step starts from the update before it.
        With a bound of 0, all updates are 0; inf clips nothing.
      - Precision: with a `state_dtype` of 16 bits, the update may never reach the gradient: in bfloat16, steps of 0.01
        stop at 4.
      - Placement: before Adam. Or after the momentum of SGD and before the learning rate, since the paper clips
        momenta: `chain(optax.ema(0.9, debias=False), contrib.centered_clip(1.0), scale_by_learning_rate(0.1))`.
      - Differs from the paper: the paper clips the momenta of many workers around one centre and averages them, so that
        a minority of bad workers has little effect. This is the case of one worker and one iteration: it bounds how
        fast the update changes. It does not protect against a bad worker if the gradients were averaged over workers
        before. The paper leaves the first centre open; public implementations start at 0, too.

    References:
      Karimireddy, He, Jaggi, Learning from history for Byzantine robust optimization, ICML 2021, arXiv:2012.10333.

    See also:
      `clipped_momentum`, which bounds the average itself; `contrib.clip_norm_growth`, which bounds the growth of the
      norm.

      Notebook: `notebooks/stability.ipynb`, over which range of step sizes clipped methods converge.
    """
    checks.static_together(state_dtype=state_dtype)
    checks.bound("max_norm", max_norm, single=True)
    dtype = checks.state_dtype(state_dtype)
    checks.axes(axes)
    threshold = thresholds.constant(max_norm)

    # At least 32 bits: in 16 bits, small steps are soon below half the distance to the next number, and are lost.
    def init(params: Tree) -> CenteredClipState:
        return CenteredClipState(zeros_like(parameters(params), dtype, min_bits=32), bounds.init(max_norm))

    def update(updates: Updates, state: Tree, params: Tree = None, **extra: Any) -> tuple[Updates, CenteredClipState]:
        del extra
        state = states.of_kind(CenteredClipState, state, "centered_clip")
        params = parameters(params, updates)
        filled = fill_missing(updates, state.clip_center)
        mesh.require_reduced(filled)
        away, _ = each_leaf(lambda grad, center: (_away(grad, center), center), filled, state.clip_center)
        clipped, judged = clip_together(threshold, Leaves(away, params, axes), state.bound_state)
        within, finite = judged.norms <= judged.limits, jnp.isfinite(judged.norms)

        def move(grad: Any, center: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            moved = arithmetic.saturated(center.astype(step.dtype) + step, bounds.highest(step.dtype))
            moved = jnp.where(within, jnp.asarray(grad).astype(step.dtype), moved)
            kept = jnp.where(finite, arithmetic.narrowed(moved, center.dtype), center)
            return jnp.where(within | ~finite, grad, arithmetic.narrowed(moved, jnp.result_type(grad))), kept, step

        out, center, _ = each_leaf(move, filled, state.clip_center, clipped)
        return drop_missing(updates, out), CenteredClipState(center, judged.state)

    return optax.GradientTransformationExtraArgs(init, update)


def _away(grad: Any, center: jax.Array) -> jax.Array:
    """Gradient minus centre, in the wider of their dtypes or float32; finite if the gradient is."""
    grad = jnp.asarray(grad)
    wide = np.promote_types(dtypes.wide(grad.dtype), dtypes.wide(center.dtype))
    away = arithmetic.saturated(grad.astype(wide) - center.astype(wide), bounds.highest(wide))
    return jnp.where(jnp.isfinite(grad), away, grad.astype(wide))
