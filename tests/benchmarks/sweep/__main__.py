"""`python -m tests.benchmarks.sweep`."""

from optaxclip.demo.ending import end_process
from tests.benchmarks.sweep.command import main

if __name__ == "__main__":
    end_process(main)
