"""Clippers whose bound follows moving averages of the norms."""

import optax

from optaxclip import norms, thresholds
from optaxclip._arguments import checks
from optaxclip._arguments.bounds import Number
from optaxclip._arrays.mesh import Axes
from optaxclip.core import clip_by


def adagc(
    ratio: Number = 1.05,
    *,
    decay: Number = 0.98,
    warmup_steps: int = 100,
    warmup_max_norm: Number | None = 1.0,
    warmup_take_in: str = "raw",
    axes: Axes = "auto",
    record: int = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips each leaf to a multiple of the moving average of its own clipped norms.

    .. math:: u_l \leftarrow u_l \cdot \min(1, r \gamma_l / n_l), \qquad
        \gamma_l \leftarrow \beta \gamma_l + (1 - \beta) \min(n_l, r \gamma_l)

    During the warm-up, all leaves are clipped together to a global norm of `warmup_max_norm`, by default 1. With
    `warmup_max_norm=None` they are not clipped.

    Args:
      ratio: r, the permitted multiple of the average, at least 0; 1.05 in the paper.
      decay: decay of the average, in [0, 1); 0.98 in the paper.
      warmup_steps: before this step all leaves are clipped together, and gamma is the smallest norm so far; 100 in the
        paper. The first step always belongs to the warm-up.
      warmup_max_norm: bound on the global norm in the warm-up, positive; 1 in the paper. None is no bound.
      warmup_take_in: which norms enter gamma in the warm-up: `"raw"`, as measured, or `"clipped"`, after clipping, as
        in the paper.
      axes: which mesh axes split the leaves; see `clip_by`.
      record: how many of the last steps to record for `clip_stats`; see `clip_by`.

    Returns:
      An optax transformation. Its state is 8 bytes per leaf.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.adagc(warmup_steps=2)
      >>> update, state = jax.jit(tx.update), tx.init(jnp.zeros(1))
      >>> for norm in (2.0, 8.0):
      ...     updates, state = update(jnp.array([norm]), state)
      ...     print(updates)
      [1.]
      [2.1]

    Notes:
      - Guarantees: as for `clip_by`. The direction of each leaf is kept.
      - Edge cases: if the norm of any leaf is non-finite, no leaf is clipped and no average changes. A leaf of norm 0
        stays 0 and does not enter its average.
      - Level shifts: gamma rises by at most 0.1 % per step, so it takes 2,200 steps to follow a lasting tenfold rise.
        With a ratio of 1.5 it takes 180.
      - Warm-up: if it has fewer than two steps, gamma starts at the first norm, however large.
      - Placement: before the optimizer.
      - Differs from the paper: gamma starts from the smallest raw norm. In the paper it starts from the smallest norm
        after all leaves are clipped together. There, one leaf of norm 1e8 brings every gamma down to 1e-8. From 1e-8,
        gamma rises by only 0.1 % per step. Pass `warmup_take_in="clipped"` for the paper's rule.
      - Zero gradients: they do not enter gamma here. In the published code they hold it near 1e-10 for 18,500 steps.
        The floors of gamma and norm at 1e-8 are those of that code.

    References:
      Wang et al., AdaGC: improving training stability for large language model pretraining, 2025, arXiv:2502.11034;
      `AdaGC` of pytorch_optimizer 4.1.0.

    See also:
      `thresholds.ema_ratio` with any norm; `contrib.clip_norm_growth`.

      Notebook: `notebooks/which_clipper.ipynb`, all methods compared.
    """
    checks.static_together(warmup_steps=warmup_steps, record=record)
    threshold = thresholds.ema_ratio(
        ratio,
        decay=decay,
        warmup_steps=warmup_steps,
        warmup_max_norm=warmup_max_norm,
        warmup_take_in=warmup_take_in,
    )
    return clip_by(norms.leaf_norm(), threshold, axes=axes, record=record)
