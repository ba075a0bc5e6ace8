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
from optaxclip.demo.models import MODELS, Model, Optimizer
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
      model: what is trained.
      text: the file to train on; None for the Python language reference.
      steps: training steps of each run.
      optimizers: what it is trained with, by name.
      rows: the clippers that are compared, in this order.
      seed: of the initial parameters and the batches.
      out: the folder for figures and numbers; None for the picture alone, in the working folder.
      list: whether the rows are only to be listed.
    """

    model: Model
    text: Path | None
    steps: int
    optimizers: dict[str, Optimizer]
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
    """The parser of `python -m optaxclip`. `parsed` fills in what depends on the model."""
    made = Parser(
        prog=COMMAND,
        description="Trains a small transformer, once without clipping and once per clipper. Does this with SGD, which "
        "diverges without clipping, and again with AdamW. Prints a table and draws a picture.",
        epilog=f"'{COMMAND} replay FILE' shows what clippers would have done with the norms in a CSV file.",
        allow_abbrev=False,
    )
    made.add_argument("--model", choices=MODELS, default="decoder", help="the model to train (default: %(default)s)")
    made.add_argument(
        "--text",
        type=path,
        metavar="FILE",
        help="train on this text, in UTF-8 (default: the Python language reference)",
    )
    made.add_argument("--steps", type=integer(1), help=f"training steps of each run (default for {_by_model('steps')})")
    made.add_argument("--optimizer", help="train only with this one (default for decoder: sgd and adamw, rnn: adam)")
    made.add_argument("--learning-rate", type=_learning_rate, help="its (peak) learning rate; only with one optimizer")
    made.add_argument(
        "--clippers",
        type=named("clipper", ROWS),
        dest="rows",
        metavar="A,B,C",
        help="rows of the table, in this order (default for decoder: six, rnn: all)",
    )
    made.add_argument(
        "--seed",
        type=integer(0),
        default=0,
        help="seed of the initial parameters and of the batches, for every run (default: %(default)s)",
    )
    made.add_argument(
        "--out",
        type=path,
        metavar="DIR",
        help="write all figures and numbers to this folder (default: one picture, to the working folder)",
    )
    made.add_argument("--list", action="store_true", help="list the rows and stop")
    return made


def _by_model(attribute: str) -> str:
    return ", ".join(f"{name}: {getattr(model, attribute)}" for name, model in MODELS.items())


def parsed(argv: Sequence[str] | None) -> Options:
    """The options in a command line, that of the process if it is None; exits with code 2 if it is wrong."""
    reader = parser()
    given = reader.parse_args(argv)
    model = MODELS[given.model]
    optimizers = model.optimizers
    if given.optimizer is not None:
        if given.optimizer not in optimizers:
            reader.error(
                f"argument --optimizer: --model {model.name} is trained with {' or '.join(optimizers)}, "
                f"got {shown(given.optimizer)}"
            )
        optimizers = {given.optimizer: optimizers[given.optimizer]}
    if given.learning_rate is not None:
        if len(optimizers) > 1:
            reader.error(f"argument --learning-rate: needs one optimizer: add --optimizer {' or '.join(optimizers)}")
        optimizers = {name: each._replace(learning_rate=given.learning_rate) for name, each in optimizers.items()}
    return Options(
        model=model,
        text=given.text,
        steps=given.steps or model.steps,
        optimizers=optimizers,
        rows=given.rows or [ROWS[name] for name in model.rows],
        seed=given.seed,
        out=given.out,
        list=given.list,
    )


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
