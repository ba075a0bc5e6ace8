"""Ctrl-C between steps: inside a compilation it can make jax crash when the process ends."""

import contextlib
import signal
from collections.abc import Callable, Generator
from types import FrameType


@contextlib.contextmanager
def held_back() -> Generator[Callable[[], None], None, None]:
    """Inside, the first Ctrl-C only takes note; a second one interrupts at once.

    Yields:
      What raises KeyboardInterrupt if there was a Ctrl-C.
    """
    noted = False

    def note(signal_number: int, frame: FrameType | None) -> None:
        del signal_number, frame
        nonlocal noted
        noted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def raise_if_noted() -> None:
        if noted:
            raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield raise_if_noted  # someone else, nohup for one, has decided what Ctrl-C does
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield raise_if_noted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
