"""What is scored, from the losses of all learning rates and seeds."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tests.benchmarks.sweep.programs import Outcome

TOLERANCE = 0.05  # a loss is good if it is at most so much above the best of all methods in its task
WORSE = 1.5  # a run has survived its spikes if its loss is at most so many times that without them


class Score(NamedTuple):
    """How a method did in a task. A loss is that of the held-out part, its median over the seeds.

    Attributes:
      best_loss: the smallest over the learning rates; inf if none is finite.
      best_rate: the learning rate that gave it, the smallest of several; NaN if none is finite.
      spread: the largest less the smallest over the seeds, at the best rate; inf if one of them is not finite.
      low: the smallest learning rate with a good loss, of the range around the best rate; NaN if there is none.
      high: the largest.
      decades: how many decades that range has; 0 if there is none.
      open_ended: whether it reaches an end of the learning rates tried, so that it may be wider.
      gap: the held-out loss less the training loss, the median over the seeds that are finite at the best rate.
      survived: the share of the runs that end finite and at most 1.5 times worse than without spikes, among those
        that learn without them; None where there are no spikes, or none that learns.
    """

    best_loss: float
    best_rate: float
    spread: float
    low: float
    high: float
    decades: float
    open_ended: bool
    gap: float
    survived: float | None


def scores(found: Mapping[str, Outcome], rates: Sequence[float], guess: float | None) -> dict[str, Score]:
    """The scores of the methods in one task. Which losses are good depends on all methods that are given.

    Args:
      found: by method, what came of its program.
      rates: the learning rates, ascending.
      guess: the loss of a model that has learnt nothing, in a task with spikes.
    """
    limit = (1 + TOLERANCE) * min(median(losses.held_out).min() for losses in found.values())
    return {name: _score(losses, np.asarray(rates), limit, guess) for name, losses in found.items()}


def median(losses: np.ndarray) -> np.ndarray:
    """For each learning rate the median over the seeds, of which one that is not finite is the worst."""
    return np.median(np.where(np.isfinite(losses), losses, np.inf), axis=1)


def _score(losses: Outcome, rates: np.ndarray, limit: float, guess: float | None) -> Score:
    medians = median(losses.held_out)
    best = int(np.argmin(medians))
    trained = np.isfinite(medians[best])
    seeds = np.where(np.isfinite(losses.held_out[best]), losses.held_out[best], np.inf)
    low, high, open_ended = good_range(medians, rates, limit)
    return Score(
        best_loss=float(medians[best]),
        best_rate=float(rates[best]) if trained else np.nan,
        spread=float(np.ptp(seeds)) if trained else np.nan,
        low=low,
        high=high,
        decades=0.0 if np.isnan(low) else float(np.log10(high / low)),
        open_ended=open_ended,
        gap=float(np.nanmedian(losses.held_out[best] - losses.train[best])) if trained else np.nan,
        survived=None if losses.unspiked is None or guess is None else survived(losses, guess),
    )


def good_range(medians: np.ndarray, rates: np.ndarray, limit: float) -> tuple[float, float, bool]:
    """The range of learning rates around the best one in which the loss stays at or below a limit.

    Between neighbouring rates the loss is a straight line over the logarithm of the rate.

    Args:
      medians: the loss at each rate.
      rates: ascending.
      limit: the largest good loss.

    Returns:
      Its ends, NaN if there is none, and whether it reaches the first or the last rate.
    """
    best = int(np.argmin(medians))
    if not medians[best] <= min(limit, np.finfo(np.float64).max):
        return np.nan, np.nan, False
    low, high = best, best
    while low > 0 and medians[low - 1] <= limit:
        low -= 1
    while high < len(rates) - 1 and medians[high + 1] <= limit:
        high += 1
    ends = (_crossing(medians, rates, low, low - 1, limit), _crossing(medians, rates, high, high + 1, limit))
    return *ends, low == 0 or high == len(rates) - 1


def _crossing(medians: np.ndarray, rates: np.ndarray, inside: int, outside: int, limit: float) -> float:
    """Where the line between two neighbouring rates reaches the limit; the rate inside if there is no other."""
    if not 0 <= outside < len(rates):
        return float(rates[inside])
    part = (limit - medians[inside]) / (medians[outside] - medians[inside])  # 0 if that is infinite
    return float(rates[inside] * (rates[outside] / rates[inside]) ** part)


def survived(losses: Outcome, guess: float) -> float | None:
    """The share of the runs that survive their spikes, among those that learn without them.

    A run learns if its loss is below half of that of a guess.

    Args:
      losses: with `unspiked`.
      guess: the loss of a guess.
    """
    assert losses.unspiked is not None
    learns = losses.unspiked < guess / 2  # false for NaN
    survives = learns & (losses.held_out <= WORSE * losses.unspiked)
    return float(survives.sum() / learns.sum()) if learns.any() else None
