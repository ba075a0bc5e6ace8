"""Clippers whose bound follows what was let through before, within a band or by how much it grows."""

from typing import Any

import optax

from optaxclip import norms, thresholds
from optaxclip._arguments import checks
from optaxclip._arrays.mesh import Axes
from optaxclip.core import Norm, clip_by


def aggc(
    labels: Any,
    ratio: Any,
    *,
    min_ratio: Any = None,
    decay: Any = 0.98,
    min_norm: Any = 0.0,
    max_down: Any = None,
    max_up: Any = None,
    initial: Any = None,
    axes: Axes = "auto",
    record: int = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps the norm of each labelled group of leaves within a band about its moving average.

    .. math:: n_G \leftarrow \min(\max(n_G, min_ratio \cdot e_G), ratio \cdot e_G), \qquad
        e_G \leftarrow \beta e_G + (1 - \beta) n_G

    Args:
      labels: a prefix pytree of strings, or a callable from a leaf's path to one: the groups; see `norms.group_norm`.
      ratio: how many averages are permitted, at least 0. Required: the published code has none that would bound.
      min_ratio: below how many averages, at most 1, a norm is raised; None is 0.
      decay: beta, of the average of the norms after clipping, in [0, 1).
      min_norm: below this a norm is raised, whatever the average.
      max_down: a norm is scaled by no less than this, in [0, 1], so that norms may pass the bound; 0.9 in the published
        code. None for any factor.
      max_up: a norm is scaled by no more than this; at least 1; 1.1 in the published code. None for any
        factor.
      initial: the average before the first step. None is the first norm; 0 in the published code.
      axes: over which mesh axes the leaves are split; see `clip_by`.
      record: of how many of the last steps the state keeps a record for `clip_stats`; see `clip_by`.

    Returns:
      An optax transformation. Its state is 8 bytes per group.

    Guarantees:
      The direction of each group is kept. Within the band updates are returned bit for bit.

    Edge cases:
      The first norm sets the average and is bounded by `ratio` times itself. A norm of 0, an infinite or a NaN norm
      leaves its updates and its statistics as they are.

    Placement:
      Before the optimizer.

    Raises:
      ValueError: if an argument is out of range, or no leaf has a label.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.contrib.aggc({"body": "body", "head": "head"}, 2.0)
      >>> state = tx.init({"body": jnp.zeros(1), "head": jnp.zeros(1)})
      >>> for norm in (1.0, 5.0):
      ...     updates, state = tx.update({"body": jnp.array([norm]), "head": jnp.array([1.0])}, state)
      >>> print(updates["body"], updates["head"])
      [2.] [1.]

    Differs from the paper:
      The published average starts at 0 and is not debiased, so that with `ratio=1` the output stays at a fiftieth of the
      first norm for ever; its way out, `max_down`, makes the bound none. Both are available, and neither is the
      default.

    References:
      AGGC: adaptive group gradient clipping, 2026, arXiv:2601.11864, and its published code.

    See also:
      `adagc`; `thresholds.ema_band` with any norm.

      Notebook: `notebooks/which_clipper.ipynb`, all methods compared.
    """
    checks.static_together(labels=labels, record=record)
    threshold = thresholds.ema_band(
        ratio, min_ratio=min_ratio, decay=decay, min_norm=min_norm, max_down=max_down, max_up=max_up, initial=initial
    )
    return clip_by(norms.group_norm(labels), threshold, axes=axes, record=record)


def clip_norm_growth(
    ratio: Any = 1.01, *, norm: Norm = norms.leaf_norm(), axes: Axes = "auto", record: int = False
) -> optax.GradientTransformationExtraArgs:
    r"""Lets each norm be at most so many times what it was in the last step, after clipping.

    .. math:: u_t \leftarrow u_t \cdot \min(1, \gamma (m_{t-1} + 10^{-8}) / n_t), \qquad m_t = \|u_t\|

    Args:
      ratio: gamma, by which factor norms may grow in a step, positive; 1.01 in Fira and APOLLO.
      norm: what is measured, from `optaxclip.norms`; each group has a history of its own.
      axes: over which mesh axes the leaves are split; see `clip_by`.
      record: of how many of the last steps the state keeps a record for `clip_stats`; see `clip_by`.

    Returns:
      An optax transformation. Its state is one float per group.

    Guarantees:
      The direction of each group is kept. Norms up to the bound are returned bit for bit.

    Edge cases:
      The first norm passes, however large. After a dip the norm comes back at 1 % a step: tenfold takes 232 steps. A
      norm of 0, an infinite or a NaN norm leaves its updates and its statistics as they are; a zero would otherwise
      hold it down for 1,388 steps, as a norm of 1e-12 still does.

    Placement:
      Before the learning rate, on the scaled update: Fira and APOLLO apply it to what their optimizer makes of the
      gradient.

    Raises:
      ValueError: if `ratio` is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.contrib.clip_norm_growth(1.01)
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in (1.0, 2.0):
      ...     updates, state = tx.update(jnp.array([norm]), state)
      >>> print(updates)
      [1.01]

    Differs from the paper:
      A zero norm leaves the state as it is.

    References:
      Chen et al., Fira, 2024, arXiv:2410.01623; Zhu et al., APOLLO, 2024, arXiv:2412.05270.

    See also:
      `adagc`; `thresholds.growth` with any norm.

      Notebook: `notebooks/which_clipper.ipynb`, all methods compared.
    """
    return clip_by(norm, thresholds.growth(ratio), axes=axes, record=record)
