"""The picture that is made by default: losses with and without a clip above, norms and limits below."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optaxclip.demo.models import Optimizer
from optaxclip.demo.rows import UNCLIPPED
from optaxclip.demo.table import Line, table
from optaxclip.demo.training import History
from optaxclip.diagnostics.marks import BAND, DASHED, draw_below, draw_limit, hatch_nonfinite, norm_range
from optaxclip.diagnostics.marks import tick_off as tick
from optaxclip.diagnostics.panels import count_steps, styled

NAME = "optaxclip.png"
PANEL = (3.9, 2.2)  # inches
BEYOND = 30.0  # times the 95th percentile: larger norms leave the panel


def write_picture(path: Path, optimizers: Mapping[str, Optimizer], lines: Sequence[Line], guess: float) -> None:
    """Draws the picture, and puts the table into it as a comment, so that one can tell which run it shows.

    Args:
      path: the file, a PNG.
      optimizers: one panel of losses for each.
      lines: the rows that are shown.
      guess: the bits that a guess takes; the axis of the losses ends a little above.
    """
    first = next(iter(optimizers))
    measured = _measured(lines, first)
    columns, rows = max(len(optimizers), len(measured)), 2 if measured else 1
    with styled(columns * PANEL[0] + 0.3, rows * PANEL[1] + 0.8) as figure:
        panels: Any = figure.subplots(rows, columns, squeeze=False, sharex=True)
        for axes, (name, optimizer) in zip(panels[0], optimizers.items(), strict=False):
            axes.set_title(f"{optimizer.shown}, learning rate {optimizer.learning_rate:g}")
            _draw_losses(axes, lines, name, guess)
        for axes, line in zip(panels[-1], measured, strict=False):
            axes.set_title(f"{optimizers[first].shown}, {line.shown}")
            _draw_norms(axes, line.results[first].history, "skipped" if line.name == "skip_spikes" else "clipped")
        for axes in panels.flat:
            if not axes.has_data():
                axes.remove()
                continue
            count_steps(axes)
            axes.tick_params(labelbottom=True)
            axes.legend(loc="best", fontsize=7)
        figure.supxlabel("step")
        figure.savefig(path, format="png", metadata={"Description": table(optimizers, lines)})


def _measured(lines: Sequence[Line], optimizer: str) -> list[Line]:
    """The rows whose norms are shown: the last that recorded a limit, which moves if any does, and the skips."""
    limited = [line for line in lines if line.results[optimizer].history.limit is not None]
    return [*limited[-1:], *(line for line in lines if line.name == "skip_spikes")]


def _draw_losses(axes: Any, lines: Sequence[Line], optimizer: str, guess: float) -> None:
    """The run without a clip, in front of those with one."""
    top = 1.25 * guess or 1.0  # no bits if the text has one character only
    clipped = [line for line in lines if line.name != UNCLIPPED.name]
    for number, line in enumerate(clipped):
        loss = line.results[optimizer].history.loss
        style = {"color": BAND, "linewidth": 0.8} if number == 0 else {"color": BAND, "linewidth": 0.5, "alpha": 0.4}
        axes.plot(
            _steps(loss),
            np.where(loss <= top, loss, np.nan),
            label="with a clip or skip" if number == 0 else None,
            **style,
        )
    for line in lines:
        if line.name == UNCLIPPED.name:
            loss = line.results[optimizer].history.loss
            draw_below(axes, _steps(loss), loss, top, UNCLIPPED.shown)
            hatch_nonfinite(axes, _steps(loss), loss)
    axes.axhline(guess, color="0.4", linewidth=0.8, linestyle=":", label="guessing")
    axes.set_ylim(0.0, top)
    axes.set_ylabel("loss (bits per character)")


def _draw_norms(axes: Any, history: History, changed: str) -> None:
    steps, limits = _steps(history.norm), [] if history.limit is None else [history.limit]
    bottom, top = norm_range(history.norm, limits, BEYOND)
    axes.set_yscale("log")
    axes.set_ylim(bottom, top)
    axes.set_ylabel("norm of the gradient")
    draw_below(axes, steps, history.norm, top, "norm")
    for limit in limits:
        draw_limit(axes, steps, limit, "limit", DASHED)
    hatch_nonfinite(axes, steps, history.norm)
    if history.clipped is not None:
        tick(axes, steps, history.clipped, f"{changed} steps")


def _steps(values: np.ndarray) -> np.ndarray:
    return np.arange(1, len(values) + 1)
