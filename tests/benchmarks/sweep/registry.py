"""The four tasks by name, and what all programs share."""

from tests.benchmarks.sweep.characters import CHARACTERS
from tests.benchmarks.sweep.digits import DIGITS, SPIKES
from tests.benchmarks.sweep.regression import REGRESSION

TASKS = {task.name: task for task in (CHARACTERS, DIGITS, REGRESSION, SPIKES)}
RATES = [10.0 ** (half / 2) for half in range(-8, 1)]  # two per decade
SEEDS = 3
