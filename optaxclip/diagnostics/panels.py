"""Figures of small panels: their style, their grid, and one legend for all of them."""

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

DPI = 200
COLUMNS = 3
PANEL = (2.8, 1.55)  # inches
LEGEND_COLUMNS = (2, 4, 6)  # entries that fit above one, two or three panels
STYLE: dict[Any, Any] = {
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlepad": 7,
    "axes.titlesize": 8,
    "figure.dpi": DPI,
    "figure.labelsize": 9,
    "font.size": 8,
    "hatch.linewidth": 0.5,
    "legend.frameon": False,
    "savefig.dpi": DPI,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
}


@contextmanager
def styled(width: float, height: float) -> Generator[Any, None, None]:
    """Opens an empty figure of `width` x `height` inches. Fill it inside the context.

    Raises:
      ImportError: if matplotlib is missing, with the command that installs it.
    """
    try:
        mpl = import_module("matplotlib")
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'optaxclip[demo]'") from error
    # Not pyplot, which looks for a screen and keeps every figure. A plain Figure draws PNGs with Agg.
    from matplotlib.figure import Figure  # noqa: PLC0415

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        for axes in figure.axes:  # ticks take the style at drawing time
            axes.tick_params(which="both", labelsize=STYLE["xtick.labelsize"])


@contextmanager
def grid(titles: Sequence[str], label: str, *, sharey: bool) -> Generator[tuple[Any, list[Any]], None, None]:
    """Opens a figure with one panel per title, in order, over the same steps.

    Args:
      titles: the titles of the panels.
      label: the label of the vertical axes.
      sharey: whether all panels share the vertical axis.
    """
    columns = min(COLUMNS, len(titles))
    rows = math.ceil(len(titles) / columns)
    with styled(columns * PANEL[0] + 0.4, rows * PANEL[1] + 0.9) as figure:
        panels: list[Any] = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=sharey).flat)
        for spare in panels[len(titles) :]:
            spare.remove()
        used = panels[: len(titles)]
        for axes, title in zip(used, titles, strict=True):
            axes.set_title(title)
            count_steps(axes)
        for axes in used[-columns:]:
            axes.tick_params(labelbottom=True)
        figure.supxlabel("step")
        figure.supylabel(label)
        yield figure, used


def count_steps(axes: Any) -> None:
    """Shows only integers on the lower axis."""
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def add_legend(figure: Any, used: Sequence[Any], *, order: Sequence[str] = (), columns: int | None = None) -> None:
    """Draws one legend above all panels, with each entry once.

    Args:
      figure: the figure.
      used: its panels.
      order: the entries that come first, in this order.
      columns: the number of columns; None for as many as fit above the grid.
    """
    handles: dict[str, Any] = {}
    for axes in used:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    labels = sorted(handles, key=lambda label: order.index(label) if label in order else len(order))
    columns = columns or LEGEND_COLUMNS[min(len(used), COLUMNS) - 1]
    figure.legend([handles[label] for label in labels], labels, loc="outside upper left", ncols=columns)
