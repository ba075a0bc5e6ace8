"""All that was found, scored: what the tables and the figures show."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tests.benchmarks.sweep.job import Found
from tests.benchmarks.sweep.methods import Method
from tests.benchmarks.sweep.scores import Score, scores
from tests.benchmarks.sweep.tasks import Task


class Report(NamedTuple):
    """A sweep that is finished.

    Attributes:
      tasks: in order.
      methods: in order.
      found: by task and method, the losses.
      scores: by task and method.
    """

    tasks: Sequence[Task]
    methods: Sequence[Method]
    found: Found
    scores: Mapping[str, Mapping[str, Score]]


def report(tasks: Sequence[Task], methods: Sequence[Method], found: Found) -> Report:
    """Scores what was found."""
    guesses = {task.name: None if task.spikes is None else task.spikes.guess for task in tasks}
    scored = {task.name: scores(found[task.name], task.rates, guesses[task.name]) for task in tasks}
    return Report(tasks, methods, found, scored)
