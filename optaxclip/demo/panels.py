"""What the figures share: a file with a grid of small panels, one per run; losses and norms in a panel."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from optaxclip.demo.ending import InputError
from optaxclip.demo.runs import Run
from optaxclip.demo.training import History
from optaxclip.diagnostics.marks import DASHED, draw_below, draw_limit, hatch_nonfinite, norm_range, tick_off
from optaxclip.diagnostics.panels import add_legend, grid

BEYOND = 30.0  # times the 95th percentile: larger norms leave the panel
LEGEND = (
    "loss",
    "norm",
    "limit",
    "clipped steps",
    "skipped steps",
    "the other runs",
    "guessing",
    "beyond the axis",
    "not finite",
)


class FiguresError(InputError):
    """Figures can't be drawn; the message says why."""


def require_matplotlib() -> None:
    """Raises FiguresError if matplotlib is missing: better before the training than after it."""
    try:
        import_module("matplotlib")
    except ImportError as error:
        raise FiguresError("the picture needs matplotlib: pip install 'optaxclip[demo]'") from error


@contextmanager
def panels(path: Path, runs: Sequence[Run], label: str, *, sharey: bool) -> Generator[list[Any], None, None]:
    """The panels of a figure, one per run, in order; the figure is written when the context ends.

    Args:
      path: the file, a PNG.
      runs: what is shown.
      label: of the vertical axes.
      sharey: whether they are the same.
    """
    with grid([run.shown for run in runs], label, sharey=sharey) as (figure, used):
        yield used
        add_legend(figure, used, order=LEGEND)
        figure.savefig(path, format="png")


def top_of(guess: float) -> float:
    """Where the axis of losses ends: a little above the bits that a guess takes."""
    return 1.25 * guess or 1.0  # no bits if the text has one character only


def draw_loss(axes: Any, loss: np.ndarray, guess: float, label: str) -> None:
    """The loss of a run, with marks where it is too large or not finite."""
    steps = steps_of(loss)
    draw_below(axes, steps, loss, top_of(guess), label)
    hatch_nonfinite(axes, steps, loss)


def draw_guess(axes: Any, guess: float) -> None:
    """The loss of a model that has learned nothing."""
    axes.axhline(guess, color="0.4", linewidth=0.8, linestyle=":", label="guessing")


def draw_norms(axes: Any, history: History) -> None:
    """Norms on a logarithmic axis, their limit, and the steps that were clipped, or where steps can be, skipped."""
    steps, limits = steps_of(history.norm), [] if history.limit is None else [history.limit]
    bottom, top = norm_range(history.norm, limits, BEYOND)
    axes.set_yscale("log")
    axes.set_ylim(bottom, top)
    draw_below(axes, steps, history.norm, top, "norm")
    if history.limit is not None:
        draw_limit(axes, steps, history.limit, "limit", DASHED)
    hatch_nonfinite(axes, steps, history.norm)
    if history.skipped is not None:
        tick_off(axes, steps, history.skipped, "skipped steps")
    elif history.clipped is not None:
        tick_off(axes, steps, history.clipped, "clipped steps")


def steps_of(values: np.ndarray) -> np.ndarray:
    """The number of each step, from 1."""
    return np.arange(1, len(values) + 1)
