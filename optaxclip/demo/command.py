"""What `python -m optaxclip` does, from the command line to the exit code."""

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from optaxclip.demo import corpus, csv_files, figures, memory, model, options, replaying
from optaxclip.demo.corpus import Corpus
from optaxclip.demo.ending import INTERRUPTED, ended
from optaxclip.demo.folder import Write, folder
from optaxclip.demo.interrupts import held_back
from optaxclip.demo.job import Job, bytes_per_step
from optaxclip.demo.options import Options
from optaxclip.demo.panels import require_matplotlib
from optaxclip.demo.progress import Progress
from optaxclip.demo.rows import ROWS
from optaxclip.demo.table import Line, table
from optaxclip.demo.timing import ROUNDS

FILES = ("loss.png", "norm.png", "table.csv", "steps.csv")


def main(argv: Sequence[str] | None = None) -> int:
    """Trains one model per clipper and prints a table; after the word "replay", does what `replaying` says.

    Args:
      argv: the arguments; those of the process by default.

    Returns:
      The exit code; `optaxclip.demo.ending` lists them.

    Raises:
      SystemExit: of argparse, with code 0 after the help, with 2 after one line on stderr.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] == [replaying.WORD]:
        return ended(replaying.COMMAND, lambda: replaying.run(words[1:]))
    return ended(options.COMMAND, lambda: _run(options.parsed(words)))


def _run(asked: Options) -> int:
    if asked.list:
        print(_listing())
        return 0
    return _train(asked)


def _train(asked: Options) -> int:
    """The whole job. What is wrong with the input comes to light before anything is printed."""
    text = corpus.language_reference() if asked.text is None else corpus.from_file(asked.text)
    write = _folder(asked.out)
    each = bytes_per_step(len(asked.rows), figures=write is not None)
    memory.require("--steps", asked.steps, each, ", or for fewer --clippers")
    job = Job(asked, text, Progress(len(asked.rows), asked.steps))
    print(_heading(asked, text), flush=True)
    interrupted = _is_interrupted(job)
    if interrupted:
        print(f"interrupted; {len(job.lines)} of {len(asked.rows)} rows finished", file=sys.stderr)
    if job.lines:
        with held_back() as raise_if_interrupted:
            _show(asked, job.lines, text, write)
            raise_if_interrupted()
    return INTERRUPTED if interrupted else 0


def _show(asked: Options, lines: Sequence[Line], text: Corpus, write: Callable[[Write], None] | None) -> None:
    """Files first: they must not be lost if the reader of stdout has gone. The table comes even if the disk is full."""
    try:
        if write is not None:
            write(lambda unfinished: _write_files(unfinished, lines, text))
    finally:
        print(f"\n{table(lines)}\n\n{_footing(text)}", flush=True)
    if write is not None:
        print(f"Figures and numbers: {', '.join(FILES)} in {str(asked.out)!r}", flush=True)


def _is_interrupted(job: Job) -> bool:
    try:
        job.run()
    except KeyboardInterrupt:
        return True
    return False


def _folder(out: Path | None) -> Callable[[Write], None] | None:
    if out is None:
        return None
    require_matplotlib()
    return folder(out, FILES)


def _write_files(where: Path, lines: Sequence[Line], text: Corpus) -> None:
    guess = _bits_of_a_guess(text)
    figures.write_losses(where / "loss.png", lines, guess)
    figures.write_norms(where / "norm.png", lines)
    csv_files.write_table(where / "table.csv", lines)
    csv_files.write_steps(where / "steps.csv", lines)


def _listing() -> str:
    width = max(map(len, ROWS))
    return "\n".join(f"{row.name:{width}}  {row.shown}" for row in ROWS.values())


def _heading(asked: Options, text: Corpus) -> str:
    characters = len(text.train) + len(text.held_out)
    return (
        f"Text:  {text.name}, {characters:,} characters; the last tenth is held out\n"
        f"Model: ReLU recurrent network with {model.UNITS} units, {asked.steps} steps of Adam, "
        f"learning rate {asked.learning_rate:g}, seed {asked.seed}, on {jax.default_backend()}"
    )


def _footing(text: Corpus) -> str:
    return (
        f"Guessing among the {len(text.alphabet)} characters of the text takes {_bits_of_a_guess(text):.3f} bits.\n"
        f"Step time: relative to a step without clipping, median of {ROUNDS} pairs."
    )


def _bits_of_a_guess(text: Corpus) -> float:
    return math.log2(len(text.alphabet))
