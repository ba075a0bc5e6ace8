"""How far the job is, on stderr: a bar on a terminal, a line per row anywhere else."""

import sys
import time
from types import TracebackType
from typing import Self

from optaxclip.demo.ending import InputError


class ProgressError(InputError):
    """Progress can't be shown; the message says why."""


class Bar:
    """A bar on a terminal and lines anywhere else, as a context.

    Args:
      total: how many units there are.
      unit: what they are.
      finished: how many of them are done.

    Raises:
      ProgressError: if tqdm is missing.
    """

    def __init__(self, total: int, unit: str, finished: int = 0) -> None:
        try:
            # An extra of the package, which --list and --help do without.
            from tqdm import tqdm  # noqa: PLC0415
        except ImportError as error:
            raise ProgressError("the progress bar needs tqdm: pip install 'optaxclip[demo]'") from error
        self._started = 0.0
        # delay: nothing is drawn until the first one begins. disable=None: no bar where stderr is not a terminal.
        self._bar = tqdm(
            total=total, initial=finished, unit=unit, leave=False, dynamic_ncols=True, disable=None, delay=1e-9
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()

    def start(self, shown: str) -> None:
        """Something begins that takes its time."""
        self._started = time.monotonic()
        self._bar.set_postfix_str("", refresh=False)
        self._bar.set_description(shown)

    def finish(self, what: str) -> None:
        """What began last is done: where there is no bar, a line says what it was and how long it took."""
        if self._bar.disable:
            print(f"{what} in {time.monotonic() - self._started:.1f} s", file=sys.stderr)


class Progress(Bar):
    """The progress of the whole job.

    Args:
      runs: how many models will be trained.
      steps: how many steps each of them takes.

    Raises:
      ProgressError: if tqdm is missing.
    """

    def __init__(self, runs: int, steps: int) -> None:
        super().__init__(runs * steps, "step")
        self._runs, self._steps, self._run = runs, steps, 0

    def report(self, done: int, bits: float) -> None:
        """The run has done this many steps, the last one with this loss in bits per character."""
        self._bar.set_postfix_str(f"{bits:.3g} bits", refresh=False)
        self._bar.update(self._run * self._steps + done - self._bar.n)

    def finish_run(self, shown: str) -> None:
        """The model is trained and measured."""
        self._run += 1
        self.finish(f"[{self._run}/{self._runs}] {shown}: {self._steps} steps")
