"""The numbers as CSV: `table.csv`, a line per run, and `steps.csv`, a line per run and step.

A run is named by its optimizer and its row: `sgd/clip_by_global_norm`.

Losses are in bits per character, as in the table. Norm, limit and scale are those of the group furthest beyond its
limit. Where a clipper keeps no record, the norm is the gradient's, and limit and scale are empty.
"""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optaxclip.demo.runs import Run

TABLE = ("row", "clipper", "bits_per_character", "nonfinite_steps", "clipped_share", "relative_step_time")
STEPS = ("row", "step", "loss", "norm", "limit", "scale", "clipped", "skipped")


def write_table(path: Path, runs: Sequence[Run]) -> None:
    """What the table shows, unrounded."""
    _write(path, TABLE, map(_table_values, runs))


def write_steps(path: Path, runs: Sequence[Run]) -> None:
    """Every step of every run: what the figures show."""
    _write(path, STEPS, (values for run in runs for values in _steps_values(run)))


def _table_values(run: Run) -> Sequence[Any]:
    result = run.result
    return run.name, run.shown, result.bits, result.nonfinite_steps, result.clipped_share, run.step_time


def _steps_values(run: Run) -> Iterable[Sequence[Any]]:
    history = run.result.history
    flags = (None if each is None else each.astype(np.int32) for each in (history.clipped, history.skipped))
    columns = (history.loss, history.norm, history.limit, history.scale, *flags)
    count = len(history.loss)
    filled = ([None] * count if column is None else column for column in columns)
    return zip([run.name] * count, range(1, count + 1), *filled, strict=True)


def _write(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(map(_text, row) for row in rows)


def _text(value: Any) -> str:
    if value is None:
        return ""  # there is none, as against NaN
    return f"{value:.9g}" if isinstance(value, float | np.floating) else str(value)  # nine digits tell float32s apart
