"""Clippers whose bound is a number of deviations above the mean of the norms."""

from typing import Any

import optax

from optaxclip import norms, thresholds
from optaxclip._arguments import checks
from optaxclip._arguments.bounds import Bound
from optaxclip._arrays.mesh import Axes
from optaxclip.core import Norm, clip_by


def zclip(
    z_threshold: Any = 2.5,
    *,
    decay: Any = 0.97,
    warmup_steps: int = 25,
    max_norm: Bound | None = 1.0,
    patience: int | None = 33,
    option: str = "reciprocal",
    norm: Norm = norms.global_norm(),
    axes: Axes = "auto",
    record: int = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Brings spikes, norms many standard deviations above a moving average, back to near the average.

    .. math:: u \leftarrow u \cdot \min(1, c / n), \qquad
        c = \min\Bigl(\mu + \frac{z_t^2 \sigma}{z}, c_{max}\Bigr) \quad\text{where}\quad
        z = \frac{n - \mu}{\sigma + 10^{-6}} > z_t

    Args:
      z_threshold: how many standard deviations make a spike, positive; 2.5 in the paper.
      decay: of mean and variance, in [0, 1); 0.97 in the paper.
      warmup_steps: how many norms are averaged, as measured, before the first can be a spike; 25 in the paper.
      max_norm: a bound for every step, the warm-up included: a number, an array, a schedule, or a prefix pytree of
        these. 1 in the paper; None is none.
      patience: after so many spikes in a row the statistics take norms in as they are. None is the published method.
      option: to what a spike is brought, `"reciprocal"`, `"mean"` or `"percentile"`; see `thresholds.zscore`.
      norm: what is measured, from `optaxclip.norms`; each group has a history of its own.
      axes: over which mesh axes the leaves are split; see `clip_by`.
      record: of how many of the last steps the state keeps a record for `clip_stats`; see `clip_by`.

    Returns:
      An optax transformation. Its state is 16 bytes per group, and with a schedule a step count.

    Guarantees:
      The direction of each group is kept. Norms up to the bound are returned bit for bit. A lasting rise is followed:
      one of ten times within about 40 steps at the default patience, 10 at a patience of 5.

    Edge cases:
      In the warm-up only `max_norm` bounds. After a warm-up of constant norms every larger one is a spike, until
      `patience` runs out. The 1e-6 is absolute: norms far below it are never spikes. A norm of 0, an infinite or a NaN
      norm leaves its updates and its statistics as they are.

    Placement:
      Before the optimizer.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.zclip(warmup_steps=4, max_norm=None)
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in (1.0, 1.2, 0.8, 1.0, 3.0):
      ...     updates, state = tx.update(jnp.array([norm]), state)
      >>> print(f"{updates[0]:.4f}")  # mean 1, deviation 0.1414, z 14.14
      1.0625

    Differs from the paper:
      Spikes are taken in as what they were clipped to, so after a lasting rise by three times or more the published
      method clips for ever, its variance gone; and after one NaN never again. `patience` and the guard mend that. The
      package multiplies by `c / (n + 1e-6)`.

    References:
      Kumar, Owen, Chowdhury, Güra, ZClip: adaptive spike mitigation for LLM pre-training, 2025, arXiv:2504.02507; the
      package `zclip` 1.0.0.

    See also:
      `clip_by_history`, whose window forgets; `thresholds.zscore` with any norm, per leaf say.

      Notebook: `notebooks/choosing_a_threshold.ipynb`, how to choose a bound.
    """
    checks.static_together(warmup_steps=warmup_steps, patience=patience, record=record)
    if max_norm is not None:
        checks.bound("max_norm", max_norm)
    spikes = thresholds.zscore(z_threshold, decay=decay, warmup_steps=warmup_steps, patience=patience, option=option)
    threshold = spikes if max_norm is None else thresholds.chain(spikes, thresholds.constant(max_norm))
    return clip_by(norm, threshold, axes=axes, record=record)


def clip_by_history(
    num_std: Any = 3.0,
    *,
    window: int = 128,
    min_count: int = 64,
    take_in: str = "clipped",
    patience: int | None = None,
    norm: Norm = norms.global_norm(),
    axes: Axes = "auto",
    record: int = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips each norm to a number of standard deviations above the mean of the last ones.

    .. math:: u \leftarrow u \cdot \min(1, c / n), \qquad c = \mu + k \max(\sigma, 10^{-6} \max(\mu, 1))

    Args:
      num_std: k, how many standard deviations, at least 0.
      window: over how many of the last norms, without this one; 128 in levanter.
      min_count: how many norms must be there before the first is clipped; 64 in levanter.
      take_in: `"clipped"` takes norms in as they are after clipping, so that a spike does not make room for the next;
        `"raw"` as measured, as levanter.
      patience: after so many clipped norms in a row they are taken in as measured. None never does.
      norm: what is measured, from `optaxclip.norms`; each group has a history of its own.
      axes: over which mesh axes the leaves are split; see `clip_by`.
      record: of how many of the last steps the state keeps a record for `clip_stats`; see `clip_by`.

    Returns:
      An optax transformation. Its state is 4 bytes per norm of the window, and 8 more, per group.

    Guarantees:
      The direction of each group is kept. Norms up to the bound are returned bit for bit.

    Edge cases:
      The first `min_count` norms pass. A lasting tenfold rise is followed within about 100 steps, or 500 where all
      norms before were the same; `patience=33` brings both to about 45, and `take_in="raw"` to 5 to 15. A norm of 0, an
      infinite or a NaN norm leaves its updates and its statistics as they are.

    Placement:
      Before the optimizer.

    Raises:
      ValueError: if an argument is out of range, or `min_count` larger than `window`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.clip_by_history(2.0, window=4, min_count=2)
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in (1.0, 3.0, 9.0):  # mean 2, deviation 1
      ...     updates, state = tx.update(jnp.array([norm]), state)
      >>> print(updates)
      [4.]

    Differs from the published code:
      levanter takes in raw norms, so that one spike lets the next pass, and one NaN lasts for the whole window. Its
      floor of the deviation is 1e-6 alone, which float32 loses beside a mean of 100.

    References:
      `clip_update_by_historical_norm` of levanter.

    See also:
      `zclip`, whose average never forgets all at once; `thresholds.mean_std` with more options.

      Notebook: `notebooks/choosing_a_threshold.ipynb`, how to choose a bound.
    """
    checks.static_together(window=window, min_count=min_count, patience=patience, record=record)
    threshold = thresholds.mean_std(num_std, window=window, min_count=min_count, take_in=take_in, patience=patience)
    return clip_by(norm, threshold, axes=axes, record=record)
