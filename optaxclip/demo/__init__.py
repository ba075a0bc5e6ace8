"""What `python -m optaxclip` runs: one character model, trained once per clipper, a table, and figures.

The files, in the order in which they are used:

- `command`: from the command line to the exit code;
- `ending`: every exit code, and its line on stderr;
- `options`: the command line;
- `corpus`, `batches`: the text, and how it is cut up;
- `memory`: whether all of it fits;
- `rows`: the clippers, one line each;
- `job`: every row trained, then all of them timed;
- `model`: a ReLU recurrent network, which explodes on its own;
- `training`: one run, in one jitted and donated step;
- `watching`: whether a clip changed anything;
- `timing`: how long a step takes;
- `progress`, `interrupts`: a bar; Ctrl-C and SIGTERM;
- `table`: what is printed;
- `folder`: where files go, whole or not at all;
- `csv_files`, `figures`, `panels`: the numbers and the figures;
- `replaying`: what `python -m optaxclip replay` does with such numbers.
"""
