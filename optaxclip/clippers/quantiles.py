"""Clippers whose bound is a quantile of the norms so far."""

import optax

from optaxclip import norms, thresholds
from optaxclip._arguments import checks
from optaxclip._arguments.bounds import Number
from optaxclip._arrays.mesh import Axes
from optaxclip.core import Norm, clip_by


def autoclip(
    percentile: Number = 10.0,
    *,
    window: int | None = None,
    warmup_steps: int = 25,
    warmup_max_norm: Number | None = 1.0,
    norm: Norm = norms.global_norm(),
    axes: Axes = "auto",
    record: int = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips each norm to a percentile of all norms so far, the current one included.

    .. math:: u \leftarrow u \cdot \min(1, c_t / n_t), \qquad c_t = \mathrm{percentile}(\{n_1, \dots, n_t\}, p)

    During the warm-up, norms are also clipped to `warmup_max_norm`, by default 1. With `warmup_max_norm=None`, the
    first norm is its own percentile and is not clipped.

    Args:
      percentile: p in [0, 100], interpolated linearly as in `numpy.percentile`. 10 in the paper, which clips nine of
        ten gradients. A number between 0 and 1 raises a warning, because it may be meant as a fraction.
      window: how many of the last norms count, at least 1; the percentile is then exact. None keeps the whole history:
        exact for the first 64 norms, then as a histogram.
      warmup_steps: how many norms `warmup_max_norm` also bounds; at least 0.
      warmup_max_norm: bound on the norm in the warm-up, positive. Raw norms enter the history, so a high percentile
        needs a longer warm-up. None, as in the paper, bounds by the percentile alone.
      norm: what to measure, from `optaxclip.norms`. Each group has its own history.
      axes: which mesh axes split the leaves; see `clip_by`.
      record: how many of the last steps to record for `clip_stats`; see `clip_by`.

    Returns:
      An optax transformation. Its state per group is 4 bytes per norm of the window. Without a window it is a histogram
      of 40 KiB, for at most 1,024 groups.

    Raises:
      ValueError: if an argument is out of range; at init, without a window and with more than 1,024 groups.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.autoclip(10.0)
      >>> update, state = jax.jit(tx.update), tx.init(jnp.zeros(1))
      >>> for norm in (1.0, 2.0, 0.5, 4.0):
      ...     updates, state = update(jnp.array([norm]), state)
      >>> print(f"{updates[0]:.2f}")  # three tenths of the way from 0.5 to 1
      0.65

    Notes:
      - Guarantees: as for `clip_by`. The direction of each group is kept. The percentile of the histogram is accurate
        to 0.9 %, over the whole float range.
      - Edge cases: as for `clip_by`. Zero and non-finite norms do not enter the history.
      - Level shifts: the whole history forgets nothing. After 500 steps, the bound needs about 4,600 more to follow a
        tenfold rise. With a window of 100, it needs 90.
      - Placement: before the optimizer. The updates have about the norm of the p-th percentile, so with SGD raise the
        learning rate.
      - Differs from the paper: the paper has no bound at the start, so a run that explodes in its first steps does not
        recover. The paper keeps all norms; here a histogram replaces them. Norms of 0 stay out: twenty zeros at the
        start would hold the bound at 0 for 190 steps.

    References:
      Seetharaman, Wichern, Pardo, Le Roux, AutoClip: adaptive gradient clipping for source separation networks, MLSP
      2020, arXiv:2007.14469.

    See also:
      `contrib.percentile_clip`, `contrib.clip_by_tracked_quantile`; `thresholds.quantile` with another norm.

      Notebook: `notebooks/choosing_a_threshold.ipynb`, how to choose a bound.
    """
    checks.static_together(window=window, warmup_steps=warmup_steps, record=record)
    percentile = checks.percentile("percentile", percentile)
    threshold = thresholds.quantile(
        percentile / 100, window=window, warmup_steps=warmup_steps, warmup_max_norm=warmup_max_norm
    )
    return clip_by(norm, threshold, axes=axes, record=record)
