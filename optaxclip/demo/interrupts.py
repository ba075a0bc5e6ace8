"""Signals at moments where they would do harm: Ctrl-C inside a compilation, SIGTERM between two files.

Ctrl-C inside a compilation can make jax crash when the process ends, so it waits for the end of a step.
"""

import _thread
import contextlib
import inspect
import signal
import sys
import time
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


class Terminated(BaseException):
    """The process is to end: SIGTERM, or SIGHUP of a terminal that was closed.

    Attributes:
      signal_number: which of them.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


@contextlib.contextmanager
def cleaned_up() -> Generator[None, None, None]:
    """Inside, SIGTERM and SIGHUP raise Terminated, so that what is half done on the disk is undone.

    Anywhere else they end the process as they always do. There is nothing on the disk to undo then, and a handler in
    Python would have to wait for XLA, which can take a minute.
    """

    def terminate(signal_number: int, frame: FrameType | None) -> None:
        del frame
        signal.signal(signal_number, signal.SIG_IGN)  # a second one must not interrupt the cleaning up
        raise Terminated(signal_number)

    names = ("SIGTERM", "SIGHUP")  # Windows has only the first
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    ours = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, terminate)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def not_lost_in_callbacks() -> Generator[None, None, None]:
    """Inside, a signal that arrives in a finalizer or a callback of the garbage collector is raised once more.

    Python raises in whatever runs. What such a callback raises (jax has one) it prints, and goes on as if nothing had
    been: Ctrl-C would be a traceback and no end.
    """
    before = sys.unraisablehook

    def once_more(unraisable: "sys.UnraisableHookArgs") -> None:
        error = unraisable.exc_value
        if isinstance(error, KeyboardInterrupt | Terminated):
            _raise_later(error, inspect.currentframe())
        else:
            before(unraisable)

    sys.unraisablehook = once_more
    try:
        yield
    finally:
        sys.unraisablehook = before


def _raise_later(error: KeyboardInterrupt | Terminated, hook: FrameType | None) -> None:
    """Raises the error in the main thread again, when the frame `hook` has returned."""
    number: int = error.signal_number if isinstance(error, Terminated) else signal.SIGINT
    handler = signal.getsignal(number)

    def again(signal_number: int, frame: FrameType | None) -> None:
        while frame is not None and frame is not hook:
            frame = frame.f_back
        if frame is not None:  # the hook has not returned yet: on a busy machine it may take longer than `send` waits
            _thread.start_new_thread(send, ())
            return
        signal.signal(signal_number, handler)
        raise error

    def send() -> None:
        time.sleep(0.01)
        _thread.interrupt_main(signal.Signals(number))

    signal.signal(number, again)
    _thread.start_new_thread(send, ())
