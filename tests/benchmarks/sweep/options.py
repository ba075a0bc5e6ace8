"""The command line of the sweep."""

import argparse
from pathlib import Path

from optaxclip.demo.options import Parser, integer, named, path
from tests.benchmarks.sweep.methods import METHODS, Method
from tests.benchmarks.sweep.registry import SEEDS, TASKS
from tests.benchmarks.sweep.tasks import Task

COMMAND = "python -m tests.benchmarks.sweep"


class Options(argparse.Namespace):
    """What was asked for.

    Attributes:
      tasks: what is trained, in this order.
      methods: what is compared, in this order.
      steps: of each run; None for each task's own number.
      seeds: how many seeds.
      out: the folder for all that is found.
      list: whether tasks and methods are only to be listed.
    """

    tasks: list[Task]
    methods: list[Method]
    steps: int | None
    seeds: int
    out: Path
    list: bool


def parser() -> Parser:
    """The parser of `python -m tests.benchmarks.sweep`, which fills in `Options`."""
    made = Parser(
        prog=COMMAND,
        description="Which clipper? Trains small models with every method, over decades of learning rates. What is "
        "finished is kept in the folder, and the same command goes on from there.",
        allow_abbrev=False,
    )
    made.add_argument("--tasks", type=named("task", TASKS), default=",".join(TASKS), metavar="A,B", help="which (all)")
    made.add_argument(
        "--clippers",
        type=named("clipper", METHODS),
        dest="methods",
        default=",".join(METHODS),
        metavar="A,B,C",
        help="which methods, in order (all)",
    )
    steps = ", ".join(f"{task.steps} in {task.name}" for task in TASKS.values())
    made.add_argument("--steps", type=integer(1), help=f"of each run ({steps})")
    made.add_argument("--seeds", type=integer(1), default=SEEDS, help="how many seeds (%(default)s)")
    made.add_argument(
        "--out", type=path, default=Path("sweep"), metavar="DIR", help="the folder for all that is found (%(default)s)"
    )
    made.add_argument("--list", action="store_true", help="list the tasks and the clippers, and stop")
    return made
