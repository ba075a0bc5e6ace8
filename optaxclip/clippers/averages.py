"""Clippers whose bound follows moving averages of the norms."""

from typing import Any

import optax

from optaxclip import norms, thresholds
from optaxclip._arguments import checks
from optaxclip._arrays.mesh import Axes
from optaxclip.core import clip_by


def adagc(
    ratio: Any = 1.05,
    *,
    decay: Any = 0.98,
    warmup_steps: int = 100,
    warmup_max_norm: Any = 1.0,
    axes: Axes = "auto",
    record: int = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips each leaf to a multiple of the moving average of its own norms after clipping.

    .. math:: u_l \leftarrow u_l \cdot \min(1, r \gamma_l / n_l), \qquad
        \gamma_l \leftarrow \beta \gamma_l + (1 - \beta) \min(n_l, r \gamma_l)

    Args:
      ratio: r, how much more than the average is permitted; 1.05 in the paper.
      decay: of the average, in [0, 1); 0.98 in the paper.
      warmup_steps: before this step all leaves are clipped together, and gamma is the smallest norm after that; 100 in
        the paper. The first step always counts as one of these.
      warmup_max_norm: to what global norm they are clipped; 1 in the paper. None clips nothing then.
      axes: over which mesh axes the leaves are split; see `clip_by`.
      record: of how many of the last steps the state keeps a record for `clip_stats`; see `clip_by`.

    Returns:
      An optax transformation. Its state is 8 bytes per leaf.

    Guarantees:
      The direction of each leaf is kept. Leaves up to their bound are returned bit for bit.

    Edge cases:
      If the norm of any leaf is infinite or NaN the whole step passes, and no statistic takes it in. A leaf of norm 0
      stays 0 and is not taken in. Gamma can rise by 0.1 % a step: a lasting tenfold rise is followed after 2,200 steps,
      at a ratio of 1.5 after 180. A spike of one leaf in the warm-up shrinks all leaves, and so the gamma of all:
      `warmup_max_norm=None`, and a clip of its own before it, avoids that.

    Placement:
      Before the optimizer.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.adagc(warmup_steps=2)
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in (2.0, 8.0):
      ...     updates, state = tx.update(jnp.array([norm]), state)
      ...     print(updates)
      [1.]
      [1.05]

    Differs from the paper:
      Zero gradients do not enter gamma, which they would pin near 1e-10 for 18,500 steps. The clamps of gamma and norm
      at 1e-8 are those of the published code.

    References:
      Wang et al., AdaGC: improving training stability for large language model pretraining, 2025, arXiv:2502.11034;
      `AdaGC` of pytorch_optimizer 4.1.0.

    See also:
      `thresholds.ema_ratio` with any norm; `clip_norm_growth`.

      Notebook: `notebooks/which_clipper.ipynb`, all methods compared.
    """
    checks.static_together(warmup_steps=warmup_steps, record=record)
    threshold = thresholds.ema_ratio(ratio, decay=decay, warmup_steps=warmup_steps, warmup_max_norm=warmup_max_norm)
    return clip_by(norms.leaf_norm(), threshold, axes=axes, record=record)
