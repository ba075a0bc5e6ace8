"""What a history of norms looks like: percentiles, tail, spikes, drift, and what a bound would have clipped."""

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from optaxclip._arrays.trees import Tree
from optaxclip.diagnostics.histories import checked, ordinary

PERCENTILES = (1.0, 10.0, 50.0, 90.0, 99.0, 100.0)
WINDOW = 64  # steps that a spike is compared with
SPIKE_DEVIATIONS = 6.0
SPIKE_FACTOR = 2.0  # where the window hardly varies, only what is twice its median is a spike
FEWEST_FOR_TAIL = 25  # so that at least ten norms are in it
FEWEST_FOR_DRIFT = 16
_AT_ONCE = 10_000  # windows, of which each is copied


@dataclasses.dataclass(frozen=True, eq=False)
class Summary:
    """What `summary` found. NaN stands for what too few norms tell nothing about.

    Attributes:
      norms: the history, a float64 vector; step 1 is its first entry.
      steps: how many norms there are, and of these
      nonfinite: how many are infinite or NaN, and
      zeros: how many are 0. The rest are called ordinary here; all that follows is of these.
      percentiles: 1, 10, 50, 90, 99 and 100 to the norm that so many per cent do not exceed.
      tail_index: Hill's estimate of alpha, where the share of norms above x falls as x to the power -alpha. Below 2 the
        variance is infinite, below 1 the mean. inf if the largest norms are all the same.
      tail_interval: its 95 % interval, alpha (1 -+ 1.96 / sqrt(k)), where
      tail_count: k, the number of largest norms it rests on, is 2 sqrt(n) of n ordinary ones, rounded down.
      spikes: the steps, counted from 1, whose norm is a spike.
      drift: the median of the last quarter divided by that of the first.

    See also:
      `summary`.
    """

    norms: np.ndarray = dataclasses.field(repr=False)
    steps: int
    nonfinite: int
    zeros: int
    percentiles: Mapping[float, float]
    tail_index: float
    tail_interval: tuple[float, float]
    tail_count: int
    spikes: tuple[int, ...]
    drift: float

    def clipped_share(self, bound: Any) -> Any:
        """The share of all steps that a bound would have clipped: those with a finite norm above it.

        The norms are those of the run as it was. Under another bound it would have gone another way.

        Args:
          bound: a number, or an array of them.

        Returns:
          A float, or an array of the shape of `bound`; NaN for an empty history.

        Example:
          >>> from optaxclip import diagnostics
          >>> diagnostics.summary([0.5, 1.0, 2.0, 4.0]).clipped_share(1.0)
          0.5
        """
        finite = np.sort(self.norms[np.isfinite(self.norms)])
        above = len(finite) - np.searchsorted(finite, bound, side="right")
        share = above / self.steps if self.steps else np.full(np.shape(bound), np.nan)
        return share if np.ndim(bound) else float(share)


def summary(norms: Tree) -> Summary:
    """What a history of norms looks like.

    A spike is a norm far above those before it: on a logarithmic scale, more than six median absolute deviations above
    the median of the 64 ordinary norms before it, and more than twice that median. The first 64 are compared with each
    other. Deviations are not rescaled: six are about four standard deviations of a normal distribution. A lasting rise
    is a spike until it fills half of the window.

    Args:
      norms: a history of norms, a vector or list, one per step; infinite and NaN ones are counted apart.

    Returns:
      A `Summary`.

    Raises:
      ValueError: if it is no vector of real numbers, or one is negative.

    Example:
      >>> import numpy as np
      >>> from optaxclip import diagnostics
      >>> norms = np.linspace(0.9, 1.1, 200)
      >>> norms[[49, 149]] = 30.0, np.inf
      >>> found = diagnostics.summary(norms)
      >>> found.steps, found.nonfinite, found.spikes, round(found.percentiles[50], 2)
      (200, 1, (50,), 1.0)

    References:
      Hill, A simple general approach to inference about the tail of a distribution, 1975, Annals of Statistics 3(5).

    See also:
      `plot`, for the same as a figure; `from_state`, for a history that a clipper has recorded.
    """
    history = checked(norms)
    usable = ordinary(history)
    positive = history[usable]
    index, count = _tail(positive)
    return Summary(
        norms=history,
        steps=len(history),
        nonfinite=int((~np.isfinite(history)).sum()),
        zeros=int((history == 0).sum()),
        percentiles=MappingProxyType({at: _percentile(positive, at) for at in PERCENTILES}),
        tail_index=index,
        tail_interval=_interval(index, count),
        tail_count=count,
        spikes=tuple(int(step) + 1 for step in np.flatnonzero(is_spike(history))),
        drift=_drift(positive),
    )


def _percentile(positive: np.ndarray, at: float) -> float:
    return float(np.percentile(positive, at)) if len(positive) else math.nan


def _tail(positive: np.ndarray) -> tuple[float, int]:
    """Hill's estimate: the reciprocal mean of log(x_i / x_(k+1)) over the k largest."""
    if len(positive) < FEWEST_FOR_TAIL:
        return math.nan, 0
    count = int(2 * math.sqrt(len(positive)))
    largest = np.sort(np.log(positive))[::-1][: count + 1]
    excess = float((largest[:-1] - largest[-1]).mean())
    return (1 / excess if excess > 0 else math.inf), count


def _interval(index: float, count: int) -> tuple[float, float]:
    """The 95 % interval of such an estimate."""
    half = 1.96 / math.sqrt(count) if count else math.nan
    return index * (1 - half), index * (1 + half)


def is_spike(history: np.ndarray) -> np.ndarray:
    """Which norms of a history are spikes."""
    found = ordinary(history)
    found[found] = _stands_out(np.log(history[found]))
    return found


def _stands_out(logs: np.ndarray) -> np.ndarray:
    """Which of these logarithms stand out from the window before them."""
    if len(logs) < WINDOW // 4:
        return np.zeros(len(logs), bool)
    first = min(WINDOW, len(logs))
    windows = np.lib.stride_tricks.sliding_window_view(logs, first)
    parts = range(0, len(windows), _AT_ONCE)
    limits = np.concatenate([_spike_limits(windows[part : part + _AT_ONCE]) for part in parts])
    # Window i ends at i + first - 1 and judges the step after it; the first one judges its own besides.
    return logs > np.concatenate([np.full(first, limits[0]), limits[:-1]])


def _spike_limits(windows: np.ndarray) -> np.ndarray:
    centers = np.median(windows, axis=-1)
    deviations = np.median(np.abs(windows - centers[:, None]), axis=-1)
    return centers + np.maximum(SPIKE_DEVIATIONS * deviations, math.log(SPIKE_FACTOR))


def _drift(positive: np.ndarray) -> float:
    if len(positive) < FEWEST_FOR_DRIFT:
        return math.nan
    quarter = len(positive) // 4
    return float(np.median(positive[-quarter:]) / np.median(positive[:quarter]))
