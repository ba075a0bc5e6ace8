"""What a history of gradient norms looks like: a summary in numbers, and a plot.

A history is a vector of norms, one per step, measured before the clip: any array, or what a clipper with `record=` has
kept (`from_state`). NumPy computes all of it on the host; only `plot` needs matplotlib.
"""

from optaxclip.diagnostics.histories import from_state
from optaxclip.diagnostics.plots import plot
from optaxclip.diagnostics.summaries import Summary, summary

__all__ = ["Summary", "from_state", "plot", "summary"]
