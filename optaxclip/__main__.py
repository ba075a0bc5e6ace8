"""`python -m optaxclip`: trains a character model once per clipper and prints what each of them did."""

from optaxclip.demo.command import main
from optaxclip.demo.ending import end_process

if __name__ == "__main__":
    end_process(main)
