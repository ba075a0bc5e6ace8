"""Clippers whose bound follows the clipped norms: a band around their average, or a limit on their growth."""

import optax

from optaxclip import norms, thresholds
from optaxclip._arguments import checks
from optaxclip._arguments.bounds import Number
from optaxclip._arrays.mesh import Axes
from optaxclip.core import Norm, clip_by


def aggc(
    labels: norms.Labels,
    ratio: Number,
    *,
    min_ratio: Number | None = None,
    decay: Number = 0.98,
    min_norm: Number = 0.0,
    max_down: Number | None = None,
    max_up: Number | None = None,
    initial: Number | None = None,
    axes: Axes = "auto",
    record: int = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps the norm of each labelled group of leaves in a band around the moving average of its clipped norms.

    .. math:: n_G \leftarrow \min(\max(n_G, low \cdot e_G), high \cdot e_G), \qquad
        e_G \leftarrow \beta e_G + (1 - \beta) n_G

    The first norm is its own average, so a `ratio` of at least 1 does not bound it. If your run can explode at once,
    put a fixed clip in front: `chain(clip_by_global_norm(10.0), contrib.aggc(labels, 2.0))`.

    Args:
      labels: the groups: a prefix pytree of strings, or a function from a leaf's path to a string; see
        `norms.group_norm`.
      ratio: high, the upper end as a multiple of the average, at least 0. Required: the published default works only
        together with `max_down`.
      min_ratio: low, the lower end as a multiple of the average, from 0 to 1 and at most `ratio`. None is 0.
      decay: beta, decay of the average of the norms after clipping, in [0, 1).
      min_norm: a norm below this is raised to it, whatever the average is; at least 0 and finite.
      max_down: the smallest factor by which a norm is scaled, in [0, 1]; 0.9 in the published code. Norms can then
        exceed the bound. None allows any factor.
      max_up: the largest factor by which a norm is scaled, at least 1; 1.1 in the published code. None allows any
        factor.
      initial: the average before the first step, at least 0 and finite; 0 in the published code. None starts at the
        first norm.
      axes: which mesh axes split the leaves; see `clip_by`.
      record: how many of the last steps to record for `clip_stats`; see `clip_by`.

    Returns:
      An optax transformation. Its state is 8 bytes per group.

    Raises:
      ValueError: if an argument is out of range, or no leaf has a label.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.contrib.aggc({"body": "body", "head": "head"}, 2.0)
      >>> update, state = jax.jit(tx.update), tx.init({"body": jnp.zeros(1), "head": jnp.zeros(1)})
      >>> for norm in (1.0, 5.0):
      ...     updates, state = update({"body": jnp.array([norm]), "head": jnp.array([1.0])}, state)
      >>> print(updates["body"], updates["head"])
      [2.] [1.]

    Notes:
      - Guarantees: as for `clip_by`. The direction of each group is kept.
      - Edge cases: as for `clip_by`. Zero and non-finite norms do not enter the history.
      - Placement: before the optimizer.
      - Differs from the paper: the published average starts at 0 and is not debiased. With a ratio of 1 the output then
        stays at a fiftieth of the first norm. `max_down` avoids that, but then norms can exceed the bound. The
        published settings are `initial=0`, `max_down=0.9` and `max_up=1.1`.

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
    ratio: Number = 1.01, *, norm: Norm = norms.leaf_norm(), axes: Axes = "auto", record: int = False
) -> optax.GradientTransformationExtraArgs:
    r"""Clips each norm to a multiple of its last clipped norm.

    .. math:: u_t \leftarrow u_t \cdot \min(1, \gamma (m_{t-1} + 10^{-8}) / n_t), \qquad m_t = \|u_t\|

    The first norm is not bounded. If your run can explode at once, put a fixed clip in front:
    `chain(clip_by_leaf_norm(1.0), contrib.clip_norm_growth())`.

    Args:
      ratio: gamma, the permitted growth of a norm per step, positive; 1.01 in Fira and APOLLO.
      norm: what to measure, from `optaxclip.norms`. Each group has its own history.
      axes: which mesh axes split the leaves; see `clip_by`.
      record: how many of the last steps to record for `clip_stats`; see `clip_by`.

    Returns:
      An optax transformation. Its state is one float per group.

    Raises:
      ValueError: if `ratio` is not positive.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.contrib.clip_norm_growth(1.01)
      >>> update, state = jax.jit(tx.update), tx.init(jnp.zeros(1))
      >>> for norm in (1.0, 2.0):
      ...     updates, state = update(jnp.array([norm]), state)
      >>> print(updates)
      [1.01]

    Notes:
      - Guarantees: as for `clip_by`. The direction of each group is kept.
      - Edge cases: as for `clip_by`. Zero and non-finite norms do not enter the history.
      - Level shifts: after a dip, a norm recovers by 1 % per step: a factor of 10 takes 232 steps. After a dip to 1e-12
        it takes 1,388.
      - Placement: on the scaled update, before the learning rate. Fira and APOLLO apply it to their optimizer's output.
      - Differs from the paper: a norm of 0 does not change the state.

    References:
      Chen et al., Fira, 2024, arXiv:2410.01623; Zhu et al., APOLLO, 2024, arXiv:2412.05270.

    See also:
      `adagc`; `thresholds.growth` with any norm.

      Notebook: `notebooks/which_clipper.ipynb`, all methods compared.
    """
    return clip_by(norm, thresholds.growth(ratio), axes=axes, record=record)
