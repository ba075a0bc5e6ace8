"""`python -m optaxclip`: trains a character model once per clipper and prints what each of them did.

`python -m optaxclip advise norms.csv` reads recorded norms, and says which clipper they speak for.

`python -m optaxclip sweep` trains four small models with every method, over four decades of learning rates.
"""

from optaxclip.demo.command import main
from optaxclip.demo.ending import end_process

if __name__ == "__main__":
    end_process(main)
