"""The command line: what can be asked for, and what is refused."""

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np

from optaxclip.demo.ending import one_line
from optaxclip.demo.rows import ROWS, Row

Named = TypeVar("Named")
WHOLE = re.compile(r"[+-]?[0-9]+")  # Python's `int` takes underscores, and the digits of every script
DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
DIGITS = 1000  # of a number; Python refuses those of a few thousand with words of its own
COMMAND = "python -m optaxclip"
SHOWN = 60  # characters of what was wrong that a message repeats


class Options(argparse.Namespace):
    """What was asked for.

    Attributes:
      text: the file to train on; None for the Python language reference.
      steps: training steps of each row.
      learning_rate: of Adam.
      rows: what is compared, in this order.
      seed: of the initial parameters and the batches.
      out: the folder for figures and numbers; None if none are wanted.
      list: whether the rows are only to be listed.
    """

    text: Path | None
    steps: int
    learning_rate: float
    rows: list[Row]
    seed: int
    out: Path | None
    list: bool


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage above it."""

    def print_help(self, file: Any = None) -> None:
        """Writes the help, and raises OSError if that fails: argparse's own ignores it."""
        print(self.format_help(), end="", file=file or sys.stdout)

    def error(self, message: str) -> NoReturn:
        """Writes the line and exits with code 2."""
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")


def parser() -> Parser:
    """The parser of `python -m optaxclip`, which fills in `Options`."""
    made = Parser(
        prog=COMMAND,
        description="Trains a character model that explodes on its own, once without clipping and once per clipper.",
        epilog=f"'{COMMAND} replay FILE' says what clippers would have done on the norms in a CSV file.",
        allow_abbrev=False,
    )
    made.add_argument(
        "--text", type=path, metavar="FILE", help="train on this text, in UTF-8 (the Python language reference)"
    )
    made.add_argument("--steps", type=integer(1), default=400, help="training steps of each row (%(default)s)")
    made.add_argument("--learning-rate", type=_learning_rate, default=0.03, help="of Adam (%(default)s)")
    made.add_argument(
        "--clippers",
        type=named("clipper", ROWS),
        dest="rows",
        default=",".join(ROWS),
        metavar="A,B,C",
        help="which rows, in order (all)",
    )
    made.add_argument(
        "--seed",
        type=integer(0),
        default=0,
        help="of the initial parameters and the batches of every row (%(default)s)",
    )
    made.add_argument("--out", type=path, metavar="DIR", help="write figures and numbers to this folder (nothing)")
    made.add_argument("--list", action="store_true", help="list the rows and stop")
    return made


def parsed(argv: Sequence[str] | None) -> Options:
    """The options in a command line, that of the process if it is None; exits with code 2 if it is wrong."""
    return parser().parse_args(argv, Options())


def path(text: str) -> Path:
    """A path in the command line; argparse refuses an empty one with a line of its own."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return Path(text)


def integer(least: int) -> Callable[[str], int]:
    """What turns a whole number in the command line, of at least so much, into an int that jax can count to."""

    def parse(text: str) -> int:
        if not WHOLE.fullmatch(text):
            raise argparse.ArgumentTypeError(f"must be a whole number, got {shown(text)}")
        if len(text) > DIGITS or not least <= int(text) < 2**31:
            raise argparse.ArgumentTypeError(f"must be at least {least} and less than 2**31, got {_shortened(text)}")
        return int(text)

    return parse


def _learning_rate(text: str) -> float:
    rate = float(text) if DECIMAL.fullmatch(text) else np.nan
    if not np.finfo(np.float32).tiny <= rate <= np.finfo(np.float32).max:
        raise argparse.ArgumentTypeError(f"must be a positive, finite float32, got {shown(text)}")
    return rate


def shown(text: str) -> str:
    """What was wrong, quoted and cut, for a message."""
    return repr(_shortened(text))


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text)} characters)"


def named(kind: str, known: Mapping[str, Named], listing: str = "--list") -> Callable[[str], list[Named]]:
    """What turns names in the command line, with commas between them, into what they name.

    Args:
      kind: what they are names of.
      known: what they name.
      listing: what lists all of them, for the message.
    """

    def parse(text: str) -> list[Named]:
        names = [name.strip() for name in text.split(",")]
        for name in names:
            if name not in known:
                similar = "".join(f" (did you mean {close}?)" for close in get_close_matches(name, known, n=1))
                raise argparse.ArgumentTypeError(
                    f"no {kind} is called {shown(name)}{similar}; {listing} names them all"
                )
        return [known[name] for name in dict.fromkeys(names)]

    return parse
