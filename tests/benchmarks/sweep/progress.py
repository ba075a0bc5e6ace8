"""How far the sweep is, on stderr: a bar over programs on a terminal, a line for each anywhere else."""

from optaxclip.demo.progress import Bar


class Progress(Bar):
    """The progress of the sweep.

    Args:
      programs: how many there are.
      finished: how many of them were finished before.

    Raises:
      ProgressError: if tqdm is missing.
    """

    def __init__(self, programs: int, finished: int) -> None:
        super().__init__(programs, "program", finished)
        self._programs, self._finished = programs, finished

    def finish_program(self, shown: str) -> None:
        """It is finished, and its file written."""
        self._finished += 1
        self._bar.update()
        self.finish(f"[{self._finished}/{self._programs}] {shown}")
