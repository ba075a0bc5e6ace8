"""Draws norms: before the clip, what was permitted, and what was clipped."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from optaxclip._arrays.trees import Tree
from optaxclip.diagnostics.clippers import Clipper, named, permitted
from optaxclip.diagnostics.histories import LAST, History, history_of, ordinary, ordinary_norms
from optaxclip.diagnostics.marks import (
    BAND,
    DASHED,
    INK,
    MARK,
    draw_below,
    draw_limit,
    hatch_nonfinite,
    norm_range,
    tick_off,
)
from optaxclip.diagnostics.panels import add_legend, count_steps, grid, styled
from optaxclip.diagnostics.replays import spikes_of
from optaxclip.diagnostics.summaries import summary
from optaxclip.records.recorder import excess

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEYOND = 1000.0  # times the 95th percentile; larger norms are drawn at the end of the axes
PANELS = 6  # groups in one figure
STYLES: list[dict[str, Any]] = [  # of limits; dashes distinguish them in black and white
    {"color": "#2166ac", "linewidth": 1.2, "linestyle": (0, (7, 2))},
    {"color": "#c51b00", "linewidth": 1.4, "linestyle": (0, (1, 1))},
    {"color": "#1b7837", "linewidth": 1.2, "linestyle": (0, (7, 1.5, 1, 1.5))},
    {"color": "#762a83", "linewidth": 1.8, "linestyle": "-"},
    {"color": "#b35806", "linewidth": 1.2, "linestyle": (0, (3, 1.5))},
]


class Limit(NamedTuple):
    """What a clipper did or would have done: limits and clipped steps, of shape (n, G), and how to draw them."""

    label: str
    limit: np.ndarray
    clipped: np.ndarray
    style: dict[str, Any]


def plot(norms: Tree, *clippers: Clipper, place: str = "", history: str = LAST, **named_clippers: Clipper) -> "Figure":
    """Draws norms over the steps, with what their own clipper did, or what other clippers would have done.

    Spikes, as `summary` defines them, are marked. Steps that are not finite are hatched. Clipped steps, of the record
    or of the only clipper, have a tick at the lower edge. Norms of more than 1,000 times the 95th percentile are drawn
    at the end of the axes. Norms of 0 are not drawn, because the axes are logarithmic.

    For a single norm there are two more panels: a histogram, and the share of steps that each fixed bound would have
    clipped. There, every clipper is marked at its median limit. For several groups there is one panel for each of the
    six groups that were furthest outside their bands. The limits of clippers are those of `replay`, in an open loop.

    Args:
      norms: a history of norms, a vector or list, one per step; or an optimizer's state with the record of a clipper.
      *clippers: clippers whose limits are drawn, as in `replay`; at most five, the named ones included.
      place: which record of the state, as in `from_state`.
      history: which of its steps, as in `from_state`.
      **named_clippers: clippers with a name for the legend.

    Returns:
      A matplotlib Figure. Save it with `figure.savefig("norms.png")`.

    Raises:
      ImportError: if matplotlib is missing; it comes with the extra `demo`.
      ValueError: if `norms` is neither a history nor a state with a record, if no norm is finite and positive, if there
        are too many clippers, or if `replay` refuses one of them.

    Example:
      >>> import optaxclip
      >>> from optaxclip import diagnostics
      >>> figure = diagnostics.plot([0.5, 1.0, 2.0, 40.0], fixed=optaxclip.clip_by_global_norm(3.0))
      >>> [line.get_label() for line in figure.axes[0].lines]
      ['norm', 'fixed, clips 25.0 %']

    See also:
      `replay` and `summary`, for the same in numbers.

      Notebook: `notebooks/choosing_a_threshold.ipynb`, how to choose a bound.
    """
    made_of = named(clippers, named_clippers)
    if len(made_of) > len(STYLES):
        raise ValueError(f"clippers must be at most {len(STYLES)} in one figure, got {len(made_of)}")
    given = history_of(norms, place, history)
    if not len(ordinary_norms(given.norms)):
        raise ValueError("norms has no finite, positive norm to draw")
    limits = _recorded(given, beside=bool(made_of))
    for (name, each), style in zip(made_of.items(), STYLES, strict=False):
        done = permitted(name, each, given)
        limits.append(_limit(name, done.limit, done.clipped, style))
    return _one_group(given, limits) if given.norms.shape[1] == 1 else _several_groups(given, limits)


def _recorded(given: History, *, beside: bool) -> list[Limit]:
    """Returns what the record says of its own clipper; an empty list without a record."""
    if given.limits is None or given.scales is None:
        return []
    name = "recorded limit" if beside else "limit"
    return [_limit(name, given.limits, given.scales != 1, DASHED)]


def _limit(name: str, limit: np.ndarray, clipped: np.ndarray, style: dict[str, Any]) -> Limit:
    return Limit(f"{name}, clips {100 * clipped.any(axis=1).mean():.1f} %", limit, clipped, style)


def _order(limits: Sequence[Limit]) -> list[str]:
    """Returns the order of the legend."""
    return ["norm", *(each.label for each in limits), "clipped steps", "spike", "beyond the axis", "not finite"]


# Several groups.


def _several_groups(given: History, limits: Sequence[Limit]) -> "Figure":
    groups = given.groups or tuple(f"#{number}" for number in range(given.norms.shape[1]))
    shown = _furthest_outside(given)
    with grid([groups[group] for group in shown], "norm", sharey=False) as (figure, used):
        for axes, group in zip(used, shown, strict=True):
            _draw_history(axes, given, limits, group)
        add_legend(figure, used, order=_order(limits))
        if len(shown) < len(groups):
            figure.supxlabel(f"step; {len(shown)} of {len(groups)} groups, those furthest outside their bands")
    return figure


def _furthest_outside(given: History) -> list[int]:
    """Returns the groups to show, in their order."""
    with np.errstate(all="ignore"):
        worst = excess(np, given.norms, given.limits, given.scales).max(axis=0)
    return sorted(np.argsort(-worst, kind="stable")[:PANELS].tolist())


def _draw_history(axes: Any, given: History, limits: Sequence[Limit], group: int) -> None:
    steps, norm = given.steps, given.norms[:, group]
    bottom, top = norm_range(norm, [each.limit[:, group] for each in limits], BEYOND)
    axes.set_yscale("log")
    axes.set_ylim(bottom, top)
    axes.set_xlim(steps[0] - 0.5, steps[-1] + 0.5)
    draw_below(axes, steps, np.where(norm == 0, np.nan, norm), top, "norm")
    for each in limits:
        draw_limit(axes, steps, each.limit[:, group], each.label, each.style)
    hatch_nonfinite(axes, steps, norm)
    if given.limits is not None or len(limits) == 1:
        tick_off(axes, steps, limits[0].clipped[:, group], "clipped steps")


# One group.


def _one_group(given: History, limits: Sequence[Limit]) -> "Figure":
    with styled(7.2, 5.6) as figure:
        panels: Any = figure.subplot_mosaic([["history", "history"], ["histogram", "share"]])
        axes = panels["history"]
        _draw_history(axes, given, limits, 0)
        _draw_spikes(axes, given)
        count_steps(axes)
        axes.set(title="History", xlabel="step", ylabel="norm")
        norm, (_, top) = given.norms[:, 0].astype(np.float64), axes.get_ylim()
        _draw_histogram(panels["histogram"], norm, limits, top)
        _draw_share(panels["share"], norm, limits, top)
        add_legend(figure, [axes], order=_order(limits), columns=4)
    return figure


def _draw_spikes(axes: Any, given: History) -> None:
    at = np.flatnonzero(spikes_of(given)[:, 0])
    if len(at):
        size = np.minimum(given.norms[at, 0], axes.get_ylim()[1])
        axes.plot(given.steps[at], size, "^", color=MARK, markersize=4.5, fillstyle="none", label="spike")


def _draw_histogram(axes: Any, norm: np.ndarray, limits: Sequence[Limit], top: float) -> None:
    logs = np.log10(np.minimum(ordinary_norms(norm), top))
    bins = int(np.clip(2 * math.sqrt(len(logs)), 10, 80))
    axes.hist(logs, bins=bins, color=BAND, alpha=0.4, edgecolor=INK, linewidth=0.4)
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7)  # so that a single step has a bar
    for each in limits:
        if middle := _middle(each):
            axes.axvline(math.log10(middle), **each.style)
    label = "log10 of the norm" + ("; the last bar is that and beyond" if ordinary_norms(norm).max() > top else "")
    axes.set(title="Histogram" + (", and median limits" if limits else ""), xlabel=label, ylabel="steps")


def _draw_share(axes: Any, norm: np.ndarray, limits: Sequence[Limit], top: float) -> None:
    found = summary(norm)
    positive = np.sort(np.minimum(norm[ordinary(norm)], top))
    marked = [middle for each in limits if (middle := _middle(each))]
    ends = [min([positive[0], *marked]) / 2, 2 * max([top, *marked])]
    bounds = np.concatenate([ends[:1], positive, ends[1:]])
    axes.step(bounds, 100 * found.clipped_share(bounds), where="post", color=INK, linewidth=1.0)
    axes.set_xscale("log")
    axes.set_ylim(0, 103)
    for each in limits:
        if middle := _middle(each):
            share = 100 * each.clipped.mean()
            axes.plot([middle, middle], [0, share], **each.style)
            axes.plot(middle, share, "o", color=each.style["color"], markersize=4, zorder=3)
    axes.set(title="What a fixed bound would have clipped", xlabel="bound", ylabel="steps clipped (%)")


def _middle(each: Limit) -> float:
    """Returns the median of the limits of a single group; 0 if a logarithmic axis can't show it."""
    middle = float(np.median(each.limit))
    return middle if math.isfinite(middle) else 0.0
