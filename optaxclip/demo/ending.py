"""Every way in which a command ends: an exit code, and at most one line on stderr.

====  ==================================================  ============================================================
code  what happened                                       on stderr
====  ==================================================  ============================================================
0     all is done                                         nothing
1     a write failed, as on a full disk                   what could not be written, and why
2     the input is wrong                                  what is wrong, and what to do
130   Ctrl-C (SIGINT)                                     how much is finished, if training had begun
141   the reader of the output has gone, as `head` does   nothing
143   SIGTERM; 129 for SIGHUP                             nothing
====  ==================================================  ============================================================

Codes above 128 are 128 plus the number of the signal, as a shell reports them. A closed pipe ends `cat` with SIGPIPE
and prints nothing. Python ignores that signal and raises an exception instead. This returns what the shell reports for
`cat`, so that `set -o pipefail` can tell a reader that had enough from a write that failed.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable

from optaxclip.demo.interrupts import Terminated, not_lost_in_callbacks

FAILED = 1
WRONG = 2
INTERRUPTED = 128 + signal.SIGINT
UNREAD = 128 + 13  # SIGPIPE, which Windows does not have


class InputError(Exception):
    """The input is wrong; the message, of one line, says what is wrong and what to do."""


class OutputError(Exception):
    """A write failed; the message, of one line, says where and why."""


def ended(name: str, work: Callable[[], int]) -> int:
    """Does the work, and turns whatever ends it into an exit code.

    Args:
      name: of the command, for its line on stderr.
      work: what is done; it returns an exit code.
    """
    try:
        return _flushed(work)
    except BrokenPipeError:
        return UNREAD
    except KeyboardInterrupt:
        return INTERRUPTED
    except Terminated as error:
        return 128 + error.signal_number
    except (InputError, OutputError, OSError) as error:
        with contextlib.suppress(OSError):  # stderr may be what can't be written
            print(f"{name}: error: {one_line(_explained(error))}", file=sys.stderr, flush=True)
        return WRONG if isinstance(error, InputError) else FAILED


def end_process(main: Callable[[], int]) -> None:
    """Runs a command as the whole process; returns only if it succeeds.

    Any other end skips the interpreter's own. That would write to a closed pipe once more, and jax can crash in it if a
    compilation was interrupted.
    """
    _open_what_is_closed()
    if code := _code(main):
        os._exit(code)


def one_line(text: str) -> str:
    """A text whose line breaks and other control characters are escaped, as `repr` does."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def _flushed(work: Callable[[], int]) -> int:
    try:
        return work()
    finally:
        if sys.stdout is not None:
            sys.stdout.flush()  # here, so that a write that fails is noticed


def _explained(error: Exception) -> str:
    if not isinstance(error, OSError):
        return str(error)
    reason = error.strerror or str(error)
    return f"cannot write the output: {reason}" if error.filename is None else f"{error.filename!r}: {reason}"


def _code(main: Callable[[], int]) -> int:
    """The exit code. From here on Ctrl-C leaves no traceback in `main`, and does nothing after it: all is written."""
    is_ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else nohup, for one, has decided
    try:
        try:
            with not_lost_in_callbacks():
                return main()
        finally:
            if is_ours:
                # A handler in Python would be given up while the interpreter ends, and Ctrl-C would kill it then.
                signal.signal(signal.SIGINT, signal.SIG_IGN)
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as error:  # argparse's
        return error.code if isinstance(error.code, int) else 0


def _open_what_is_closed() -> None:
    """Python has None for a closed stdout or stderr, and the next file that is opened would take its number.

    A closed stdout becomes a file that can't be written to, so that a lost result is an error. What goes to a closed
    stderr is lost, as the caller wants it.
    """
    if sys.stdout is None:
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_RDONLY), "w", encoding="utf-8")
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
