"""The figures, with a line per method and a panel per task: sensitivities, ranges of learning rates, losses."""

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from optaxclip.diagnostics.marks import FAINT, INK, MARK
from optaxclip.diagnostics.panels import STYLE
from tests.benchmarks.sweep.methods import METHODS
from tests.benchmarks.sweep.report import Report
from tests.benchmarks.sweep.scores import REFERENCE, TOLERANCE, median
from tests.benchmarks.sweep.tasks import Task

COLUMNS = 3  # of panels, at most
WIDTH = 7.2  # inches: shown 800 pixels wide, the smallest type is 11 pixels high
LINE = 0.17  # of a method
ABOVE_AND_BELOW = 0.75  # title, ticks and label of a panel
WORST = 2.5  # losses of more times the best leave the panel


def write_sensitivities(path: Path, report: Report) -> None:
    """The learning-rate sensitivity of each method, with the spread of the seeds.

    Args:
      path: the file, a PNG.
      report: what is shown.
    """
    with _panels(path, report, lambda task: f"sensitivity\n{task.loss}") as used:
        for axes, task in zip(used, report.tasks, strict=True):
            scores = report.scores[task.name]
            if REFERENCE in scores:
                reference = scores[REFERENCE]
                ends = reference.sensitivity_least, reference.sensitivity_most
                axes.axvspan(*ends, color=FAINT, alpha=0.6, linewidth=0, label=METHODS[REFERENCE].shown)
            for line, method in enumerate(report.methods):
                score = scores[method.name]
                if not score.comparable:
                    continue
                ends = [score.sensitivity_least, score.sensitivity_most]
                axes.plot(ends, [line, line], color="0.5", linewidth=1.2, label="seeds")
                face = "white" if score.sensitivity_differs is False else INK
                label = "mean, not told from it" if score.sensitivity_differs is False else "mean"
                axes.plot(score.sensitivity, line, "o", color=face, markeredgecolor=INK, markersize=3.5, label=label)


def write_ranges(path: Path, report: Report) -> None:
    """Which learning rates are good, which are not, and which lose the model.

    Args:
      path: the file, a PNG.
      report: what is shown.
    """
    with _panels(path, report, lambda _: "learning rate") as used:
        for axes, task in zip(used, report.tasks, strict=True):
            axes.set_xscale("log")
            for line, method in enumerate(report.methods):
                medians = median(report.found[task.name][method.name].held_out)
                _draw_rates(axes, line, np.asarray(task.rates), medians)
                score = report.scores[task.name][method.name]
                if not np.isnan(score.low):
                    ends = [score.low, score.high]
                    axes.plot(ends, [line, line], color=INK, linewidth=3.2, solid_capstyle="butt", label="good")
                    axes.plot(
                        score.best_rate, line, "o", color="white", markeredgecolor=INK, markersize=4.5, label="best"
                    )


def write_losses(path: Path, report: Report) -> None:
    """The best loss of each method, with the spread of the seeds.

    Args:
      path: the file, a PNG.
      report: what is shown.
    """
    with _panels(path, report, lambda task: f"held-out\n{task.loss}") as used:
        for axes, task in zip(used, report.tasks, strict=True):
            scores = report.scores[task.name]
            best = min(score.best_loss for score in scores.values())
            if not np.isfinite(best):
                continue  # there is nothing to show
            axes.axvspan(best, (1 + TOLERANCE) * best, color=FAINT, alpha=0.6, linewidth=0, label="good")
            for line, method in enumerate(report.methods):
                score = scores[method.name]
                if score.best_loss > WORST * best:
                    axes.plot(WORST * best, line, ">", color=MARK, markersize=4, label="beyond the axis")
                    continue
                at = task.rates.index(score.best_rate)
                _draw_losses(axes, line, report.found[task.name][method.name].held_out[at], WORST * best)


def _draw_rates(axes: Any, line: int, rates: np.ndarray, medians: np.ndarray) -> None:
    lost = ~np.isfinite(medians)
    axes.plot(rates[~lost], np.full((~lost).sum(), line), "|", color="0.65", markersize=4, label="tried")
    axes.plot(rates[lost], np.full(lost.sum(), line), "x", color=MARK, markersize=3.5, label="not finite")


def _draw_losses(axes: Any, line: int, losses: np.ndarray, worst: float) -> None:
    seeds = np.where(np.isfinite(losses), losses, worst).clip(max=worst)
    axes.plot([seeds.min(), seeds.max()], [line, line], color="0.5", linewidth=1.2, label="seeds")
    axes.plot(np.median(seeds), line, "o", color=INK, markersize=3.5, label="median")


@contextmanager
def _panels(path: Path, report: Report, label: Callable[[Task], str]) -> Generator[list[Any], None, None]:
    """A panel per task; the figure is written when the context ends."""
    # An extra of the package; a plain Figure, as in `optaxclip.diagnostics.panels`.
    import matplotlib as mpl  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    rows = math.ceil(len(report.tasks) / COLUMNS)
    columns = math.ceil(len(report.tasks) / rows)
    height = rows * (LINE * len(report.methods) + ABOVE_AND_BELOW) + 0.4
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        every: list[Any] = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
        used, spare = every[: len(report.tasks)], every[len(report.tasks) :]
        for axes in spare:
            axes.set_axis_off()
        for axes, task in zip(used, report.tasks, strict=True):
            axes.set_title(task.name)
            axes.set_xlabel(label(task))
        yield used
        names = [method.shown for method in report.methods]
        used[0].set_yticks(range(len(names)), names)
        used[0].set_ylim(len(names) - 0.4, -0.6)
        handles: dict[str, Any] = {}
        for axes in used:
            axes.grid(axis="y", color="0.92", linewidth=0.5)
            axes.set_axisbelow(True)
            handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=len(handles))
        figure.savefig(path, format="png")
