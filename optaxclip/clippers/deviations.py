"""Clippers whose bound is a number of deviations above the mean of the norms."""

import optax

from optaxclip import norms, thresholds
from optaxclip._arguments import checks
from optaxclip._arguments.bounds import Bound, Number
from optaxclip._arrays.mesh import Axes
from optaxclip.core import Norm, clip_by


def zclip(
    num_std: Number = 2.5,
    *,
    decay: Number = 0.97,
    warmup_steps: int = 25,
    warmup_max_norm: Number | None = 1.0,
    max_norm: Bound | None = None,
    patience: int | None = 33,
    clip_to: str = "reciprocal",
    scale: str = "linear",
    norm: Norm = norms.global_norm(),
    axes: Axes = "auto",
    record: int = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips spikes: norms many standard deviations above a moving average are brought close to it.

    .. math:: u \leftarrow u \cdot \min(1, c / n), \qquad
        c = \mu + \frac{k^2 \sigma}{z} \quad\text{where}\quad z = \frac{n - \mu}{\sigma + 10^{-6}} > k

    During the warm-up, norms are clipped to `warmup_max_norm`, by default 1. With `warmup_max_norm=None` they are not
    clipped.

    Args:
      num_std: k, the number of standard deviations that makes a norm a spike, positive; 2.5 in the paper.
      decay: decay of mean and variance, in [0, 1); 0.97 in the paper.
      warmup_steps: how many norms are averaged before the first can be a spike; at least 1; 25 in the paper.
      warmup_max_norm: bound on the norm in the warm-up, positive. Set it to about the size of your norms. In the
        statistics, a warm-up norm counts as at most the larger of this bound and ten times the mean so far. So one huge
        norm does not spoil the statistics, unless the bound is far above your norms: for example a bound of 1 for norms
        of 0.01. None, as in the paper, is no bound, and raw norms are averaged.
      max_norm: a bound for every step, the warm-up included: a number, an array, a schedule, or a prefix pytree of
        these. None is no bound; the published package uses 1.
      patience: after this many spikes in a row, raw norms enter the statistics. With None they never do, as in the
        paper.
      clip_to: what a spike is clipped to: `"reciprocal"` (the formula above), `"mean"` or `"edge"`; see
        `thresholds.zscore`.
      scale: `"linear"`, as in the paper, or `"log"` for statistics of the logarithm of the norm.
      norm: what to measure, from `optaxclip.norms`. Each group has its own history.
      axes: which mesh axes split the leaves; see `clip_by`.
      record: how many of the last steps to record for `clip_stats`; see `clip_by`.

    Returns:
      An optax transformation. Its state is 16 bytes per group. A schedule adds a step count.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.zclip(warmup_steps=4)
      >>> update, state = jax.jit(tx.update), tx.init(jnp.zeros(1))
      >>> for norm in (1.0, 1.2, 0.8, 1.0, 3.0):
      ...     updates, state = update(jnp.array([norm]), state)
      >>> print(f"{updates[0]:.4f}")  # mean 1, deviation 0.1414, z 14.14
      1.0625

    Notes:
      - Guarantees: as for `clip_by`. The direction of each group is kept.
      - Edge cases: as for `clip_by`. Zero and non-finite norms do not enter the history.
      - Level shifts: the bound follows a lasting tenfold rise within about 40 steps; with `patience=5`, within 10.
      - Constant norms: after a warm-up of equal norms, every larger norm is a spike until `patience` runs out.
      - Small norms: the 1e-6 is absolute, so with `scale="linear"` norms far below it are never spikes.
      - Large norms: starting at 1, the mean reaches any level up to 1e6 within the default warm-up. It reaches levels
        far above that when `patience` runs out.
      - Placement: before the optimizer.
      - Differs from the package: the package caps every norm at 1, so it is a fixed clip wherever norms are larger.
        Here the cap ends with the warm-up, and one exploding step does not spoil the statistics. The package multiplies
        by `c / (n + 1e-6)`.
      - Differs from the paper: `patience` is new, and NaN does not enter the statistics. In the paper, the clipped norm
        of a spike enters them. After a lasting rise by a factor of 3 or more, the variance then vanishes, and every
        step is clipped. After one NaN, no step is clipped again.
      - Published settings: `zclip(max_norm=1.0, warmup_max_norm=None, patience=None)`.

    References:
      Kumar, Owen, Chowdhury, Güra, ZClip: adaptive spike mitigation for LLM pre-training, 2025, arXiv:2504.02507; the
      package `zclip` 1.0.0.

    See also:
      `clip_by_history`, whose window forgets; `thresholds.zscore` with any norm, for example per leaf.

      Notebook: `notebooks/choosing_a_threshold.ipynb`, how to choose a bound.
    """
    checks.static_together(warmup_steps=warmup_steps, patience=patience, record=record)
    if max_norm is not None:
        checks.bound("max_norm", max_norm)
    spikes = thresholds.zscore(
        num_std,
        decay=decay,
        warmup_steps=warmup_steps,
        warmup_max_norm=warmup_max_norm,
        patience=patience,
        clip_to=clip_to,
        scale=scale,
    )
    threshold = spikes if max_norm is None else thresholds.chain(spikes, thresholds.constant(max_norm))
    return clip_by(norm, threshold, axes=axes, record=record)


def clip_by_history(
    num_std: Number = 3.0,
    *,
    window: int = 128,
    warmup_steps: int = 64,
    warmup_max_norm: Number | None = 1.0,
    take_in: str = "clipped",
    patience: int | None = None,
    scale: str = "linear",
    norm: Norm = norms.global_norm(),
    axes: Axes = "auto",
    record: int = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips each norm to a number of standard deviations above the mean of the last norms.

    .. math:: u \leftarrow u \cdot \min(1, c / n), \qquad c = \mu + k \max(\sigma, 10^{-6} \max(\mu, 1))

    During the warm-up, norms are clipped to `warmup_max_norm`, by default 1. With `warmup_max_norm=None` they are not
    clipped.

    Args:
      num_std: k, the number of standard deviations, at least 0.
      window: how many of the last norms count, without the current one; at least 1; 128 in levanter.
      warmup_steps: how many norms the window needs before it bounds the next; from 1 to `window`; 64 in levanter.
      warmup_max_norm: bound on the norm in the warm-up, positive. Set it to about the size of your norms. In the
        statistics, a warm-up norm counts as at most the larger of this bound and ten times the mean so far. So one huge
        norm does not spoil the statistics, unless the bound is far above your norms: for example a bound of 1 for norms
        of 0.01. None, as in levanter, is no bound, and raw norms enter the window.
      take_in: which norms enter the window. `"clipped"`: after clipping, so one spike does not make room for the next.
        `"raw"`: as measured, as in levanter.
      patience: after this many clipped norms in a row, raw norms enter the window. With None they never do.
      scale: `"linear"`, as in levanter, or `"log"` for statistics of the logarithm of the norm.
      norm: what to measure, from `optaxclip.norms`. Each group has its own history.
      axes: which mesh axes split the leaves; see `clip_by`.
      record: how many of the last steps to record for `clip_stats`; see `clip_by`.

    Returns:
      An optax transformation. Per group, its state is 4 bytes per norm of the window, and 8 more.

    Raises:
      ValueError: if an argument is out of range, or `warmup_steps` is larger than `window`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.clip_by_history(2.0, window=4, warmup_steps=2)
      >>> update, state = jax.jit(tx.update), tx.init(jnp.zeros(1))
      >>> for norm in (1.0, 3.0, 9.0):  # mean 2, deviation 1
      ...     updates, state = update(jnp.array([norm]), state)
      >>> print(updates)
      [4.]

    Notes:
      - Guarantees: as for `clip_by`. The direction of each group is kept.
      - Edge cases: as for `clip_by`. Zero and non-finite norms do not enter the history.
      - Level shifts: the bound follows a lasting tenfold rise within about 100 steps, or 500 if all norms before were
        equal. With `patience=33` both take about 45 steps; with `take_in="raw"`, 5 to 15.
      - Placement: before the optimizer.
      - Differs from levanter: levanter has no bound in the warm-up, and raw norms enter its window. One spike then lets
        the next pass, and one NaN stays for a whole window. Its floor of the deviation is 1e-6, which is lost in
        float32 next to a mean of 100.

    References:
      `clip_update_by_historical_norm` of levanter.

    See also:
      `zclip`, whose average forgets gradually; `thresholds.mean_std` with more options.

      Notebook: `notebooks/choosing_a_threshold.ipynb`, how to choose a bound.
    """
    checks.static_together(window=window, warmup_steps=warmup_steps, patience=patience, record=record)
    threshold = thresholds.mean_std(
        num_std,
        window=window,
        warmup_steps=warmup_steps,
        warmup_max_norm=warmup_max_norm,
        take_in=take_in,
        patience=patience,
        scale=scale,
    )
    return clip_by(norm, threshold, axes=axes, record=record)
