"""Draws the contents of a panel: a curve, a limit, and marks for clipped, lost and too large norms.

Nothing depends on colours: dashes, ticks, triangles and hatching distinguish everything in black and white.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

INK, MARK, BAND, FAINT = "#202020", "#c51b00", "#2166ac", "#c8c8c8"
TRIANGLES = 30  # that fit side by side
DASHED = {"color": MARK, "linewidth": 1.0, "linestyle": (0, (4, 2))}  # for a limit


def draw_below(axes: Any, steps: np.ndarray, values: np.ndarray, top: float, label: str) -> None:
    """Draws a curve up to `top`. Values above it become triangles, with a note of the largest one.

    Otherwise a single 1e25 would squeeze all other values into a line.
    """
    values = values.astype(np.float64)  # `top` may exceed float32
    shown = np.where(np.isfinite(values), np.minimum(values, top), np.nan)
    axes.plot(steps, shown, color=INK, linewidth=0.8, label=label, **_dots(shown))
    above = np.flatnonzero(np.isfinite(values) & (values > top))
    if not len(above):
        return
    _, first = np.unique(above * TRIANGLES // len(values), return_index=True)
    at = steps[above[first]]
    axes.plot(at, np.full(len(at), top), "^", color=MARK, markersize=4, clip_on=False, label="beyond the axis")
    _note(axes, 0.9, f"up to {_readable(values[above].max())}")


def draw_limit(axes: Any, steps: np.ndarray, limit: np.ndarray, label: str, style: dict[str, Any]) -> None:
    """Draws a limit over the steps, with gaps where nothing bounds."""
    axes.plot(steps, np.where(np.isfinite(limit), limit, np.nan), label=label, **style)


def hatch_nonfinite(axes: Any, steps: np.ndarray, values: np.ndarray) -> None:
    """Hatches the steps whose value is infinite or NaN, with a note if the last one is."""
    lost = ~np.isfinite(values)
    runs = _runs(steps, lost)
    for first, length in runs:
        area = {"facecolor": "none", "edgecolor": "0.6", "hatch": "////", "linewidth": 0.4}
        axes.axvspan(first - 0.5, first - 0.5 + length, label="not finite", **area)
    if len(lost) and lost[-1]:
        _note(axes, 0.5, f"not finite from step {runs[-1][0]} on")


def tick_off(axes: Any, steps: np.ndarray, which: np.ndarray, label: str) -> None:
    """Draws ticks along the lower edge at some steps. Adjacent ticks form a bar."""
    ticks = [(first - 0.5, length) for first, length in _runs(steps, which)]
    below = axes.get_xaxis_transform()  # steps to the right, parts of the panel upwards
    if ticks:
        axes.broken_barh(ticks, (0.0, 0.08), transform=below, color=BAND, linewidth=0.4, label=label)


def norm_range(norm: np.ndarray, limits: Sequence[np.ndarray], beyond: float) -> tuple[float, float]:
    """Returns the range of the vertical axis: from below the smallest norm to above most norms.

    Args:
      norm: the norms.
      limits: the limits in the same panel; a twentieth of each may leave the panel.
      beyond: norms may leave the panel above this many times their 95th percentile.
    """
    norm = _positive(norm, otherwise=np.ones(1))
    limits = [_positive(limit, otherwise=norm) for limit in limits]
    lowest = min([norm.min(), *(np.quantile(limit, 0.05) for limit in limits)])
    highest = max([min(norm.max(), beyond * np.quantile(norm, 0.95)), *(np.quantile(limit, 0.95) for limit in limits)])
    bottom, top = math.log10(lowest), math.log10(highest)
    height = max(top - bottom, 1.0)
    return 10 ** (bottom - 0.2 * height), 10 ** (top + 0.1 * height)  # room for ticks below and a note above


def _positive(values: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    """Returns the values that a logarithmic axis can show, or `otherwise` if there are none."""
    values = values.astype(np.float64)  # multiples of a large float32 overflow
    shown = values[np.isfinite(values) & (values > 0)]
    return shown if shown.size else otherwise


def _runs(steps: np.ndarray, which: np.ndarray) -> list[tuple[int, int]]:
    """Returns the first step and the length of each run of True."""
    edges = np.flatnonzero(np.diff(which.astype(np.int8), prepend=0, append=0))
    return [(int(steps[start]), int(stop - start)) for start, stop in edges.reshape(-1, 2)]


def _dots(values: np.ndarray) -> dict[str, Any]:
    """Returns a style with dots for values without neighbours, which have no line. If values are few, all get dots."""
    if len(values) < TRIANGLES:
        return {"marker": "o", "markersize": 2}
    missing = np.pad(np.isnan(values), 1, constant_values=True)
    alone = np.flatnonzero(~missing[1:-1] & missing[:-2] & missing[2:])
    return {"marker": "o", "markersize": 2, "markevery": alone.tolist()} if len(alone) else {}


def _readable(value: float) -> str:
    if value < 1000:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return rf"${mantissa}\times10^{{{int(exponent)}}}$"


def _note(axes: Any, height: float, text: str) -> None:
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5}
    axes.text(0.97, height, text, transform=axes.transAxes, ha="right", va="top", fontsize=7, bbox=box)
