"""`python -m optaxclip`: trains a character model once per clipper and prints what each of them did."""

import sys

from optaxclip.demo.command import main

if __name__ == "__main__":
    sys.exit(main())
