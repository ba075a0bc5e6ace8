"""The table: as plain text, as Markdown, and as CSV, which has a line per task and method, unrounded."""

import csv
from pathlib import Path

from optaxclip.demo.table import loss
from optaxclip.diagnostics.tables import table
from tests.benchmarks.sweep.methods import METHODS, Method
from tests.benchmarks.sweep.report import Report
from tests.benchmarks.sweep.scores import COMPARABLE, CONFIDENCE, REFERENCE, ROUNDING, WORSE, Score


def text(report: Report) -> str:
    """For people at a terminal: aligned columns."""
    return table(_header(report), [_cells(report, method) for method in report.methods])


def footing(seeds: int) -> str:
    """What the numbers in the table are."""
    return f"""\
Each cell: learning-rate sensitivity (best loss). Smaller is better.
sensitivity: the mean over the learning rates of min(loss, loss before the first step) - smallest loss; the mean of
             the seeds ({seeds}). Wortsman et al. 2023, arXiv:2309.14322.
-            the best loss is more than {COMPARABLE:.0%} above the smallest of its column: what hardly learns is hardly
             sensitive.
best loss:   on held-out data, at the best learning rate; the median of the seeds.
=            cannot be told from {METHODS[REFERENCE].shown}: the {CONFIDENCE:.0%} interval of the difference, paired by
             seed, contains 0, or the difference is below {ROUNDING:g}. Chance alone removes about one = in twenty.
survived:    of the runs (learning rates and seeds) that learn without bad batches, the share that ends at most
             {WORSE:g} times worse with them."""


def markdown(report: Report) -> str:
    """The same for a page."""
    header = _header(report)
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for method in report.methods:
        shown, *numbers = _cells(report, method)
        lines.append([f"`{shown}`" if method.place != "nowhere" else shown, *numbers])
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


def _header(report: Report) -> list[str]:
    header = ["method", *(task.name for task in report.tasks)]
    return header + [f"survived, {task.name}" for task in report.tasks if task.spikes is not None]


def _cells(report: Report, method: Method) -> list[str]:
    scored = {task.name: report.scores[task.name][method.name] for task in report.tasks}
    cells = [method.shown, *map(_cell, scored.values())]
    return cells + [_survived(scored[task.name]) for task in report.tasks if task.spikes is not None]


def _cell(score: Score) -> str:
    sensitivity = f"{_sign(score.sensitivity_differs)}{score.sensitivity:.3f}" if score.comparable else "-"
    return f"{sensitivity} ({_sign(score.loss_differs)}{loss(score.best_loss)})"


def _sign(is_different: bool | None) -> str:
    return "=" if is_different is False else ""


def _survived(score: Score) -> str:
    return "-" if score.survived is None else f"{score.survived:.0%}"


def _csv_cell(value: float | bool | None) -> str:
    if value is None:
        return ""  # there is none, as against NaN
    return str(int(value) if isinstance(value, bool) else float(value))
