"""The job between command line and table: every run trained, then a step of each row timed."""

from collections.abc import Callable

from optaxclip.demo.corpus import Corpus
from optaxclip.demo.interrupts import held_back
from optaxclip.demo.models import Optimizer
from optaxclip.demo.options import Options
from optaxclip.demo.progress import Progress
from optaxclip.demo.rows import UNCLIPPED, Row
from optaxclip.demo.table import Line
from optaxclip.demo.timing import relative_step_times
from optaxclip.demo.training import Program, Result, prepare, train

LOG = 144  # bytes at most that a run logs in a step; a test compares
COLUMNS = 32  # the same step in the numbers that are shown
FIGURES = (700, 60)  # a step in the panels of a run, and that of each other run in them: measured, rounded up


def bytes_per_step(runs: int, *, figures: bool) -> int:
    """How much memory the whole job needs at most for each step.

    Args:
      runs: how many models are trained.
      figures: whether any are drawn.
    """
    own, other = FIGURES
    drawn = own + other * runs if figures else 0
    return runs * (2 * LOG + COLUMNS + drawn)  # two logs: that of the training, and one while steps are timed


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
        self._timed: dict[str, Program] = {}
        self.lines: list[Line] = []

    def run(self) -> None:
        """Trains and times; after Ctrl-C, which raises KeyboardInterrupt, `lines` holds what is finished."""
        with self._progress, held_back() as raise_if_interrupted:
            for row in self._options.rows:
                results = {each.name: self._train(row, each, raise_if_interrupted) for each in self._optimizers}
                self.lines.append(Line(row.name, row.shown, results, step_time=None))
            self._progress.start("step times")
            times = self._step_times(raise_if_interrupted)
            self.lines = [line._replace(step_time=times[line.name]) for line in self.lines]
            self._progress.finish("step times, measured")

    @property
    def _optimizers(self) -> list[Optimizer]:
        return list(self._options.optimizers.values())

    def _train(self, row: Row, optimizer: Optimizer, raise_if_interrupted: Callable[[], None]) -> Result:
        def report(done: int, bits: float) -> None:
            self._progress.report(done, bits)
            raise_if_interrupted()

        shown = f"{optimizer.shown}, {row.shown}"
        self._progress.start(f"{optimizer.shown} {row.name}")
        program = self._prepare(row, optimizer)
        if optimizer.name == self._optimizers[0].name:
            self._timed[row.name] = program
        result = train(program, steps=self._options.steps, report=report)
        self._progress.finish_run(shown)
        raise_if_interrupted()
        return result

    def _step_times(self, raise_if_interrupted: Callable[[], None]) -> dict[str, float]:
        """With the first optimizer. The row without a clip is timed even if it is not asked for."""
        programs = {UNCLIPPED.name: self._prepare(UNCLIPPED, self._optimizers[0])} | self._timed
        return relative_step_times(programs, UNCLIPPED.name, between_rounds=raise_if_interrupted)

    def _prepare(self, row: Row, optimizer: Optimizer) -> Program:
        asked = self._options
        clipped = row.around(optimizer.make(optimizer.learning_rate, asked.steps), asked.steps)
        return prepare(asked.model, clipped, self._corpus, steps=asked.steps, seed=asked.seed)
