"""What may be in a panel of a figure: a curve, a limit, and marks for what was clipped, lost or too large.

Colours only help: dashes, ticks, triangles and hatching tell things apart in black and white.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

INK, MARK, BAND, FAINT = "#202020", "#c51b00", "#2166ac", "#c8c8c8"
TRIANGLES = 30  # so many fit side by side
DASHED = {"color": MARK, "linewidth": 1.0, "linestyle": (0, (4, 2))}  # of a limit


def draw_below(axes: Any, steps: np.ndarray, values: np.ndarray, top: float, label: str) -> None:
    """A curve where it stays below `top`; where it does not, triangles, and the largest number that is not shown.

    One number of 1e25 would squeeze all others into a line.
    """
    values = values.astype(np.float64)  # `top` may be beyond float32
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
    """A limit over the steps; where it bounds nothing there is no line."""
    axes.plot(steps, np.where(np.isfinite(limit), limit, np.nan), label=label, **style)


def hatch_nonfinite(axes: Any, steps: np.ndarray, values: np.ndarray) -> None:
    """Hatches the steps whose number is infinite or NaN, and says so if that is how it ends."""
    lost = ~np.isfinite(values)
    runs = _runs(steps, lost)
    for first, length in runs:
        area = {"facecolor": "none", "edgecolor": "0.6", "hatch": "////", "linewidth": 0.4}
        axes.axvspan(first - 0.5, first - 0.5 + length, label="not finite", **area)
    if len(lost) and lost[-1]:
        _note(axes, 0.5, f"not finite from step {runs[-1][0]} on")


def tick_off(axes: Any, steps: np.ndarray, which: np.ndarray, label: str) -> None:
    """Ticks along the lower edge at some of the steps; they are a bar where all of them are meant."""
    ticks = [(first - 0.5, length) for first, length in _runs(steps, which)]
    below = axes.get_xaxis_transform()  # steps to the right, parts of the panel upwards
    if ticks:
        axes.broken_barh(ticks, (0.0, 0.08), transform=below, color=BAND, linewidth=0.4, label=label)


def norm_range(norm: np.ndarray, limits: Sequence[np.ndarray], beyond: float) -> tuple[float, float]:
    """From below the smallest norm to above most: the few that are far larger leave the panel.

    Args:
      norm: the norms.
      limits: what is drawn beside them; a twentieth of each may leave the panel.
      beyond: how many times the 95th percentile of the norms is far larger.
    """
    norm = _positive(norm, otherwise=np.ones(1))
    limits = [_positive(limit, otherwise=norm) for limit in limits]
    lowest = min([norm.min(), *(np.quantile(limit, 0.05) for limit in limits)])
    highest = max([min(norm.max(), beyond * np.quantile(norm, 0.95)), *(np.quantile(limit, 0.95) for limit in limits)])
    bottom, top = math.log10(lowest), math.log10(highest)
    height = max(top - bottom, 1.0)
    return 10 ** (bottom - 0.2 * height), 10 ** (top + 0.1 * height)  # room for the ticks below, and for a note above


def _positive(values: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    """Those that a logarithmic axis can show, or `otherwise` if there are none."""
    values = values.astype(np.float64)  # 30 times a large float32 is no float32
    shown = values[np.isfinite(values) & (values > 0)]
    return shown if shown.size else otherwise


def _runs(steps: np.ndarray, which: np.ndarray) -> list[tuple[int, int]]:
    """The first step, and the length, of each run of True."""
    edges = np.flatnonzero(np.diff(which.astype(np.int8), prepend=0, append=0))
    return [(int(steps[start]), int(stop - start)) for start, stop in edges.reshape(-1, 2)]


def _dots(values: np.ndarray) -> dict[str, Any]:
    """A number without neighbours is no line, but a dot; where there are few numbers each gets one."""
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
