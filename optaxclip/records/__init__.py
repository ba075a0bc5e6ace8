"""The flight recorder: a writer, which `clip_by` and the skips call, and a reader."""

from optaxclip.records.reader import clip_stats
from optaxclip.records.recorder import ClipStats

__all__ = ["ClipStats", "clip_stats"]
