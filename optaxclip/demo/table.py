"""The table that is printed, as plain text, at most 80 columns wide."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from optaxclip.demo.models import Optimizer
from optaxclip.demo.training import Result
from optaxclip.diagnostics import tables


class Line(NamedTuple):
    """A line of the table: a row that is finished.

    Attributes:
      name: what `--clippers` calls it.
      shown: what the table calls it.
      results: what came of its runs, by the optimizer's name.
      step_time: the time of its step, as a multiple of that without clipping; None if it was not measured.
    """

    name: str
    shown: str
    results: dict[str, Result]
    step_time: float | None


def table(optimizers: Mapping[str, Optimizer], lines: Sequence[Line]) -> str:
    """The lines below a header, columns aligned: the names on the left, the numbers on the right."""
    header = [
        "clipper",
        *(title for each in optimizers.values() for title in (f"{each.shown} bits", "clipped")),
        "time",
    ]
    return tables.table(header, [_cells(list(optimizers), line) for line in lines])


def _cells(optimizers: Sequence[str], line: Line) -> tuple[str, ...]:
    time = "-" if line.step_time is None else f"{line.step_time:.2f}x"
    return (line.shown, *(cell for name in optimizers for cell in _result(line.results[name])), time)


def _result(result: Result) -> tuple[str, str]:
    share = result.clipped_share
    return loss(result.bits), "-" if share is None else f"{share:.1%}"


def loss(value: float) -> str:
    """A loss, of a model that may be lost."""
    if not math.isfinite(value):
        return "lost"
    return f"{value:.3f}" if value < 1000 else f"{value:.1e}"
