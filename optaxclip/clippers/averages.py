"""Clippers whose bound follows moving averages of the norms."""

from typing import Any

import optax

from optaxclip import checks, norms, thresholds
from optaxclip.bounds import Bound
from optaxclip.core import Norm, clip_by
from optaxclip.mesh import Axes


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


def aggc(
    labels: Any,
    high: Any,
    *,
    low: Any = None,
    decay: Any = 0.98,
    min_norm: Any = 0.0,
    max_down: Any = None,
    max_up: Any = None,
    initial: Any = None,
    axes: Axes = "auto",
    record: int = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps the norm of each labelled group of leaves within a band about its moving average.

    .. math:: n_G \leftarrow \min(\max(n_G, low \cdot e_G), high \cdot e_G), \qquad
        e_G \leftarrow \beta e_G + (1 - \beta) n_G

    Args:
      labels: a prefix pytree of strings, or a callable from a leaf's path to one: the groups; see `norms.group_norm`.
      high: how many averages are permitted, at least 0. Required: the published code has none that would bound.
      low: below how many averages, at most 1, a norm is raised; None is 0.
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
      The first norm sets the average and is bounded by `high` times itself. A norm of 0, an infinite or a NaN norm
      leaves its updates and its statistics as they are.

    Placement:
      Before the optimizer.

    Raises:
      ValueError: if an argument is out of range, or no leaf has a label.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.aggc({"body": "body", "head": "head"}, 2.0)
      >>> state = tx.init({"body": jnp.zeros(1), "head": jnp.zeros(1)})
      >>> for norm in (1.0, 5.0):
      ...     updates, state = tx.update({"body": jnp.array([norm]), "head": jnp.array([1.0])}, state)
      >>> print(updates["body"], updates["head"])
      [2.] [1.]

    Differs from the paper:
      The published average starts at 0 and is not debiased, so that with `high=1` the output stays at a fiftieth of the
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
        high, low=low, decay=decay, min_norm=min_norm, max_down=max_down, max_up=max_up, initial=initial
    )
    return clip_by(norms.group_norm(labels), threshold, axes=axes, record=record)


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


def clip_norm_growth(
    max_growth: Any = 1.01, *, norm: Norm = norms.leaf_norm(), axes: Axes = "auto", record: int = False
) -> optax.GradientTransformationExtraArgs:
    r"""Lets each norm be at most so many times what it was in the last step, after clipping.

    .. math:: u_t \leftarrow u_t \cdot \min(1, \gamma (m_{t-1} + 10^{-8}) / n_t), \qquad m_t = \|u_t\|

    Args:
      max_growth: gamma, by which factor norms may grow in a step, positive; 1.01 in Fira and APOLLO.
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
      ValueError: if `max_growth` is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.clip_norm_growth(1.01)
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
    return clip_by(norm, thresholds.growth(max_growth), axes=axes, record=record)
