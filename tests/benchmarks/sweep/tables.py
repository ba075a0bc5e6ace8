"""The table: as plain text, as Markdown, and as CSV, which has a line per task and method, unrounded."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

from optaxclip.demo.table import loss
from optaxclip.diagnostics.tables import aligned
from tests.benchmarks.sweep.methods import Method
from tests.benchmarks.sweep.report import Report
from tests.benchmarks.sweep.scores import TOLERANCE, WORSE, Score
from tests.benchmarks.sweep.tasks import Task


def text(report: Report) -> str:
    """For people at a terminal: the names on the left, and for each task its numbers below its name."""
    above, header = [""], ["method"]
    for task in report.tasks:
        columns = ["decades", "loss", "gap", *(["survived"] if task.spikes else [])]
        above += [task.name, *[""] * (len(columns) - 1)]
        header += columns
    lines = [above, header, *(_text_cells(report, method) for method in report.methods)]
    widths = [max(len(line[column]) for line in lines[1:]) for column in range(len(header))]
    first, second, *others = lines
    rule = ["-" * width for width in widths]
    return "\n".join(
        [_above(first, widths), aligned(second, widths), "  ".join(rule), *(aligned(line, widths) for line in others)]
    )


def footing(seeds: int) -> str:
    """What the numbers in the table are."""
    return f"""\
loss:     on held-out data, at the best learning rate; the median of the seeds ({seeds}).
decades:  the width of the range of learning rates around the best one in which the loss is at most {TOLERANCE:.0%}
          above the smallest of its column, interpolated between neighbouring rates; - where there is none, and >= where
          it reaches an end of the rates tried.
gap:      the held-out loss less the training loss, at the best learning rate; the median of the seeds.
survived: of the runs (learning rates and seeds) that learn without spikes, the share that ends at most {WORSE:g} times
          worse with them."""


def markdown(report: Report) -> str:
    """For the README: a column per task, with the width of the range in decades and, in parentheses, the best loss."""
    header = ["method", *(task.name for task in report.tasks)]
    header += [f"gap, {task.name}" for task in report.tasks if task.spikes is None]
    header += [f"survived, {task.name}" for task in report.tasks if task.spikes is not None]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    lines += [_markdown_cells(report, method) for method in report.methods]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_csv(path: Path, report: Report) -> None:
    """Every score of every method in every task."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("task", "row", "clipper", "place", *Score._fields))
        for task in report.tasks:
            for method in report.methods:
                values = (_csv_cell(each) for each in report.scores[task.name][method.name])
                writer.writerow((task.name, method.name, method.shown, method.place, *values))


def _text_cells(report: Report, method: Method) -> list[str]:
    cells = [method.shown]
    for task in report.tasks:
        score = report.scores[task.name][method.name]
        cells += [_decades(score), loss(score.best_loss), _gap(score), *([_survived(score)] if task.spikes else [])]
    return cells


def _markdown_cells(report: Report, method: Method) -> list[str]:
    def of(task: Task) -> Score:
        return report.scores[task.name][method.name]

    name = f"`{method.shown}`" if method.shown != "no clipping" else method.shown
    cells = [name, *(f"{_decades(of(task))} ({loss(of(task).best_loss)})" for task in report.tasks)]
    cells += [_gap(of(task)) for task in report.tasks if task.spikes is None]
    return cells + [_survived(of(task)) for task in report.tasks if task.spikes is not None]


def _decades(score: Score) -> str:
    if math.isnan(score.low):
        return "-"
    return f"{'>=' if score.open_ended else ''}{score.decades:.2f}"


def _gap(score: Score) -> str:
    return f"{score.gap:+.3f}" if abs(score.gap) < 1000 else "-"  # false for NaN


def _survived(score: Score) -> str:
    return "-" if score.survived is None else f"{score.survived:.0%}"


def _csv_cell(value: float | bool | None) -> str:
    if value is None:
        return ""  # there is none, as against NaN
    return str(int(value) if isinstance(value, bool) else float(value))


def _above(cells: Sequence[str], widths: Sequence[int]) -> str:
    """The names of the tasks, each where its first column begins."""
    line = ""
    for column, cell in enumerate(cells):
        if cell:
            line = line.ljust(sum(widths[:column]) + 2 * column) + cell
    return line
