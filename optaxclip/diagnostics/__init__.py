"""What a history of gradient norms says: a summary in numbers, what other clippers would have done, and a figure.

A history is a vector of norms, one per step, measured before the clip: any array, or what a clipper with `record=` has
kept (`from_state`). NumPy computes `summary` on the host. `replay` runs the thresholds themselves. Only `plot` needs
matplotlib.
"""

from optaxclip.diagnostics.histories import from_state
from optaxclip.diagnostics.plots import plot
from optaxclip.diagnostics.replays import Replay, Replayed, replay
from optaxclip.diagnostics.summaries import Summary, summary

__all__ = ["Replay", "Replayed", "Summary", "from_state", "plot", "replay", "summary"]
