"""What the two figures share: a file with a grid of small panels, one per run."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from optaxclip.demo.ending import InputError
from optaxclip.demo.runs import Run
from optaxclip.diagnostics.panels import add_legend, grid

LEGEND = ("loss", "norm", "limit", "clipped steps", "the other runs", "guessing", "beyond the axis", "not finite")


class FiguresError(InputError):
    """Figures can't be drawn; the message says why."""


def require_matplotlib() -> None:
    """Raises FiguresError if matplotlib is missing: better before the training than after it."""
    try:
        import_module("matplotlib")
    except ImportError as error:
        raise FiguresError("the figures of --out need matplotlib: pip install 'optaxclip[demo]'") from error


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
