"""The two figures: what became of the loss, and what the clippers measured."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optaxclip.demo.panels import draw_guess, draw_loss, draw_norms, panels, top_of
from optaxclip.demo.runs import Run
from optaxclip.diagnostics.marks import FAINT


def write_losses(path: Path, runs: Sequence[Run], guess: float) -> None:
    """The loss of every run, with all the others behind it.

    Args:
      path: the file, a PNG.
      runs: what is shown.
      guess: the bits that a guess takes; the axis ends a little above.
    """
    bits = [run.result.history.loss for run in runs]
    top = top_of(guess)
    lowest = min(_lowest(each, default=guess) for each in bits)
    with panels(path, runs, "loss (bits per character)", sharey=True) as used:
        for axes, each in zip(used, bits, strict=True):
            _draw_faintly(axes, bits, top)
            draw_guess(axes, guess)
            draw_loss(axes, each, guess, "loss")
            axes.set_ylim(min(lowest, guess) - 0.05 * top, top)


def write_norms(path: Path, runs: Sequence[Run]) -> None:
    """What each clipper measured and permitted, and in which steps it changed anything.

    Args:
      path: the file, a PNG.
      runs: what is shown.
    """
    with panels(path, runs, "measured norm", sharey=False) as used:
        for axes, run in zip(used, runs, strict=True):
            draw_norms(axes, run.result.history)


def _draw_faintly(axes: Any, curves: Sequence[np.ndarray], top: float) -> None:
    if len(curves) == 1:
        return
    together = np.concatenate([np.append(curve, np.nan) for curve in curves])  # one line with gaps is drawn faster
    steps = np.tile(np.arange(1, len(curves[0]) + 2), len(curves))
    shown = np.where(together <= top, together, np.nan)
    axes.plot(steps, shown, color=FAINT, linewidth=0.4, zorder=1, label="the other runs")


def _lowest(values: np.ndarray, default: float) -> float:
    return float(np.min(values, where=np.isfinite(values), initial=default))
