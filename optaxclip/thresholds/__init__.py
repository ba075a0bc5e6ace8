"""How large a norm may be: the Thresholds that `clip_by` takes.

==========================  ===================================================================  =====================
threshold                   a norm may be at most                                                state per group
==========================  ===================================================================  =====================
`constant`, `smooth`        a number; smoothly below a number                                    none
`between`, `exactly`        a number, and at least another; exactly a number                     none
`relative_to_params`        a share of the norm of the parameters                                none
`quantile`                  a quantile of all norms so far, or of the last `window`              40 KiB; 4 B a norm
`order_statistic`           one of the last `window` norms, by rank                              4 B a norm
`tracked_quantile`          an estimate of a quantile that moves by one factor per step          4 B
`zscore`                    a number of standard deviations above a moving average               16 B
`mean_std`                  a number of standard deviations above the mean of the last `window`  4 B a norm
`ema_ratio`, `ema_band`     a multiple of the moving average of the clipped norms                8 B
`growth`                    a multiple of the last clipped norm                                  4 B
`average`                   the moving average of the norms                                      8 B
`normalised`                exactly their mean divided by their root mean square                 12 B
`chain`                     what all of several thresholds permit                                that of all
`times`                     a multiple of what another threshold permits                         that of the other
`at_least`                  what another threshold permits, and never less than a number         that of the other
==========================  ===================================================================  =====================

The bounds of fixed thresholds are numbers, arrays, or optax schedules. Arrays may be traced, or injected by
`optax.inject_hyperparams`. If the norm has one entry per leaf or group, a bound may also be a prefix pytree of these.
None in a pytree means no bound.

Thresholds that follow the history of norms take numbers or scalar arrays. Each group has its own history. Zero and
non-finite norms do not enter the history and do not count for the warm-up: the statistics of their group stay
unchanged. Inside `optax.MultiSteps` a history advances once per real step. In front of it in a chain, it advances once
per micro-step.

Most thresholds with a history do not bound the first norms. If your run can explode at once, pass `warmup_max_norm=` if
there is one, or `chain` the threshold with a `constant`.
"""

from optaxclip.thresholds.averages import average, ema_band, ema_ratio, growth
from optaxclip.thresholds.composed import at_least, chain, times
from optaxclip.thresholds.deviations import mean_std, normalised, zscore
from optaxclip.thresholds.fixed import between, constant, exactly, smooth
from optaxclip.thresholds.quantiles import order_statistic, quantile, tracked_quantile
from optaxclip.thresholds.relative import relative_to_params

__all__ = [
    "at_least",
    "average",
    "between",
    "chain",
    "constant",
    "ema_band",
    "ema_ratio",
    "exactly",
    "growth",
    "mean_std",
    "normalised",
    "order_statistic",
    "quantile",
    "relative_to_params",
    "smooth",
    "times",
    "tracked_quantile",
    "zscore",
]
