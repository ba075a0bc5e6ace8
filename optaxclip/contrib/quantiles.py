"""Clippers whose bound is one of the last norms, or an estimate of a quantile."""

from typing import Any

import optax

from optaxclip import norms, thresholds
from optaxclip._arguments import checks
from optaxclip._arrays.mesh import Axes
from optaxclip.core import Norm, clip_by


def percentile_clip(
    percentile: Any = 5.0,
    *,
    window: int = 100,
    norm: Norm = norms.leaf_norm(),
    axes: Axes = "auto",
    record: int = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips the norm of each leaf to one of its last norms: that many percent from below.

    .. math:: u \leftarrow u \cdot \min(1, s_k / n), \qquad k = \min(\lfloor p w / 100 \rfloor, w - 1)

    Args:
      percentile: p in [0, 100]; 5 in bitsandbytes, and 100 clips nothing. A number between 0 and 1 warns: it may be
        meant as a fraction.
      window: w, how many norms are kept, this one among them; s are these in ascending order. 100 in bitsandbytes.
      norm: what is measured, from `optaxclip.norms`; each group has a history of its own.
      axes: over which mesh axes the leaves are split; see `clip_by`.
      record: of how many of the last steps the state keeps a record for `clip_stats`; see `clip_by`.

    Returns:
      An optax transformation. Its state is 4 bytes per norm of the window and group.

    Guarantees:
      The direction of each group is kept. Norms up to the bound are returned bit for bit.

    Edge cases:
      The first norm fills the whole window, and passes. A norm of 0, an infinite or a NaN norm leaves its updates and
      its statistics as they are.

    Placement:
      Before the optimizer.

    Raises:
      ValueError: if `percentile` or `window` is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.contrib.percentile_clip(25.0, window=4)
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in (2.0, 1.0, 4.0):  # the window is 1, 2, 2, 4
      ...     updates, state = tx.update(jnp.array([norm]), state)
      >>> print(updates)
      [2.]

    Differs from the published code:
      The library keeps squares, which overflow; here the norms themselves are kept. Norms of 0 are not taken in.

    References:
      `percentile_clipping` of the bitsandbytes optimizers, up to version 0.49.

    See also:
      `autoclip`, which interpolates, and has the norm of all leaves together.

      Notebook: `notebooks/which_clipper.ipynb`, all methods compared.
    """
    checks.static_together(window=window, record=record)
    return clip_by(norm, thresholds.order_statistic(percentile, window=window), axes=axes, record=record)


def clip_by_tracked_quantile(
    quantile: Any = 0.5,
    *,
    learning_rate: Any = 0.2,
    initial: Any = 1.0,
    norm: Norm = norms.global_norm(),
    axes: Axes = "auto",
    record: int = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips each norm to an estimate of a quantile of the norms, which takes one number of state.

    .. math:: c \leftarrow c \cdot \exp(-\eta (1[n \le c] - q))

    Args:
      quantile: q in [0, 1]; the share of norms that are not clipped. 0.5 in the paper.
      learning_rate: of the logarithm of the bound, at least 0; 0.2 in the paper, which averages over 100 norms a step.
      initial: the first bound, positive. From there the bound gets 10 times as large in 24 steps at the defaults.
      norm: what is measured, from `optaxclip.norms`; each group has a history of its own.
      axes: over which mesh axes the leaves are split; see `clip_by`.
      record: of how many of the last steps the state keeps a record for `clip_stats`; see `clip_by`.

    Returns:
      An optax transformation. Its state is one float per group.

    Guarantees:
      The direction of each group is kept. Norms up to the bound are returned bit for bit.

    Edge cases:
      The first bound is `initial`, whatever the norms. With one norm a step the logarithm of the bound walks on a
      lattice of steps of `learning_rate` times q: it arrives within 24 to 55 steps and then wanders with a standard
      deviation of 0.12 to 0.25. A rate that decays helps, as below. A norm of 0, an infinite or a NaN norm leaves its
      updates and its statistics as they are.

    Placement:
      Before the optimizer.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.contrib.clip_by_tracked_quantile(0.5)
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in (2.0, 2.0):
      ...     updates, state = tx.update(jnp.array([norm]), state)
      >>> print(f"{updates[0]:.4f}")  # the exponential of 0.2 times 0.5
      1.1052

      >>> import optax
      >>> tx = optax.inject_hyperparams(optaxclip.contrib.clip_by_tracked_quantile)(
      ...     learning_rate=optax.exponential_decay(0.2, 1000, 0.1, end_value=0.02)
      ... )

    Differs from the paper:
      Without the noise that makes it private, and with one norm a step in place of the share of a round's clients.

    References:
      Andrew, Thakkar, McMahan, Ramaswamy, Differentially private learning with adaptive clipping, NeurIPS 2021,
      arXiv:1905.03871.

    See also:
      `autoclip`, which is exact and needs no rate.

      Notebook: `notebooks/choosing_a_threshold.ipynb`, how to choose a bound.
    """
    quantile = checks.number("quantile", quantile, at_most=1.0)
    threshold = thresholds.tracked_quantile(quantile, learning_rate=learning_rate, initial=initial)
    return clip_by(norm, threshold, axes=axes, record=record)
