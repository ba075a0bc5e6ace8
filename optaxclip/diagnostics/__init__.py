"""What a history of gradient norms says: a summary, which clipper and bound it speaks for, and plots.

A history is a vector of norms, one per step, measured before the clip: an array, a CSV file (`read_csv`), or what a
clipper with `record=` has kept (`from_state`). Computed with NumPy, on the host; only `plot` needs matplotlib.
`python -m optaxclip advise` does all of it for a file.
"""

from optaxclip.diagnostics.advice import Advice, advise
from optaxclip.diagnostics.histories import from_state, read_csv
from optaxclip.diagnostics.plots import plot
from optaxclip.diagnostics.summaries import Summary, summary

__all__ = ["Advice", "Summary", "advise", "from_state", "plot", "read_csv", "summary"]
