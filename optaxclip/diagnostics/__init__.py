"""Analyzes a history of gradient norms: a summary in numbers, what other clippers would have done, and a figure.

A history is a vector of norms before the clip, one per step: any array, or the record of a clipper with `record=`
(`from_state`). `summary` uses NumPy on the host. `replay` runs the thresholds themselves. Only `plot` needs matplotlib.
"""

from optaxclip.diagnostics.histories import from_state
from optaxclip.diagnostics.plots import plot
from optaxclip.diagnostics.replays import Replay, Replayed, replay
from optaxclip.diagnostics.summaries import Summary, summary

__all__ = ["Replay", "Replayed", "Summary", "from_state", "plot", "replay", "summary"]
