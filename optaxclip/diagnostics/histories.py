"""Where a history of norms comes from: an array, a CSV file, or the records in an optimizer's state."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optaxclip._arguments import checks
from optaxclip.records.reader import clip_stats

COLUMNS = ("norm", "clip_norm", "grad_norm", "global_norm")
ROW, STEP = "row", "step"  # columns of the main job's steps.csv: which clipper a line belongs to, and which step it is
RECORD = "clip_norm"  # what `clip_stats` calls the norms


def checked(norms: Any) -> np.ndarray:
    """A history as a float64 vector.

    Raises:
      ValueError: if it has not one dimension, is not real, or has a negative number in it.
    """
    try:
        history = np.asarray(norms)
    except (TypeError, ValueError):
        history = np.empty((), object)  # a tree of arrays or a key, refused below
    if history.ndim != 1 or not (history.dtype.kind in "fiu" or history.dtype.name == "bfloat16"):
        raise ValueError(
            f"norms must be a vector of real numbers, got shape {history.shape} of {history.dtype}; "
            "from_state(opt_state) takes them out of an optimizer's state"
        )
    history = history.astype(np.float64)
    if (history < 0).any():
        place = int(np.argmax(history < 0))
        raise ValueError(f"norms must be at least 0, got {history[place]:g} in step {place + 1}")
    return history


def read_csv(path: Path | str, *, clipper: str | None = None) -> np.ndarray:
    r"""The norms in a CSV file: one per line below a header, in the order of the steps.

    Understood are the main job's `steps.csv`, whose columns `row` and `step` say which step of which clipper a norm
    belongs to; a file with a column called `norm`, `clip_norm`, `grad_norm` or `global_norm`, the first of these that
    there is; and a file with one column of any name. "nan" and "inf" are numbers; empty lines are passed over.

    Args:
      path: the file, in UTF-8, separated by commas.
      clipper: of which clipper the steps are wanted, as `python -m optaxclip --list` calls it. Needed where the column
        `row` has more than one.

    Returns:
      A float64 vector.

    Raises:
      ValueError: if there is no such file, column or clipper, if it is not UTF-8, or a cell is no number of at least 0.
        The message is one line that says where.

    Example:
      >>> import pathlib, tempfile
      >>> from optaxclip import diagnostics
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "norms.csv")
      ...     _ = path.write_text("step,grad_norm\n1,0.5\n2,inf\n")
      ...     print(diagnostics.read_csv(path))
      [0.5 inf]

    See also:
      `from_state`, for a history that a clipper has recorded; `advise`, `summary` and `plot`.
    """
    checks.path("path", path)
    if clipper is not None:
        checks.text("clipper", clipper)
    name = repr(str(path))  # quoted, so that no name can break the message's line
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # as utf-8, but for a mark at the start that is no character
    except OSError as error:
        raise ValueError(f"cannot read {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{name}, line {line}: not UTF-8: {error.reason} at byte {error.start}") from error
    return _Table(name, text).norms(clipper)


class _Table:
    """The lines of a CSV file, each with its number.

    Args:
      name: of the file, for messages.
      text: what is in it.
    """

    def __init__(self, name: str, text: str) -> None:
        self._name = name
        reader = csv.reader(text.splitlines(keepends=True), strict=True)
        try:
            self._lines = [(reader.line_num, cells) for cells in reader if cells]
        except csv.Error as error:
            raise ValueError(f"{name}, line {reader.line_num}: {error}") from error
        if not self._lines:
            raise ValueError(f"{name} is empty")
        (self._first, header), *self._lines = self._lines
        self._header = [cell.strip() for cell in header]

    def norms(self, clipper: str | None) -> np.ndarray:
        column = self._column()
        lines = self._of_clipper(clipper)
        if not lines:
            raise ValueError(f"{self._name} has no line below its header, line {self._first}")
        return np.array([self._number(line, cells, column) for line, cells in lines])

    def _column(self) -> int:
        if len(self._header) == 1:
            if _is_number(self._header[0]):
                raise ValueError(
                    f"{self._name}, line {self._first}: the header is missing, the file begins with {self._header[0]!r}"
                )
            return 0
        for name in COLUMNS:
            if name in self._header:
                return self._header.index(name)
        raise ValueError(
            f"{self._name}, line {self._first}: no column of norms; one must be called {_listed(COLUMNS)}, "
            f"and there are {_listed(self._header)}"
        )

    def _of_clipper(self, clipper: str | None) -> list[tuple[int, list[str]]]:
        if not {ROW, STEP} <= {*self._header}:  # a column `row` alone may be a number of the line
            if clipper is not None:
                raise ValueError(
                    f"{self._name}, line {self._first}: no columns 'row' and 'step' in which to look for {clipper!r}"
                )
            return self._lines
        place = self._header.index(ROW)
        names = list(dict.fromkeys(self._cell(line, cells, place) for line, cells in self._lines))
        if clipper is None:
            if len(names) > 1:
                raise ValueError(f"{self._name} has steps of {len(names)} clippers; choose one: {_listed(names)}")
            return self._lines
        if clipper not in names:
            raise ValueError(f"{self._name}, column 'row': no {clipper!r}; there is {_listed(names)}")
        return [(line, cells) for line, cells in self._lines if cells[place] == clipper]

    def _cell(self, line: int, cells: Sequence[str], column: int) -> str:
        if len(cells) != len(self._header):
            raise ValueError(
                f"{self._name}, line {line}, column {self._header[column]!r}: "
                f"the line has {len(cells)} cells and the header {len(self._header)}"
            )
        return cells[column]

    def _number(self, line: int, cells: Sequence[str], column: int) -> float:
        cell = self._cell(line, cells, column)
        where = f"{self._name}, line {line}, column {self._header[column]!r}"
        if not _is_number(cell):
            raise ValueError(f"{where}: {cell!r} is not a number")
        if (number := float(cell)) < 0:
            raise ValueError(f"{where}: a norm is at least 0, got {cell!r}")
        return number


def _is_number(cell: str) -> bool:
    if not cell.isascii() or "_" in cell:  # Python's `float` takes digits of every script, and underscores
        return False
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def from_state(opt_state: Any, *, place: str = "", group: str = "") -> np.ndarray:
    """The norms that a clipper with `record=` has in an optimizer's state: the last k steps, oldest first.

    They are measured before the clip, so they can be judged whatever was clipped. `advise` recommends a bound for the
    global norm: record that one, if need be by `clip_by_global_norm(inf, record=k)`. Choose k as large as the number of
    steps: the first ones tell `advise` whether the run exploded.

    Args:
      opt_state: the state of any chain, wrapper or nesting of these.
      place: which record is meant where there are several, as `clip_stats` leads its keys: "0" for "0/clip_norm".
      group: the path of one group, a leaf say, where the record has several.

    Returns:
      A vector of up to k floats.

    Raises:
      ValueError: if there is no record; if there are several and no such place, or several groups and no such group.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.clip_by_global_norm(1.0, record=100)
      >>> state = tx.init(jnp.zeros(2))
      >>> for grads in ([0.3, 0.4], [3.0, 4.0]):
      ...     _, state = tx.update(jnp.array(grads), state)
      >>> print(optaxclip.diagnostics.from_state(state))
      [0.5 5. ]

    See also:
      `read_csv`, for a history in a file; `clip_stats`, for the rest of the record; `advise`, `summary` and `plot`.

      Notebook: `notebooks/choosing_a_threshold.ipynb`, how to choose a bound.
    """
    checks.text("place", place)
    checks.text("group", group)
    found = clip_stats(opt_state, per_group=True, history=True)
    records = {name.removesuffix(RECORD).removesuffix("/"): each for name, each in found.items() if _is_record(name)}
    if not records:
        raise ValueError("there is no record in this state: build the clipper with record=k, for the last k steps")
    if not place and len(records) == 1:
        place = next(iter(records))
    if place not in records:
        raise ValueError(f"no record at {place!r}; place must be one of {_listed(records)}")
    lead = f"{place}/{RECORD}/" if place else f"{RECORD}/"
    groups = {name.removeprefix(lead): each for name, each in found.items() if name.startswith(lead)}
    if not group and len(groups) < 2:
        return records[place]
    if group not in groups:
        raise ValueError(
            f"no group {group!r} in this record; group must be one of {_listed(groups)}, or record the global norm"
        )
    return groups[group]


def _is_record(name: str) -> bool:
    return name == RECORD or name.endswith(f"/{RECORD}")


def ordinary(history: np.ndarray) -> np.ndarray:
    """Which steps have a norm that is finite and positive."""
    return np.isfinite(history) & (history > 0)


def ordinary_norms(history: np.ndarray) -> np.ndarray:
    """The norms that are finite and positive, in order."""
    return history[ordinary(history)]
