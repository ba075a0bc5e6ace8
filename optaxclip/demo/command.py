"""The command line of `python -m optaxclip`."""

import argparse
import math
import platform
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import NoReturn

import jax
import numpy as np

from optaxclip.demo import model
from optaxclip.demo.corpus import Corpus, CorpusError, language_reference
from optaxclip.demo.interrupts import held_back
from optaxclip.demo.progress import Progress, ProgressError
from optaxclip.demo.rows import ROWS, Row
from optaxclip.demo.table import table
from optaxclip.demo.training import Result, train

INTERRUPTED = 130  # what shells report for Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Trains one model per clipper and prints a table.

    Args:
      argv: the arguments; those of the process by default.

    Returns:
      The exit code: 0, or 130 after Ctrl-C.

    Raises:
      SystemExit: with code 2, after one line on stderr, if the input is bad.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    if options.list:
        print(_listing())
        return 0
    try:
        corpus, progress = language_reference(), Progress(len(options.clippers), options.steps)
    except (CorpusError, ProgressError) as error:
        parser.error(str(error))
    return _run(options, corpus, progress)


def _run(options: argparse.Namespace, corpus: Corpus, progress: Progress) -> int:
    rows: list[Row] = options.clippers
    results: list[tuple[str, Result]] = []
    interrupted = False
    print(_heading(options, corpus), flush=True)
    try:
        with progress, held_back() as raise_if_interrupted:

            def report(done: int, loss: float) -> None:
                progress.report(done, loss)
                raise_if_interrupted()

            for row in rows:
                progress.start_row(row.shown)
                optimizer = row.optimizer(options.learning_rate)
                result = train(optimizer, corpus, steps=options.steps, seed=options.seed, report=report)
                results.append((row.shown, result))
                progress.finish_row(row.shown)
                raise_if_interrupted()
    except KeyboardInterrupt:
        interrupted = True
    if results:
        print(f"\n{table(results)}\n\n{_footing(corpus)}", flush=True)
    if interrupted:
        print(f"interrupted; {len(results)} of {len(rows)} rows finished", file=sys.stderr)
    return INTERRUPTED if interrupted else 0


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m optaxclip",
        description="Trains a character model that explodes on its own, once without clipping and once per clipper.",
        allow_abbrev=False,
    )
    parser.add_argument("--steps", type=_steps, default=400, help="training steps of each row (%(default)s)")
    parser.add_argument("--learning-rate", type=_learning_rate, default=0.03, help="of Adam (%(default)s)")
    parser.add_argument(
        "--seed", type=_seed, default=0, help="of the initial parameters and the batches of every row (%(default)s)"
    )
    parser.add_argument(
        "--clippers", type=_rows, default=",".join(ROWS), metavar="A,B,C", help="which rows, in this order (all)"
    )
    parser.add_argument("--list", action="store_true", help="list the rows and stop")
    return parser


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from error


def _steps(text: str) -> int:
    if (steps := _integer(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return steps


def _seed(text: str) -> int:
    if not 0 <= (seed := _integer(text)) < 2**31:
        raise argparse.ArgumentTypeError(f"must be at least 0 and less than 2**31, got {text}")
    return seed


def _learning_rate(text: str) -> float:
    message = f"must be a positive, finite float32, got {text!r}"
    try:
        rate = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(message) from error
    if not np.finfo(np.float32).tiny <= rate <= np.finfo(np.float32).max:
        raise argparse.ArgumentTypeError(message)
    return rate


def _rows(text: str) -> list[Row]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in ROWS:
            similar = "".join(f" (did you mean {close}?)" for close in get_close_matches(name, ROWS, n=1))
            raise argparse.ArgumentTypeError(f"no clipper is called {name!r}{similar}; --list names them all")
    return [ROWS[name] for name in dict.fromkeys(names)]


def _listing() -> str:
    width = max(map(len, ROWS))
    return "\n".join(f"{row.name:{width}}  {row.shown}" for row in ROWS.values())


def _heading(options: argparse.Namespace, corpus: Corpus) -> str:
    characters = len(corpus.train) + len(corpus.held_out)
    return (
        f"Text:  {corpus.name} of Python {platform.python_version()}, {characters:,} characters; "
        "the last tenth is held out\n"
        f"Model: ReLU recurrent network with {model.UNITS} units, {options.steps} steps of Adam, "
        f"learning rate {options.learning_rate:g}, seed {options.seed}, on {jax.default_backend()}"
    )


def _footing(corpus: Corpus) -> str:
    size = len(corpus.alphabet)
    return f"Guessing among the {size} characters of the text takes {math.log2(size):.3f} bits."
