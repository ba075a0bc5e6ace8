"""The table that is printed, as plain text."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from optaxclip.demo.training import Result
from optaxclip.diagnostics import tables

HEADER = ("clipper", "bits per character", "non-finite steps", "steps clipped", "step time")


class Line(NamedTuple):
    """A line of the table: a row that is finished.

    Attributes:
      name: what `--clippers` calls it.
      shown: what the table calls it.
      result: what came of its run.
      step_time: the time of its step, as a multiple of that without clipping; None if it was not measured.
    """

    name: str
    shown: str
    result: Result
    step_time: float | None


def table(lines: Sequence[Line]) -> str:
    """The lines below a header, columns aligned: the names on the left, the numbers on the right."""
    return tables.table(HEADER, [_cells(line) for line in lines])


def _cells(line: Line) -> tuple[str, ...]:
    share, time = line.result.clipped_share, line.step_time
    return (
        line.shown,
        loss(line.result.bits),
        str(line.result.nonfinite_steps),
        "-" if share is None else f"{share:.1%}",
        "-" if time is None else f"{time:.2f}x",
    )


def loss(value: float) -> str:
    """A loss, of a model that may be lost."""
    if not math.isfinite(value):
        return "lost"
    return f"{value:.3f}" if value < 1000 else f"{value:.1e}"
