"""What the figures share: a grid of small panels, one per row of the table, and the marks that may be in one.

Colours only help: dashes, ticks, triangles and hatching tell things apart in black and white.
"""

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from optaxclip.demo.ending import InputError
from optaxclip.demo.table import Line

COLUMNS = 3
PANEL = (2.8, 1.55)  # inches
LEGEND_COLUMNS = (2, 4, 6)  # so many entries fit above one, two or three panels
TRIANGLES = 30  # so many fit side by side
INK, MARK, BAND, FAINT = "#202020", "#c51b00", "#2166ac", "#c8c8c8"
LEGEND = ("loss", "norm", "limit", "clipped steps", "the other rows", "guessing", "beyond the axis", "not finite")

STYLE: dict[Any, Any] = {
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlepad": 7,
    "axes.titlesize": 8,
    "figure.labelsize": 9,
    "font.size": 8,
    "hatch.linewidth": 0.5,
    "legend.frameon": False,
    "savefig.dpi": 200,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
}


class FiguresError(InputError):
    """Figures can't be drawn; the message says why."""


def require_matplotlib() -> None:
    """Raises FiguresError if matplotlib is missing: better before the training than after it."""
    try:
        import_module("matplotlib")
    except ImportError as error:
        raise FiguresError("the figures of --out need matplotlib: pip install 'optaxclip[demo]'") from error


@contextmanager
def panels(path: Path, lines: Sequence[Line], label: str, *, sharey: bool) -> Generator[list[Any], None, None]:
    """The panels of a figure, one per line, in order; the figure is written when the context ends.

    Args:
      path: the file, a PNG.
      lines: what is shown.
      label: of the vertical axes.
      sharey: whether they are the same.
    """
    # An extra of the package, which only figures need. Not pyplot, which looks for a screen and keeps every figure: a
    # plain Figure draws PNGs with Agg.
    import matplotlib as mpl  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    columns = min(COLUMNS, len(lines))
    rows = math.ceil(len(lines) / columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(columns * PANEL[0] + 0.4, rows * PANEL[1] + 0.9), layout="constrained")
        grid: list[Any] = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=sharey).flat)
        for spare in grid[len(lines) :]:
            spare.remove()
        used = grid[: len(lines)]
        for axes, line in zip(used, lines, strict=True):
            axes.set_title(line.shown)
            axes.xaxis.get_major_locator().set_params(integer=True)
        for axes in used[-columns:]:
            axes.tick_params(labelbottom=True)
        figure.supxlabel("step")
        figure.supylabel(label)
        yield used
        _add_legend(figure, used)
        figure.savefig(path, format="png")


def _add_legend(figure: Any, used: Sequence[Any]) -> None:
    """One legend for all panels, above them: what is in any of them, once."""
    handles: dict[str, Any] = {}
    for axes in used:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    labels = [label for label in LEGEND if label in handles]
    columns = LEGEND_COLUMNS[min(len(used), COLUMNS) - 1]
    figure.legend([handles[label] for label in labels], labels, loc="outside upper left", ncols=columns)


def draw_below(axes: Any, values: np.ndarray, top: float, label: str) -> None:
    """A curve where it stays below `top`; where it does not, triangles, and the largest number that is not shown.

    One number of 1e25 would squeeze all others into a line.
    """
    values = values.astype(np.float64)  # `top` may be beyond float32
    steps = np.arange(1, len(values) + 1)
    axes.plot(steps, np.minimum(values, top), color=INK, linewidth=0.8, label=label, **_dots(values))
    above = steps[np.isfinite(values) & (values > top)]
    if not len(above):
        return
    _, first = np.unique(above * TRIANGLES // len(values), return_index=True)
    axes.plot(
        above[first], np.full(len(first), top), "^", color=MARK, markersize=4, clip_on=False, label="beyond the axis"
    )
    _note(axes, 0.9, f"up to {_readable(values[above - 1].max())}")


def hatch_nonfinite(axes: Any, values: np.ndarray) -> None:
    """Hatches the steps whose number is infinite or NaN, and says so if that is how it ends."""
    lost = ~np.isfinite(values)
    runs = _runs(lost)
    for first, length in runs:
        area = {"facecolor": "none", "edgecolor": "0.6", "hatch": "////", "linewidth": 0}
        axes.axvspan(first - 0.5, first - 0.5 + length, label="not finite", **area)
    if lost[-1]:
        _note(axes, 0.5, f"not finite from step {runs[-1][0]} on")


def tick_off(axes: Any, which: np.ndarray, label: str) -> None:
    """Ticks along the lower edge at some of the steps; they are a bar where all of them are meant."""
    ticks = [(first - 0.5, length) for first, length in _runs(which)]
    below = axes.get_xaxis_transform()  # steps to the right, parts of the panel upwards
    if ticks:
        axes.broken_barh(ticks, (0.0, 0.08), transform=below, color=BAND, linewidth=0.4, label=label)


def _runs(which: np.ndarray) -> list[tuple[int, int]]:
    """The first step, and the length, of each run of True."""
    edges = np.flatnonzero(np.diff(which.astype(np.int8), prepend=0, append=0))
    return [(int(start) + 1, int(stop - start)) for start, stop in edges.reshape(-1, 2)]


def _dots(values: np.ndarray) -> dict[str, Any]:
    """A number without neighbours is no line: a dot for each, where there are few or some are missing."""
    alone = len(values) < TRIANGLES or not np.isfinite(values).all()
    return {"marker": "o", "markersize": 2} if alone else {}


def _readable(value: float) -> str:
    if value < 1000:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return rf"${mantissa}\times10^{{{int(exponent)}}}$"


def _note(axes: Any, height: float, text: str) -> None:
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5}
    axes.text(0.97, height, text, transform=axes.transAxes, ha="right", va="top", fontsize=7, bbox=box)
