"""The runs behind the table: one per line and optimizer, each with a name of its own for files and figures."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from optaxclip.demo.models import Optimizer
from optaxclip.demo.table import Line
from optaxclip.demo.training import Result


class Run(NamedTuple):
    """One model, trained.

    Attributes:
      name: what the files call it, `sgd/clip_by_global_norm`.
      shown: what the figures call it, `SGD, clip_by_global_norm(1.0)`.
      result: what came of it.
      step_time: as in the table; None if it was not measured.
    """

    name: str
    shown: str
    result: Result
    step_time: float | None


def runs(optimizers: Mapping[str, Optimizer], lines: Sequence[Line]) -> list[Run]:
    """All runs of the first optimizer, then those of the next. Steps are timed with the first alone."""
    first = next(iter(optimizers))
    return [
        Run(
            f"{name}/{line.name}",
            f"{each.shown}, {line.shown}",
            line.results[name],
            line.step_time if name == first else None,
        )
        for name, each in optimizers.items()
        for line in lines
    ]
