"""What `python -m optaxclip` runs: one character model, trained once per clipper, and a table.

The files, in the order in which they are used:

- `command`: the command line;
- `corpus`: the text;
- `rows`: the clippers, one line each;
- `model`: a ReLU recurrent network, which explodes on its own;
- `training`: one run, in one jitted and donated step;
- `watching`: whether a clip changed anything;
- `progress`, `interrupts`: a bar, and Ctrl-C;
- `table`: what is printed.
"""
