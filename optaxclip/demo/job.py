"""The job between command line and table: every row trained, then all of them timed."""

from collections.abc import Callable

from optaxclip.demo.corpus import Corpus
from optaxclip.demo.interrupts import held_back
from optaxclip.demo.options import Options
from optaxclip.demo.progress import Progress
from optaxclip.demo.rows import UNCLIPPED, Row
from optaxclip.demo.table import Line
from optaxclip.demo.timing import relative_step_times
from optaxclip.demo.training import Program, Result, prepare, train

LOG = 144  # bytes at most that a row logs in a step; a test compares
COLUMNS = 32  # the same step in the numbers that are shown
FIGURES = (700, 60)  # a step in a row's panels, and that of each other row in them: measured, rounded up


def bytes_per_step(rows: int, *, figures: bool) -> int:
    """How much memory the whole job needs at most for each step.

    Args:
      rows: how many.
      figures: whether any are drawn.
    """
    own, other = FIGURES
    drawn = own + other * rows if figures else 0
    return rows * (2 * LOG + COLUMNS + drawn)  # two logs: that of the training, and one while steps are timed


class Job:
    """What `python -m optaxclip` does between its heading and its table.

    Args:
      options: what was asked for.
      corpus: the text.
      progress: what is told how far it is.

    Attributes:
      lines: of the table, one per row that is finished.
    """

    def __init__(self, options: Options, corpus: Corpus, progress: Progress) -> None:
        self._options, self._corpus, self._progress = options, corpus, progress
        self._programs: dict[str, Program] = {}
        self.lines: list[Line] = []

    def run(self) -> None:
        """Trains and times; after Ctrl-C, which raises KeyboardInterrupt, `lines` holds what is finished."""
        with self._progress, held_back() as raise_if_interrupted:
            for row in self._options.rows:
                self._progress.start(row.shown)
                result = self._train(row, raise_if_interrupted)
                self.lines.append(Line(row.name, row.shown, result, step_time=None))
                self._progress.finish_row(row.shown)
                raise_if_interrupted()
            self._progress.start("step times")
            times = self._step_times(raise_if_interrupted)
            self.lines = [line._replace(step_time=times[line.name]) for line in self.lines]
            self._progress.finish("step times, measured")

    def _train(self, row: Row, raise_if_interrupted: Callable[[], None]) -> Result:
        def report(done: int, bits: float) -> None:
            self._progress.report(done, bits)
            raise_if_interrupted()

        program = self._programs[row.name] = self._prepare(row)
        return train(program, self._corpus, steps=self._options.steps, report=report)

    def _step_times(self, raise_if_interrupted: Callable[[], None]) -> dict[str, float]:
        programs = {UNCLIPPED.name: self._prepare(UNCLIPPED)} | self._programs  # its own if it is not a row
        return relative_step_times(programs, UNCLIPPED.name, between_rounds=raise_if_interrupted)

    def _prepare(self, row: Row) -> Program:
        steps, seed = self._options.steps, self._options.seed
        return prepare(row.optimizer(self._options.learning_rate, steps), self._corpus, steps=steps, seed=seed)
