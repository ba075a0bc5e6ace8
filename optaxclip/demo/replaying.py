"""What `python -m optaxclip replay` does: clippers over the norms in a CSV file, as a table."""

import argparse
import csv
import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from optaxclip.demo import memory, options
from optaxclip.demo.ending import InputError
from optaxclip.demo.options import DECIMAL, Parser, named, path, shown
from optaxclip.demo.rows import ROWS, Row
from optaxclip.diagnostics import Replay, replay

WORD = "replay"
COMMAND = f"{options.COMMAND} {WORD}"
CLIPPERS = "clip_by_global_norm,autoclip,clip_by_history,zclip"  # a bound, and what follows a single norm
BYTES = 40  # of memory for each byte of a file
History: TypeAlias = list[tuple[int, float]]  # steps and their norms
NOT_FINITE = re.compile(r"[+-]?(nan|inf|infinity)", re.IGNORECASE)


class Options(argparse.Namespace):
    """What was asked for.

    Attributes:
      file: the CSV file.
      clippers: what is replayed, in this order.
      row: which row of `steps.csv`; None for the only one.
    """

    file: Path
    clippers: list[Row]
    row: str | None


def run(words: Sequence[str]) -> int:
    """Replays what the words of a command line, behind "replay", ask for.

    Raises:
      InputError: if the file is no history of norms, or a clipper can't be replayed on it.
    """
    asked = _parser().parse_args(words, Options())
    history = _norms(asked.file, asked.row)
    found = _replayed(asked, [norm for _, norm in history])
    print(dataclasses.replace(found, steps=np.array([step for step, _ in history])))
    return 0


def _parser() -> Parser:
    made = Parser(
        prog=COMMAND,
        description="Shows what clippers would have done with the recorded norms of a run. Each row of "
        f"'{options.COMMAND} --list' that measures one norm can be replayed, with the arguments shown there.",
        allow_abbrev=False,
    )
    made.add_argument("file", type=path, metavar="FILE", help="a CSV file with a column 'norm', such as steps.csv")
    made.add_argument(
        "--clippers",
        type=named("clipper", ROWS, f"{options.COMMAND} --list"),
        default=CLIPPERS,
        metavar="A,B,C",
        help="clippers to replay, in this order (default: %(default)s)",
    )
    made.add_argument(
        "--row", help="the row to replay, such as sgd/none, if the file has a column 'row' (default: the only one)"
    )
    return made


def _replayed(asked: Options, norms: list[float]) -> Replay:
    clippers = {}
    for row in asked.clippers:
        if row.clipper is None:
            raise InputError(f"argument --clippers: {row.name!r} cannot be replayed; name a clipper")
        clippers[row.name] = row.clipper()  # the arguments would not fit into 80 columns
    try:
        return replay(norms, **clippers)
    except ValueError as error:
        raise InputError(f"argument --clippers: {error}") from error


# The file.


def _norms(file: Path, row: str | None) -> History:
    """Each step and its norm."""
    name = repr(str(file))
    memory.require_file(file, BYTES)
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            found = _by_row(name, csv.DictReader(lines, restval=""))
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{name} is no CSV file in UTF-8: {error}") from error
    return _chosen(name, found, row)


def _by_row(name: str, reader: "csv.DictReader[str]") -> dict[str | None, History]:
    """The norms of each row, in the order of the file; of the row None if there is no such column."""
    header = [each.strip() for each in reader.fieldnames or []]
    if not header:
        raise InputError(f"{name} is empty")
    if header.count("norm") != 1:
        raise InputError(f"{name} must have one column 'norm', got {shown(', '.join(header))}")
    reader.fieldnames = header
    found: dict[str | None, History] = {}
    for line in reader:
        where = f"{name}, line {reader.line_num}"
        if None in line:  # where DictReader puts what has no column
            raise InputError(f"{where}: more cells than the header has columns, {len(header)}")
        steps = found.setdefault(line.get("row"), [])
        steps.append((_step(where, line.get("step"), len(steps) + 1), _norm(where, line["norm"])))
    if not found:
        raise InputError(f"{name} has no line below its header")
    return found


def _step(where: str, text: str | None, counted: int) -> int:
    """The number of a step; counted where the file has none."""
    if text is None:
        return counted
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{where}: the step must be a whole number, got {shown(text.strip())}") from None


def _norm(where: str, text: str) -> float:
    text = text.strip()
    if not (DECIMAL.fullmatch(text) or NOT_FINITE.fullmatch(text)):
        raise InputError(f"{where}: the norm must be a number, got {shown(text)}")
    if (norm := float(text)) < 0:
        raise InputError(f"{where}: the norm must be at least 0, got {norm:g}")
    return math.nan if math.isnan(norm) else norm


def _chosen(name: str, found: dict[str | None, History], row: str | None) -> History:
    if row is None and len(found) == 1:
        return next(iter(found.values()))
    if row is not None and None in found:
        raise InputError(f"argument --row: {name} has no column 'row'")
    if row is None or row not in found:
        problem = "several rows" if row is None else f"no row {shown(row)}"
        raise InputError(f"{name} has {problem}: choose with --row one of {', '.join(filter(None, found))}")
    return found[row]
