"""Clippers whose bound is a quantile of the norms so far."""

from typing import Any

import optax

from optaxclip import norms, thresholds
from optaxclip._arguments import checks
from optaxclip._arrays.mesh import Axes
from optaxclip.core import Norm, clip_by


def autoclip(
    percentile: Any = 10.0,
    *,
    window: int | None = None,
    norm: Norm = norms.global_norm(),
    axes: Axes = "auto",
    record: int = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips each norm to a percentile of all norms so far, this one among them.

    .. math:: u \leftarrow u \cdot \min(1, c_t / n_t), \qquad c_t = \mathrm{percentile}(\{n_1, \dots, n_t\}, p)

    Args:
      percentile: p in [0, 100], interpolated linearly as in `numpy.percentile`; 10 in the paper, which clips nine of
        ten gradients. A number between 0 and 1 warns: it may be meant as a fraction.
      window: over how many of the last norms, exactly. None is the whole history: exactly for the first 64 norms,
        then by a histogram.
      norm: what is measured, from `optaxclip.norms`; each group has a history of its own.
      axes: over which mesh axes the leaves are split; see `clip_by`.
      record: of how many of the last steps the state keeps a record for `clip_stats`; see `clip_by`.

    Returns:
      An optax transformation. Its state is per group: without a window a histogram of 40 KiB, for at most 1,024 groups;
      with one 4 bytes a norm of the window.

    Guarantees:
      The direction of each group is kept. With a window the percentile is exact; without, and after 64 steps, it is
      right to 0.9 %, over the whole float range. Norms up to the bound are returned bit for bit.

    Edge cases:
      The first norm is its own percentile and passes. The whole history forgets nothing: a tenfold rise after 500 steps
      is followed after some 4,600 more, by a window of 100 after 90. A norm of 0, an infinite or a NaN norm leaves its
      updates and its statistics as they are.

    Placement:
      Before the optimizer. The bound follows the norms, so the learning rate sees gradients of about the size of the
      p-th percentile; raise it accordingly.

    Raises:
      ValueError: if `percentile` or `window` is out of range; at init, without a window and with more than 1,024
        groups.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.autoclip(10.0)
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in (1.0, 2.0, 0.5, 4.0):
      ...     updates, state = tx.update(jnp.array([norm]), state)
      >>> print(f"{updates[0]:.2f}")  # 0.5 and three tenths of the way to 1
      0.65

    Differs from the paper:
      Norms of 0 and non-finite ones are not taken in: twenty zeros at the start would hold the bound at 0 for 190
      steps. The paper keeps all norms; without a window a histogram stands for them here.

    References:
      Seetharaman, Wichern, Pardo, Le Roux, AutoClip: adaptive gradient clipping for source separation networks, MLSP
      2020, arXiv:2007.14469.

    See also:
      `percentile_clip`, `clip_by_tracked_quantile`; `thresholds.quantile` with another norm.

      Notebook: `notebooks/choosing_a_threshold.ipynb`, how to choose a bound.
    """
    checks.static_together(window=window, record=record)
    percentile = checks.percentile("percentile", percentile)
    return clip_by(norm, thresholds.quantile(percentile / 100, window=window), axes=axes, record=record)
