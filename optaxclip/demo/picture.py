"""The picture that is made by default: losses with and without a clip above, norms and limits below."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optaxclip.demo.models import Optimizer
from optaxclip.demo.panels import draw_guess, draw_loss, draw_norms, steps_of, top_of
from optaxclip.demo.rows import SKIP, UNCLIPPED
from optaxclip.demo.table import Line, table
from optaxclip.diagnostics.marks import BAND
from optaxclip.diagnostics.panels import count_steps, styled

NAME = "optaxclip.png"
PANEL = (3.9, 2.2)  # inches
SHOWN = "clip_by_global_norm"  # the row with a clip that is drawn in full


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
            axes.set_ylabel("norm of the gradient")
            draw_norms(axes, line.results[first].history)
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
    """The rows whose norms are shown: of those with a limit the one that trained best, and the skip.

    A limit that moves says more than one that stays, so the best is one of those that move, if there are any.
    """
    limits = [(line, limit) for line in lines if (limit := line.results[optimizer].history.limit) is not None]
    moving = [line for line, limit in limits if (limit != limit[0]).any()]
    limited = moving or [line for line, _ in limits]
    best = sorted(limited, key=lambda line: np.nan_to_num(line.results[optimizer].bits, nan=np.inf))
    return [*best[:1], *(line for line in lines if line.name == SKIP)]


def _draw_losses(axes: Any, lines: Sequence[Line], optimizer: str, guess: float) -> None:
    """The run without a clip and one with, in front of the others."""
    top = top_of(guess)

    def draw(line: Line, label: str | None, **style: float) -> None:
        loss = line.results[optimizer].history.loss
        axes.plot(steps_of(loss), np.where(loss <= top, loss, np.nan), color=BAND, label=label, **style)

    # False sorts before True: the row that is drawn in full comes first, or else the first with a clip.
    clipped = sorted((line for line in lines if line.name != UNCLIPPED.name), key=lambda line: line.name != SHOWN)
    for line in clipped[:1]:
        draw(line, line.shown, linewidth=1.0)
    for number, line in enumerate(clipped[1:]):
        draw(line, None if number else "other rows", linewidth=0.5, alpha=0.4)
    for line in lines:
        if line.name == UNCLIPPED.name:
            draw_loss(axes, line.results[optimizer].history.loss, guess, UNCLIPPED.shown)
    draw_guess(axes, guess)
    axes.set_ylim(0.0, top)
    axes.set_ylabel("loss (bits per character)")
