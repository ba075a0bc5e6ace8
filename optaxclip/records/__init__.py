"""The flight recorder: the writer, which `clip_by` and the skips drive, beside the reader."""

from optaxclip.records.reader import clip_stats
from optaxclip.records.recorder import ClipStats

__all__ = ["ClipStats", "clip_stats"]
