"""Clippers whose bound is one of the last norms, or an estimate of a quantile."""

import optax

from optaxclip import norms, thresholds
from optaxclip._arguments import checks
from optaxclip._arguments.bounds import Number
from optaxclip._arrays.mesh import Axes
from optaxclip.core import Norm, clip_by


def percentile_clip(
    percentile: Number = 5.0,
    *,
    window: int = 100,
    norm: Norm = norms.leaf_norm(),
    axes: Axes = "auto",
    record: int = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips the norm of each leaf to one of its last norms, chosen so that `percentile` percent of them are smaller.

    .. math:: u \leftarrow u \cdot \min(1, s_k / n), \qquad k = \min(\lfloor p w / 100 \rfloor, w - 1)

    The first norm fills the whole window, so it is not bounded. If your run can explode at once, put a fixed clip in
    front: `chain(clip_by_leaf_norm(1.0), contrib.percentile_clip())`.

    Args:
      percentile: p in [0, 100]; 5 in bitsandbytes; 100 clips nothing. A number between 0 and 1 raises a warning,
        because it may be meant as a fraction.
      window: w, how many norms are kept, the current one included; at least 1; 100 in bitsandbytes. s is the window in
        ascending order.
      norm: what to measure, from `optaxclip.norms`. Each group has its own history.
      axes: which mesh axes split the leaves; see `clip_by`.
      record: how many of the last steps to record for `clip_stats`; see `clip_by`.

    Returns:
      An optax transformation. Per group, its state is 4 bytes per norm of the window, and 4 more.

    Raises:
      ValueError: if `percentile` or `window` is out of range.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.contrib.percentile_clip(25.0, window=4)
      >>> update, state = jax.jit(tx.update), tx.init(jnp.zeros(1))
      >>> for norm in (2.0, 1.0, 4.0):  # the window is 1, 2, 2, 4
      ...     updates, state = update(jnp.array([norm]), state)
      >>> print(updates)
      [2.]

    Notes:
      - Guarantees: as for `clip_by`. The direction of each group is kept.
      - Edge cases: as for `clip_by`. Zero and non-finite norms do not enter the history.
      - Placement: before the optimizer.
      - Differs from bitsandbytes: bitsandbytes keeps squares, which overflow. Here the norms themselves are kept, and
        norms of 0 stay out.

    References:
      `percentile_clipping` of the bitsandbytes optimizers, up to version 0.49.

    See also:
      `autoclip`, which interpolates and measures the norm of all leaves together.

      Notebook: `notebooks/which_clipper.ipynb`, all methods compared.
    """
    checks.static_together(window=window, record=record)
    return clip_by(norm, thresholds.order_statistic(percentile, window=window), axes=axes, record=record)


def clip_by_tracked_quantile(
    quantile: Number = 0.5,
    *,
    learning_rate: Number = 0.2,
    initial: Number = 1.0,
    norm: Norm = norms.global_norm(),
    axes: Axes = "auto",
    record: int = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips each norm to an estimate of a quantile of the norms, with one number of state.

    .. math:: c \leftarrow c \cdot \exp(-\eta (1[n \le c] - q))

    The first bound is `initial`, whatever the norms are.

    Args:
      quantile: q in [0, 1], the share of norms that are not clipped; 0.5 in the paper.
      learning_rate: :math:`\eta`, the learning rate of the logarithm of the bound, at least 0; 0.2 in the paper, which
        averages over 100 norms per step.
      initial: the first bound, positive and finite. At the defaults the bound grows tenfold in 24 steps.
      norm: what to measure, from `optaxclip.norms`. Each group has its own history.
      axes: which mesh axes split the leaves; see `clip_by`.
      record: how many of the last steps to record for `clip_stats`; see `clip_by`.

    Returns:
      An optax transformation. Its state is one float per group.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.contrib.clip_by_tracked_quantile(0.5)
      >>> update, state = jax.jit(tx.update), tx.init(jnp.zeros(1))
      >>> for norm in (2.0, 2.0):
      ...     updates, state = update(jnp.array([norm]), state)
      >>> print(f"{updates[0]:.4f}")  # the exponential of 0.2 times 0.5
      1.1052

      With a decaying learning rate, the bound settles:

      >>> import optax
      >>> tx = optax.inject_hyperparams(optaxclip.contrib.clip_by_tracked_quantile)(
      ...     learning_rate=optax.exponential_decay(0.2, 1000, 0.1, end_value=0.02)
      ... )

    Notes:
      - Guarantees: as for `clip_by`. The direction of each group is kept.
      - Edge cases: as for `clip_by`. Zero and non-finite norms do not enter the history.
      - Precision: with one norm per step, the logarithm of the bound moves in steps of `learning_rate` times q. It
        reaches the quantile within 24 to 55 steps, then wanders around it with a standard deviation of 0.12 to 0.25.
      - Placement: before the optimizer.
      - Differs from the paper: there is no noise, so it is not private. It sees one norm per step; the paper sees the
        share over the clients of a round.

    References:
      Andrew, Thakkar, McMahan, Ramaswamy, Differentially private learning with adaptive clipping, NeurIPS 2021,
      arXiv:1905.03871.

    See also:
      `autoclip`, which is exact and needs no learning rate.

      Notebook: `notebooks/choosing_a_threshold.ipynb`, how to choose a bound.
    """
    quantile = checks.number("quantile", quantile, at_most=1.0)
    threshold = thresholds.tracked_quantile(quantile, learning_rate=learning_rate, initial=initial)
    return clip_by(norm, threshold, axes=axes, record=record)
