"""Clips a gradient and its average separately, and mixes them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip import thresholds
from optaxclip._arguments import bounds, checks
from optaxclip._arguments.bounds import Bound, Number
from optaxclip._arrays import mesh, states
from optaxclip._arrays.beside import each_leaf, zeros_like
from optaxclip._arrays.parameters import drop_missing, fill_missing, parameters
from optaxclip._arrays.trees import Tree
from optaxclip._numerics import arithmetic, averages
from optaxclip.clippers.momentum import averaged, clip_together, where
from optaxclip.core import Leaves, Updates


class MixedClipState(NamedTuple):
    """State of `mixed_clip`.

    Attributes:
      mixed_average: like the parameters, the average of the gradients.
      bound_state: `bounds.ScheduleState` if the bound follows a schedule, else `optax.EmptyState()`.
    """

    mixed_average: Updates
    bound_state: bounds.ScheduleState | optax.EmptyState


def mixed_clip(
    max_norm: Bound,
    *,
    decay: Number = 0.999,
    mix: Number = 0.7,
    smooth: bool = False,
    state_dtype: jax.typing.DTypeLike | None = None,
    axes: mesh.Axes = "auto",
) -> optax.GradientTransformationExtraArgs:
    r"""Mixes the clipped average of the gradients with the clipped gradient.

    .. math:: u \leftarrow \nu \operatorname{clip}(m, c) + (1 - \nu) \operatorname{clip}(g, c), \qquad
        m \leftarrow \beta m + (1 - \beta) g

    Args:
      max_norm: the bound c on both, at least 0: a number, an array, or an optax schedule. In the paper it is
        :math:`\gamma / \eta`, with :math:`\eta` the learning rate.
      decay: :math:`\beta`, in [0, 1); 0.999 in the paper.
      mix: :math:`\nu`, the share of the average, in [0, 1]; 0.7 in the paper. 1 is momentum clipping; 0 is clipped
        descent.
      smooth: whether to use the smooth clip x c / (c + n), as in the published code, instead of x min(1, c / n).
      state_dtype: dtype of the average, a real float dtype of at least 16 bits. None: the parameter's dtype, or float32
        if that has fewer than 16 bits.
      axes: which mesh axes split the leaves; see `clip_by`.

    Returns:
      An optax transformation. Its state is one number per coordinate. A schedule adds a step count.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.contrib.mixed_clip(1.0, decay=0.9)
      >>> params = jnp.zeros(2)
      >>> updates, _ = tx.update(jnp.array([3.0, 4.0]), tx.init(params), params)
      >>> print(updates.round(3))  # 0.7 of (0.3, 0.4) and 0.3 of (0.6, 0.8)
      [0.39 0.52]

    Notes:
      - Guarantees: the norm of the update is at most `max_norm * (1 + 1e-5)` in float32.
      - Edge cases: the average starts at 0, is not debiased, and is kept unclipped. A non-finite gradient is returned
        unchanged and does not enter the average.
      - Placement: in place of an optimizer's momentum: `chain(contrib.mixed_clip(1.0), scale_by_learning_rate(0.1))`.
      - Differs from the paper: the bound is the paper's divided by the learning rate, so that the learning rate can
        follow in the chain.

    References:
      Zhang B., Jin, Fang, Wang, Improved analysis of clipping algorithms for non-convex optimization, NeurIPS 2020,
      arXiv:2010.02519.

    See also:
      `clipped_momentum`, which keeps the clipped average.

      Notebook: `notebooks/which_clipper.ipynb`, all methods compared.
    """
    checks.static_together(smooth=smooth, state_dtype=state_dtype)
    checks.bound("max_norm", max_norm, single=True)
    decay = checks.number("decay", decay, below=1.0)
    mix = checks.number("mix", mix, at_most=1.0)
    checks.flag("smooth", smooth)
    dtype = checks.state_dtype(state_dtype)
    checks.axes(axes)
    threshold = thresholds.smooth(max_norm) if smooth else thresholds.constant(max_norm)

    def init(params: Tree) -> MixedClipState:
        return MixedClipState(zeros_like(parameters(params), dtype), bounds.init(max_norm))

    def update(updates: Updates, state: Tree, params: Tree = None, **extra: Any) -> tuple[Updates, MixedClipState]:
        del extra
        state = states.of_kind(MixedClipState, state, "mixed_clip")
        params = parameters(params, updates)
        filled = fill_missing(updates, state.mixed_average)
        mesh.require_reduced(filled)
        average = averaged(filled, state.mixed_average, decay)
        clipped_average, judged = clip_together(threshold, Leaves(average, params, axes), state.bound_state)
        clipped, _ = clip_together(threshold, Leaves(filled, params, axes), state.bound_state)
        finite = jnp.isfinite(judged.norms)
        kept = where(finite, average, state.mixed_average)

        def one(grad: Any, old: jax.Array) -> tuple[jax.Array, jax.Array]:
            return arithmetic.narrowed(averages.moved_widened(old, grad, mix), jnp.result_type(grad)), old

        mixed, _ = each_leaf(one, clipped, clipped_average)
        return drop_missing(updates, where(finite, mixed, filled)), MixedClipState(kept, judged.state)

    return optax.GradientTransformationExtraArgs(init, update)
