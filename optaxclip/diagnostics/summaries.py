"""Summarizes a history of norms: percentiles, tail, spikes, drift, and what a bound would have clipped."""

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
SPIKE_FACTOR = 2.0  # a spike must exceed this many times the median, in case the window hardly varies
FEWEST_FOR_TAIL = 25  # so that the tail has at least ten norms
FEWEST_FOR_DRIFT = 16
_AT_ONCE = 10_000  # windows; each is a copy


@dataclasses.dataclass(frozen=True, eq=False)
class Summary:
    """What `summary` found. A number is NaN if there are too few norms for it.

    A norm is ordinary if it is finite and not 0. Everything from `percentiles` on is about ordinary norms only.

    Attributes:
      norms: the history, a float64 vector. Its first entry is step 1.
      steps: the number of norms.
      nonfinite: how many norms are infinite or NaN.
      zeros: how many norms are 0.
      percentiles: maps 1, 10, 50, 90, 99 and 100 to these percentiles of the norms.
      tail_index: Hill's estimate of alpha, where the share of norms above x falls as x to the power -alpha. If alpha is
        below 2, the variance is infinite; below 1, so is the mean. It is inf if the largest norms are all equal.
      tail_interval: the 95 % interval of `tail_index`, alpha (1 -+ 1.96 / sqrt(k)), with k the `tail_count`.
      tail_count: k, the number of largest norms that the estimate uses: 2 sqrt(n) of n ordinary norms, rounded down.
      spikes: the steps of spikes, counted from 1.
      drift: the median of the last quarter divided by the median of the first quarter.

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
        """Returns the share of all steps that a bound would have clipped: those with a finite norm above it.

        The norms are those of the recorded run. With another bound, the later norms would have been different.

        Args:
          bound: a number, or an array of numbers.

        Returns:
          A float, or an array with the shape of `bound`; NaN for an empty history.

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
    """Summarizes a history of norms in numbers.

    A spike is a norm far above the 64 ordinary norms before it: more than twice their median, and on a logarithmic
    scale more than six median absolute deviations above it. Deviations are not rescaled: six of them are about four
    standard deviations of a normal distribution. The first 64 norms are compared with each other. A lasting rise counts
    as spikes until it fills half of the window.

    Args:
      norms: a history of norms, a vector or list, one per step. Infinite and NaN ones are counted separately.

    Returns:
      A `Summary`.

    Raises:
      ValueError: if `norms` is not a vector of real numbers, or if a norm is negative.

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
    """Returns Hill's estimate, the reciprocal mean of log(x_i / x_(k+1)) over the k largest, and k."""
    if len(positive) < FEWEST_FOR_TAIL:
        return math.nan, 0
    count = int(2 * math.sqrt(len(positive)))
    largest = np.sort(np.log(positive))[::-1][: count + 1]
    excess = float((largest[:-1] - largest[-1]).mean())
    return (1 / excess if excess > 0 else math.inf), count


def _interval(index: float, count: int) -> tuple[float, float]:
    """Returns the 95 % interval of Hill's estimate."""
    half = 1.96 / math.sqrt(count) if count else math.nan
    return index * (1 - half), index * (1 + half)


def is_spike(history: np.ndarray) -> np.ndarray:
    """Returns which norms of a history are spikes."""
    found = ordinary(history)
    found[found] = _stands_out(np.log(history[found]))
    return found


def _stands_out(logs: np.ndarray) -> np.ndarray:
    """Returns which of these logarithms stand out from the window before them."""
    if len(logs) < WINDOW // 4:
        return np.zeros(len(logs), bool)
    first = min(WINDOW, len(logs))
    windows = np.lib.stride_tricks.sliding_window_view(logs, first)
    parts = range(0, len(windows), _AT_ONCE)
    limits = np.concatenate([_spike_limits(windows[part : part + _AT_ONCE]) for part in parts])
    # Window i ends at i + first - 1 and judges the step after it. The first window also judges its own steps.
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
