"""What `python -m tests.benchmarks.sweep` runs: every method in the same five tasks, over learning rates and seeds.

The files, in the order in which they are used:

- `command`: from the command line to the exit code;
- `options`: the command line;
- `methods`: the clippers, one line each, and where they stand in the chain;
- `tasks`, `registry`: what a task is; the five of them, and the number of seeds;
- `characters`, `decoder`, `digits`, `regression`: the tasks; `digits` has one more, `spikes`;
- `job`: all programs, less those that are finished;
- `programs`: all learning rates and seeds of one method in one task, compiled together;
- `results`: a file per program;
- `progress`: a bar over programs;
- `scores`, `report`: sensitivity, best loss and the rest, and which methods can't be told apart;
- `tables`, `figures`: what is printed and drawn.
"""
