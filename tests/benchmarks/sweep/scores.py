"""What is scored, from the losses of all learning rates and seeds."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit  # quantiles of the t-distribution; scipy.stats takes a second to import

from tests.benchmarks.sweep.programs import Outcome

TOLERANCE = 0.05  # a loss is good if it is at most so much above the best of all methods in its task
COMPARABLE = 0.1  # sensitivities are compared where the best loss is at most so much above the best of all methods
REFERENCE = "clip_by_global_norm"  # the method that all others are compared with
CONFIDENCE = 0.95  # of the interval around a difference from the reference
ROUNDING = 0.001  # in units of the loss: smaller differences from the reference are none
WORSE = 1.5  # a run has survived its spikes if its loss is at most so many times that without them


class Score(NamedTuple):
    """How a method did in a task. A loss is that of the held-out part, its median over the seeds.

    Attributes:
      best_loss: the smallest over the learning rates; inf if none is finite.
      best_rate: the learning rate that gave it, the smallest of several; NaN if none is finite.
      spread: the largest less the smallest over the seeds, at the best rate; inf if one of them is not finite.
      loss_differs: whether the loss at the best rate can be told from that of the reference at its own; None for the
        reference, and where it is missing.
      sensitivity: the learning-rate sensitivity of `sensitivities`, its mean over the seeds.
      sensitivity_least: the smallest over the seeds.
      sensitivity_most: the largest.
      sensitivity_differs: whether it can be told from that of the reference; None as above.
      comparable: whether the best loss is near that of the best method. What hardly learns is hardly sensitive.
      spikes: how many steps of a run are spikes of the gradient's norm, at the best rate, the mean over the seeds; NaN
        if there is no best rate.
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
    loss_differs: bool | None
    sensitivity: float
    sensitivity_least: float
    sensitivity_most: float
    sensitivity_differs: bool | None
    comparable: bool
    spikes: float
    low: float
    high: float
    decades: float
    open_ended: bool
    gap: float
    survived: float | None


def scores(found: Mapping[str, Outcome], rates: Sequence[float], guess: float | None) -> dict[str, Score]:
    """The scores of the methods in one task. The limit of a good loss, and the reference, are among those given.

    Args:
      found: by method, what came of its program.
      rates: the learning rates, ascending.
      guess: the loss of a model that has learnt nothing, in a task with spikes.
    """
    least = min(median(outcome.held_out).min() for outcome in found.values())
    reference = found.get(REFERENCE)
    return {
        name: _score(outcome, None if name == REFERENCE else reference, np.asarray(rates), least, guess)
        for name, outcome in found.items()
    }


def median(losses: np.ndarray) -> np.ndarray:
    """For each learning rate the median over the seeds, of which one that is not finite is the worst."""
    return np.median(np.where(np.isfinite(losses), losses, np.inf), axis=1)


def sensitivities(outcome: Outcome) -> np.ndarray:
    r"""The learning-rate sensitivity of each seed: how far the loss is from the best one, on average over the rates.

    .. math:: E_{\eta \in [a, b]}[\min(\ell(\eta), \ell_0) - \ell^*]

    Here l_0 is the loss before the first step, and l* the smallest of all rates. A run that is lost counts as l_0. The
    rates are evenly spaced on a logarithmic scale.

    References:
      Wortsman et al., Small-scale proxies for large-scale Transformer training instabilities, 2023, arXiv:2309.14322.
    """
    losses = _at_most_initial(outcome)
    return (losses - losses.min(axis=0)).mean(axis=0)


def _at_most_initial(outcome: Outcome) -> np.ndarray:
    return np.fmin(outcome.held_out, outcome.initial)  # of NaN and a number, the number


def differs(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two methods can be told apart: the t-interval of their difference, paired by seed, excludes 0."""
    difference = one - other
    if len(difference) < 2:
        return False
    degrees = len(difference) - 1
    standard_error = difference.std(ddof=1) / np.sqrt(len(difference))
    half = stdtrit(degrees, (1 + CONFIDENCE) / 2) * standard_error
    return bool(abs(difference.mean()) > max(half, ROUNDING))


def _best(outcome: Outcome) -> int:
    """Where the best learning rate is, the smallest of several."""
    return int(np.argmin(median(outcome.held_out)))


def _score(outcome: Outcome, reference: Outcome | None, rates: np.ndarray, least: float, guess: float | None) -> Score:
    medians = median(outcome.held_out)
    best = _best(outcome)
    trained = np.isfinite(medians[best])
    seeds = np.where(np.isfinite(outcome.held_out[best]), outcome.held_out[best], np.inf)
    low, high, open_ended = good_range(medians, rates, (1 + TOLERANCE) * least)
    sensitivity = sensitivities(outcome)
    loss_differs = sensitivity_differs = None
    if reference is not None:
        pair = (_at_most_initial(each)[_best(each)] for each in (outcome, reference))
        loss_differs = differs(*pair)
        sensitivity_differs = differs(sensitivity, sensitivities(reference))
    return Score(
        best_loss=float(medians[best]),
        best_rate=float(rates[best]) if trained else np.nan,
        spread=float(np.ptp(seeds)) if trained else np.nan,
        loss_differs=loss_differs,
        sensitivity=float(sensitivity.mean()),
        sensitivity_least=float(sensitivity.min()),
        sensitivity_most=float(sensitivity.max()),
        sensitivity_differs=sensitivity_differs,
        comparable=bool(trained and medians[best] <= (1 + COMPARABLE) * least),
        spikes=float(outcome.spikes[best].mean()) if trained else np.nan,
        low=low,
        high=high,
        decades=0.0 if np.isnan(low) else float(np.log10(high / low)),
        open_ended=open_ended,
        gap=float(np.nanmedian(outcome.held_out[best] - outcome.train[best])) if trained else np.nan,
        survived=None if outcome.unspiked is None or guess is None else survived(outcome, guess),
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


def survived(outcome: Outcome, guess: float) -> float | None:
    """The share of the runs that survive their spikes, among those that learn without them.

    A run learns if its loss is below half of that of a guess.

    Args:
      outcome: with `unspiked`.
      guess: the loss of a guess.
    """
    assert outcome.unspiked is not None
    learns = outcome.unspiked < guess / 2  # false for NaN
    survives = learns & (outcome.held_out <= WORSE * outcome.unspiked)
    return float(survives.sum() / learns.sum()) if learns.any() else None
