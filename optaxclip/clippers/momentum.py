"""Clipping inside momentum: the average itself is clipped, and the clipped average is kept."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip import norms, thresholds
from optaxclip._arguments import bounds, checks
from optaxclip._arguments.bounds import Bound, Number
from optaxclip._arrays import mesh, states
from optaxclip._arrays.beside import each_leaf, zeros_like
from optaxclip._arrays.parameters import drop_missing, fill_missing, parameters
from optaxclip._arrays.trees import Tree
from optaxclip._numerics import arithmetic, averages
from optaxclip.core import Judged, Leaves, Threshold, Updates, apply, judge


class ClippedMomentumState(NamedTuple):
    """State of `clipped_momentum`.

    Attributes:
      clipped_average: like the parameters, the average after clipping.
      bound_state: `bounds.ScheduleState` if the bound follows a schedule, else `optax.EmptyState()`.
    """

    clipped_average: Updates
    bound_state: bounds.ScheduleState | optax.EmptyState


def clipped_momentum(
    max_norm: Bound, decay: Number = 0.9, *, state_dtype: jax.typing.DTypeLike | None = None, axes: mesh.Axes = "auto"
) -> optax.GradientTransformationExtraArgs:
    r"""Averages the gradients, and clips the stored average by its global norm.

    .. math:: d \leftarrow \operatorname{clip}(\beta d + (1 - \beta) g,\ c)

    Args:
      max_norm: the bound c, at least 0, in the units of the gradient: a number, an array, or an optax schedule.
      decay: :math:`\beta`, in [0, 1). 0 is clipped gradient descent.
      state_dtype: dtype of the average, a real float dtype of at least 16 bits. None: the parameter's dtype, or float32
        if that has fewer than 16 bits.
      axes: which mesh axes split the leaves; see `clip_by`.

    Returns:
      An optax transformation. Its state is one number per coordinate. A schedule adds a step count.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.clipped_momentum(1.0)
      >>> params = jnp.zeros(2)
      >>> update, state = jax.jit(tx.update), tx.init(params)
      >>> for grads in ([3.0, 4.0], [30.0, 40.0]):
      ...     updates, state = update(jnp.array(grads), state, params)
      ...     print(updates.round(3))
      [0.3 0.4]
      [0.6 0.8]

    Notes:
      - Guarantees: the norm of the update is at most `max_norm * (1 + 1e-5)` in float32.
      - Edge cases: the average starts at 0 and is not debiased. A non-finite gradient is returned unchanged and does
        not enter the average.
      - Placement: in place of an optimizer's momentum: `chain(clipped_momentum(1.0), scale_by_learning_rate(0.1))`.
      - Differs from the paper: there is no public code to compare with. Keeping the clipped average follows the usual
        statement of the method. The other common form clips the output and keeps the unclipped average:
        `chain(optax.ema(0.9, debias=False), clip_by_global_norm(1.0))`.

    References:
      Mai, Johansson, Stability and convergence of stochastic gradient clipping: beyond Lipschitz continuity and
      smoothness, ICML 2021, arXiv:2102.06489.

    See also:
      `contrib.mixed_clip`; `clip_by_global_norm` for clipped descent; `smooth_clip_by_global_norm` for normalised
      descent.

      Notebook: `notebooks/stability.ipynb`, over which range of step sizes clipped methods converge.
    """
    checks.static_together(state_dtype=state_dtype)
    checks.bound("max_norm", max_norm, single=True)
    decay = checks.number("decay", decay, below=1.0)
    dtype = checks.state_dtype(state_dtype)
    checks.axes(axes)
    threshold = thresholds.constant(max_norm)

    def init(params: Tree) -> ClippedMomentumState:
        return ClippedMomentumState(zeros_like(parameters(params), dtype), bounds.init(max_norm))

    def update(
        updates: Updates, state: Tree, params: Tree = None, **extra: Any
    ) -> tuple[Updates, ClippedMomentumState]:
        del extra
        state = states.of_kind(ClippedMomentumState, state, "clipped_momentum")
        params = parameters(params, updates)
        filled = fill_missing(updates, state.clipped_average)
        mesh.require_reduced(filled)
        average = averaged(filled, state.clipped_average, decay)
        clipped, judged = clip_together(threshold, Leaves(average, params, axes), state.bound_state)
        finite = jnp.isfinite(judged.norms)
        kept = where(finite, clipped, state.clipped_average)
        out = where(finite, in_dtypes_of(filled, clipped), filled)
        return drop_missing(updates, out), ClippedMomentumState(kept, judged.state)

    return optax.GradientTransformationExtraArgs(init, update)


def clip_together(threshold: Threshold, leaves: Leaves, state: Tree) -> tuple[Updates, Judged]:
    """The updates, clipped by their global norm, and what was measured."""
    norm = norms.global_norm()
    judged = judge(norm, threshold, leaves, state)
    return apply(norm, leaves, judged.factors), judged


def averaged(updates: Updates, average: Updates, decay: Number) -> Updates:
    """The moving average after this step, in its own dtypes."""

    def one(leaf: Any, old: jax.Array) -> tuple[Any, jax.Array]:
        return leaf, arithmetic.narrowed(averages.moved_widened(old, leaf, decay), old.dtype)

    return each_leaf(one, updates, average)[1]


def where(flag: jax.Array, new: Updates, old: Updates) -> Updates:
    """`new` if the flag is set, else `old`; leaves without floats are those of `new`."""
    return each_leaf(lambda new, old: (jnp.where(flag, new, old), old), new, old)[0]


def in_dtypes_of(updates: Updates, values: Updates) -> Updates:
    """`values` in the dtypes of `updates`; leaves without floats are those of `updates`."""
    return each_leaf(lambda leaf, value: (arithmetic.narrowed(value, jnp.result_type(leaf)), value), updates, values)[0]
