"""What `python -m optaxclip` runs: one model, trained once per clipper and optimizer; a table, and figures.

The files, in the order in which they are used:

- `command`: from the command line to the exit code;
- `ending`: every exit code, and its line on stderr;
- `options`: the command line;
- `models`: the two models, and how each is trained;
- `decoder`, `recurrent`: a small transformer, and a ReLU recurrent network;
- `rows`: the clippers, one line each;
- `corpus`, `batches`: the text, and how it is cut up;
- `memory`: whether all of it fits;
- `job`: every run trained, then a step of each row timed;
- `training`: one run, in one jitted and donated step;
- `watching`: whether a clip or a skip changed anything;
- `timing`: how long a step takes;
- `progress`, `interrupts`: a bar; Ctrl-C and SIGTERM;
- `table`: what is printed;
- `runs`: the runs behind the table, named for the files;
- `folder`: where files go, whole or not at all;
- `picture`: the one figure that is always drawn;
- `csv_files`, `figures`, `panels`: with `--out`, the numbers and two more figures;
- `replaying`: what `python -m optaxclip replay` does with such numbers.
"""
