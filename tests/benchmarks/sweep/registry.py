"""The five tasks by name, and how many seeds each has."""

from tests.benchmarks.sweep.characters import CHARACTERS
from tests.benchmarks.sweep.decoder import DECODER
from tests.benchmarks.sweep.digits import DIGITS, SPIKES
from tests.benchmarks.sweep.regression import REGRESSION

TASKS = {task.name: task for task in (DECODER, CHARACTERS, DIGITS, REGRESSION, SPIKES)}
SEEDS = 5
