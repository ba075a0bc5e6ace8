"""What `python -m tests.benchmarks.sweep` does, from the command line to the exit code."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from optaxclip.demo.ending import INTERRUPTED, ended
from optaxclip.demo.folder import Write, folder
from optaxclip.demo.interrupts import held_back
from optaxclip.demo.panels import require_matplotlib
from tests.benchmarks.sweep import figures, results, tables
from tests.benchmarks.sweep.job import Job, require_memory
from tests.benchmarks.sweep.methods import METHODS, PLACES
from tests.benchmarks.sweep.options import COMMAND, Options, parser
from tests.benchmarks.sweep.registry import TASKS
from tests.benchmarks.sweep.report import Report, report

PROGRAMS = "programs"  # the folder in the folder, with a file per program
FILES = ("table.csv", "table.md", "sensitivities.png", "ranges.png", "losses.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Trains every method in every task, and prints a table.

    Args:
      argv: the arguments; those of the process by default.

    Returns:
      The exit code; `optaxclip.demo.ending` lists them.

    Raises:
      SystemExit: of argparse, with code 0 after the help, with 2 after one line on stderr.
    """
    return ended(COMMAND, lambda: _run(parser().parse_args(argv, Options())))


def _run(asked: Options) -> int:
    if asked.list:
        print(_listing())
        return 0
    return _sweep(asked)


def _sweep(asked: Options) -> int:
    """The whole sweep. What is wrong with the input comes to light before anything is printed."""
    require_matplotlib()
    names = [results.file_name(task, method) for task in asked.tasks for method in asked.methods]
    programs = asked.out / PROGRAMS
    write_files, write_program = folder(asked.out, FILES), folder(programs, names)
    require_memory(asked)
    job = Job(asked, programs)
    print(_heading(asked, job), flush=True)
    try:
        job.run(write_program)
    except KeyboardInterrupt:
        print(
            f"interrupted; {job.finished} of {job.programs} programs finished; the same command goes on from there",
            file=sys.stderr,
        )
        return INTERRUPTED
    with held_back() as raise_if_interrupted:
        _show(asked, report(asked.tasks, asked.methods, job.found), write_files)
        raise_if_interrupted()
    return 0


def _show(asked: Options, found: Report, write: Callable[[Write], None]) -> None:
    """Files first: they must not be lost if the reader of stdout has gone. The table comes even if the disk is full."""
    try:
        write(lambda unfinished: _write_files(unfinished, found))
    finally:
        print(f"\n{tables.text(found)}\n\n{tables.footing(asked.seeds)}", flush=True)
    print(f"Table and figures: {', '.join(FILES)} in {str(asked.out)!r}", flush=True)


def _write_files(where: Path, found: Report) -> None:
    tables.write_csv(where / "table.csv", found)
    (where / "table.md").write_text(tables.markdown(found) + "\n", encoding="utf-8")
    figures.write_sensitivities(where / "sensitivities.png", found)
    figures.write_ranges(where / "ranges.png", found)
    figures.write_losses(where / "losses.png", found)


def _listing() -> str:
    width = max(map(len, [*METHODS, *TASKS]))
    shown = max(len(method.shown) for method in METHODS.values())
    tasks = [f"{task.name:{width}}  {task.about}" for task in TASKS.values()]
    methods = [f"{method.name:{width}}  {method.shown:{shown}}  {PLACES[method.place]}" for method in METHODS.values()]
    return "\n".join(["Tasks", *tasks, "", "Clippers", *methods])


def _heading(asked: Options, job: Job) -> str:
    width = max(len(task.name) for task in asked.tasks)
    tasks = [
        f"{task.name + ':':{width + 1}} {task.about}; {asked.steps or task.steps} steps of {task.optimizer}, "
        f"{len(task.rates)} learning rates from {task.rates[0]:g} to {task.rates[-1]:g}"
        for task in asked.tasks
    ]
    seeds = "1 seed" if asked.seeds == 1 else f"{asked.seeds} seeds"
    runs = (
        f"{seeds} at each learning rate, on {jax.default_backend()}; "
        f"{job.finished} of {job.programs} programs finished before"
    )
    return "\n".join([*tasks, runs])
