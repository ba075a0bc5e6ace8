"""The thresholds that follow a history of norms, in float64 NumPy: plain loops, one function per published method.

Each takes the norms of one group, step by step (`adagc` an array of steps by tensors), and returns a `Run`. What the
public code named in a docstring does is what is written here. Steps count from 1.

One rule is ours and not the sources': a norm that is zero or not finite passes as it came, is not taken in and does not
advance a warm-up. `guard=False` leaves the rule out, to show what zeros do to the methods as published.
"""

from typing import NamedTuple

import numpy as np


class Run(NamedTuple):
    """What a method did at each step.

    Attributes:
        bound: the upper end that was applied; inf where there was none, and at a step that was not taken in.
        after: the norm after clipping.
        stats: name -> the statistic after the step; NaN until there is one.
    """

    bound: np.ndarray
    after: np.ndarray
    stats: dict[str, np.ndarray]


def counts(n):
    return 0 < n < np.inf


def follow(step, norms, guard=True):
    """A `Run` of `step`: n -> (lower end, upper end, statistics after n was taken in)."""
    bounds, after, stats = [], [], [{}]
    for n in np.asarray(norms, np.float64):
        if guard and not counts(n):
            bounds.append(np.inf)
            after.append(n)
            stats.append(stats[-1])
            continue
        lower, upper, statistics = step(n)
        bounds.append(upper)
        after.append(brought(n, lower, upper))
        stats.append(statistics)
    return Run(np.array(bounds), np.array(after), columns(stats[1:]))


def brought(n, lower, upper):
    """`n` into [lower, upper], of which the upper end is asked first; a zero norm cannot be raised."""
    if n > upper:
        return upper
    return lower if 0 < n < lower else n


def columns(stats):
    """A list of dicts as a dict of arrays, NaN where the first ones are empty."""
    return {name: np.array([row.get(name, np.nan) for row in stats], np.float64) for name in stats[-1]}


def counted(n, mean, warmup_max_norm):
    """Ours: what a warm-up with a bound takes in, at most that bound or ten times the mean so far."""
    return n if warmup_max_norm is None else min(n, max(warmup_max_norm, 10 * mean))


def autoclip(norms, percentile=10.0, window=None, *, warmup_steps=0, warmup_max_norm=np.inf, guard=True):
    """AutoClip, Seetharaman et al. 2020 (arXiv 2007.14469); `autoclip.py` in pseeth/autoclip.

    The p-th percentile, linearly interpolated, of all norms so far and the current one; of the last `window` of them.
    The bound on the first `warmup_steps` norms is ours.
    """
    history = []

    def step(n):
        history.append(n)
        bound = np.percentile(history if window is None else history[-window:], percentile)
        return 0, min(bound, warmup_max_norm) if len(history) <= warmup_steps else bound, {}

    return follow(step, norms, guard)


def percentile_clip(norms, percentile=5.0, window=100, guard=True):
    """bitsandbytes up to 0.49: `functional.percentile_clipping` and the kernel `kPercentileClipping`.

    A ring of squared norms with the current one in it; the first step fills every slot. The bound is the root of one
    entry of the sorted ring, without interpolation: number `percentile`, as the window is always 100 there.
    """
    if percentile >= 100:
        return follow(lambda n: (0, np.inf, {}), norms, guard)
    ring = []
    entry = min(int(percentile * window / 100), window - 1)

    def step(n):
        ring.extend([n**2] * (1 if ring else window))
        del ring[:-window]
        return 0, np.sqrt(sorted(ring)[entry]), {}

    return follow(step, norms, guard)


def zclip(
    norms,
    num_std=2.5,
    decay=0.97,
    warmup_steps=25,
    max_norm=1.0,
    *,
    clip_to="reciprocal",
    patience=None,
    warmup_max_norm=None,
    guard=True,
):
    """ZClip, Kumar et al. 2025 (arXiv 2504.02507); `ZClip.step` of the package zclip 1.0.0.

    `clip_to` is the package's `clip_option` "adaptive_scaling" (here "reciprocal") or "mean", or its mode "percentile"
    (here "edge").
    A spike is n above the test; the statistics take in its threshold, not what `max_norm` made of it.

    `patience=K` is ours: from the K+1st spike in a row the statistics take in n itself. So is `warmup_max_norm`, see
    `counted`. None is the package, for both.
    """
    cap = np.inf if max_norm is None else max_norm
    first, spikes, mu, var = [], 0, np.nan, np.nan

    def threshold(n):
        """What a spike is clipped to; None for no spike. The percentile test has no eps; the z-score has 1e-6."""
        sigma = np.sqrt(var)
        if clip_to == "edge":
            return mu + num_std * sigma if n > mu + num_std * sigma else None
        z = (n - mu) / (sigma + 1e-6)
        if not z > num_std:
            return None
        return mu if clip_to == "mean" else mu + num_std * sigma / (z / num_std)

    def step(n):
        nonlocal spikes, mu, var
        if len(first) < max(warmup_steps, 1):
            first.append(counted(n, np.mean(first) if first else 0, warmup_max_norm))
            if len(first) >= warmup_steps:
                mu, var = np.mean(first), np.var(first)
            at_first = cap if warmup_max_norm is None else min(cap, warmup_max_norm)
            return 0, at_first, {"mu": mu, "var": var, "spikes": 0}
        c = threshold(n)
        spikes = 0 if c is None else spikes + 1
        x = n if c is None or (patience is not None and spikes > patience) else c
        mu = decay * mu + (1 - decay) * x
        var = decay * var + (1 - decay) * (x - mu) ** 2  # the mean is the new one
        return 0, cap if c is None else min(c, cap), {"mu": mu, "var": var, "spikes": spikes}

    return follow(step, norms, guard)


def adagc(
    norms, ratio=1.05, decay=0.98, warmup_steps=100, warmup_max_norm=1.0, *, warmup_take_in="clipped", guard=True
):
    """AdaGC, Wang et al. 2025 (arXiv 2502.11034); `AdaGC.step` of pytorch_optimizer 4.1.0.

    Steps t < warmup_steps, and a tensor's first in any case: the global norm is clipped, and gamma is the smallest norm
    that came out. Then each tensor is held to `ratio * gamma`, where gamma counts as 1e-8 at least, and gamma averages
    the clipped norms.

    `warmup_take_in="raw"` is ours: gamma is the smallest norm as measured. Guarded, each tensor has a t of its own,
    which counts what was taken in. A step at which the global norm is not finite passes whole.
    """
    norms = np.asarray(norms, np.float64)
    tensors = norms.shape[1]
    gamma, taken = np.full(tensors, np.nan), np.zeros(tensors, int)
    bounds, gammas = [], []
    for row in norms:
        bound = np.full(tensors, np.inf)
        total = np.sqrt(np.sum(row**2))
        for i, n in enumerate(row):
            if guard and not (counts(n) and np.isfinite(total)):
                continue
            taken[i] += 1
            if taken[i] == 1 or taken[i] < warmup_steps:
                bound[i] = n * warmup_max_norm / (total + 1e-8)
                gamma[i] = np.fmin(gamma[i], n if warmup_take_in == "raw" else min(n, bound[i]))
            else:
                bound[i] = ratio * max(gamma[i], 1e-8)
                gamma[i] = decay * gamma[i] + (1 - decay) * min(n, bound[i])
        bounds.append(bound)
        gammas.append(gamma.copy())
    return Run(np.array(bounds), np.where(norms > bounds, bounds, norms), {"gamma": np.array(gammas)})


def aggc(
    norms,
    ratio,
    min_ratio=None,
    decay=0.98,
    min_norm=0.0,
    *,
    max_down=None,
    max_up=None,
    initial=None,
    guard=True,
):
    """AGGC, Li et al. 2026 (arXiv 2601.11864), one group; `PerModuleGradClipper` in ZhiyuanLi218/AGGC.

    Above ratio * ema: down to it; otherwise below max(min_norm, min_ratio * ema): up to it, past the upper end if they
    cross. No factor is under `max_down` or over `max_up`. The average takes in the norm after clipping. An upper end of
    0 is none. `min_ratio=None` counts as 0, so that `min_norm` alone raises; the authors have a switch for raising.

    The authors start the average at 0: `initial=0`. `initial=None` is ours: it starts at the first norm.
    """
    ema = initial

    def step(n):
        nonlocal ema
        if ema is None:
            ema = n
        upper, lower = ratio * ema, max(min_norm, (min_ratio or 0) * ema)
        bound = upper if upper > 0 else np.inf
        out = n
        if n > bound:
            bound = out = bound if max_down is None else max(bound, max_down * n)
        elif n < lower:
            out = lower if max_up is None else min(lower, max_up * n)
        ema = decay * ema + (1 - decay) * out
        return out if out > n else 0, max(bound, out), {"ema": ema, "lower": lower, "upper": upper}

    return follow(step, norms, guard)


def clip_by_history(
    norms,
    num_std=3.0,
    window=128,
    warmup_steps=64,
    *,
    take_in="clipped",
    patience=None,
    warmup_max_norm=None,
    guard=True,
):
    """levanter's `clip_update_by_historical_norm`: mean + k max(std, 1e-6) of the last norms before the current one.

    The deviation is the population's. It bounds once `warmup_steps` norms are there; levanter has max(2, window // 2)
    and takes in the raw norm: `take_in="raw"`. `take_in="clipped"` is ours, and with it `patience=K`: from the K+1st
    clipped norm in a row n itself is taken in. So is `warmup_max_norm`, see `counted`.
    """
    history, spikes = [], 0

    def step(n):
        nonlocal spikes
        if len(history) < warmup_steps:
            history.append(counted(n, np.mean(history) if history else 0, warmup_max_norm))
            return 0, np.inf if warmup_max_norm is None else warmup_max_norm, {"spikes": 0}
        c = np.mean(history) + num_std * max(np.std(history), 1e-6)
        spikes = spikes + 1 if n > c else 0
        raw = take_in == "raw" or (patience is not None and spikes > patience)
        history.append(n if raw else min(n, c))
        del history[:-window]
        return 0, c, {"spikes": spikes}

    return follow(step, norms, guard)


def tracked_quantile(norms, quantile=0.5, learning_rate=0.2, initial=1.0, guard=True):
    """Andrew et al. 2021 (arXiv 1905.03871), geometric update, one norm a step and no noise.

    `QuantileEstimatorQuery` in tensorflow/privacy: c <- c exp(-lr (1[n <= c] - q)), with n as measured.
    """
    c = initial

    def step(n):
        nonlocal c
        bound = c
        c = c * np.exp(-learning_rate * ((n <= c) - quantile))
        return 0, bound, {"c": c}

    return follow(step, norms, guard)


def clip_norm_growth(norms, ratio=1.01, guard=True):
    """The norm-growth limiter of Fira (arXiv 2410.01623) and APOLLO (arXiv 2412.05270), as in pytorch_optimizer's both.

    L = max(n / (before + 1e-8), g) / g; n / L, which is min(n, g (before + 1e-8)), is the next `before`. The first step
    passes.
    """
    before = np.inf

    def step(n):
        nonlocal before
        bound = ratio * (before + 1e-8)
        before = min(n, bound)
        return 0, bound, {"before": before}

    return follow(step, norms, guard)


def skip_step(norms, num_std=6.0, window=128, ddof=1, *, take_in="all", floor=0.0, guard=True):
    """OLMo-core's `SkipStepOptimizer` on one sequence: kept are steps with n <= mean + k std of the last norms before.

    It is active from step max(2, window // 2), the current one counted. `after` is 0 where a step is rejected, and n,
    whatever it is, elsewhere. Rejected norms are taken in; with `take_in="kept"` they are not. `floor` is ours: std is
    at least floor max(|mean|, 1). The statistics are those that the current norm was held to.
    """
    norms = np.asarray(norms, np.float64)
    history = []

    def step(n):
        bound, mean, std = np.inf, np.nan, np.nan
        if len(history) + 1 >= max(2, window // 2):
            mean = np.mean(history)
            std = np.std(history, ddof=ddof) if len(history) > ddof else np.nan  # of one norm: NaN, which rejects
            bound = mean + num_std * max(std, floor * max(abs(mean), 1))
        if take_in == "all" or n <= bound:
            history.append(n)
            del history[:-window]
        return 0, bound, {"mean": mean, "std": std}

    run = follow(step, norms, guard)
    return run._replace(after=np.where(np.isfinite(norms) & (norms <= run.bound), norms, 0))


def scaled_adam(norms, clipping_scale=2.0, period=100, guard=True):
    """The clipping of icefall's `ScaledAdam`, as its docstring has it: a multiple of the median of recent norms.

    The threshold is set in every `period`-th step, from the norms since the last time, the current one included. The
    median is entry 2 (period // 4) of them in ascending order. What the code does before the first of these is left
    out.
    """
    history, threshold = [], np.inf

    def step(n):
        nonlocal threshold
        history.append(n)
        if len(history) % period == 0:
            threshold = clipping_scale * sorted(history[-period:])[2 * (period // 4)]
        return 0, threshold, {}

    return follow(step, norms, guard)
