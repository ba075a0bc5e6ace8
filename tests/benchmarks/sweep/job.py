"""The job between the command line and the table: all programs, less those that are finished."""

from collections.abc import Callable, Mapping
from pathlib import Path

from optaxclip.demo import memory
from optaxclip.demo.folder import Write
from optaxclip.demo.interrupts import held_back
from tests.benchmarks.sweep import results
from tests.benchmarks.sweep.methods import Method
from tests.benchmarks.sweep.options import Options
from tests.benchmarks.sweep.programs import Outcome, Prepared, prepare, train
from tests.benchmarks.sweep.progress import Progress
from tests.benchmarks.sweep.tasks import Task

Found = Mapping[str, Mapping[str, Outcome]]
SEED = 128 * 2**20  # bytes; measured: 87 MiB for `characters`, most of it when the models are measured
EXAMPLE = 24  # bytes of its place in the data: an int64, and an int32 that is stacked over the seeds


def require_memory(options: Options) -> None:
    """Refuses seeds, or steps, that do not fit into memory.

    Raises:
      InputError: if they don't.
    """
    memory.require("--seeds", options.seeds, SEED)
    if options.steps is not None:
        examples = max(task.batch_size for task in options.tasks)
        memory.require("--steps", options.steps, options.seeds * examples * EXAMPLE, ", or for fewer --seeds")


class Job:
    """All programs of a sweep.

    Args:
      options: what was asked for.
      folder: where the files of programs are; it need not exist.

    Raises:
      ResultsError: if one of them has other settings.
      TaskError: if the data of a program that is not finished can't be had.
      ProgressError: if tqdm is missing.
    """

    def __init__(self, options: Options, folder: Path) -> None:
        self._pairs = [(task, method) for task in options.tasks for method in options.methods]
        self._settings = {
            task.name: results.settings(task.rates, options.seeds, options.steps or task.steps)
            for task in options.tasks
        }
        self._found = {
            pair: found
            for pair in self._pairs
            if (found := results.load(folder, *pair, self._settings[pair[0].name])) is not None
        }
        wanted = {task.name: task for task, method in self._pairs if (task, method) not in self._found}
        self._prepared = {name: self._prepare(task) for name, task in wanted.items()}
        self._progress = Progress(len(self._pairs), len(self._found))

    @property
    def programs(self) -> int:
        """How many programs there are."""
        return len(self._pairs)

    @property
    def finished(self) -> int:
        """How many of them are finished."""
        return len(self._found)

    @property
    def found(self) -> Found:
        """By task and method, what came of the programs that are finished."""
        tasks = dict.fromkeys(task.name for task, _ in self._pairs)
        return {
            name: {method.name: found for (task, method), found in self._found.items() if task.name == name}
            for name in tasks
        }

    def run(self, write: Callable[[Write], None]) -> None:
        """Runs what is not finished; after Ctrl-C, which raises KeyboardInterrupt, no file is cut short.

        Args:
          write: that of the `folder` for the files of programs.
        """
        with self._progress, held_back() as raise_if_interrupted:
            for task, method in self._pairs:
                if (task, method) in self._found:
                    continue
                shown = f"{task.name}: {method.shown}"
                self._progress.start(shown)
                self._found[task, method] = self._run(task, method, write)
                self._progress.finish_program(shown)
                raise_if_interrupted()

    def _run(self, task: Task, method: Method, write: Callable[[Write], None]) -> Outcome:
        found = train(self._prepared[task.name], method)
        results.save(write, task, method, self._settings[task.name], found)
        return found

    def _prepare(self, task: Task) -> Prepared:
        used = self._settings[task.name]
        return prepare(task, seeds=used.seeds, steps=used.steps)
