"""Ctrl-C while `python -m optaxclip` imports jax ends the process, without a traceback.

Python imports the package before it runs `__main__`, so no code of the command could catch that. A program that imports
optaxclip keeps its own handler.
"""

import os
import signal
import sys
from types import FrameType

INTERRUPTED = 130  # what shells report for Ctrl-C


def end_at_once(signal_number: int, frame: FrameType | None) -> None:
    """The handler: nothing is written yet, or all of it is."""
    del signal_number, frame
    os._exit(INTERRUPTED)


def _is_the_command() -> bool:
    """Whether Python is about to run `optaxclip.__main__`: until it is found, "-m" stands in for its file's name."""
    return sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)] in {"optaxclip", "-moptaxclip"}


if _is_the_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end_at_once)
