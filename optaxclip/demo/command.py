"""What `python -m optaxclip` does, from the command line to the exit code."""

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from optaxclip.demo import corpus, csv_files, figures, memory, options, picture, replaying
from optaxclip.demo.corpus import Corpus
from optaxclip.demo.ending import INTERRUPTED, ended
from optaxclip.demo.folder import Write, folder
from optaxclip.demo.interrupts import held_back
from optaxclip.demo.job import Job, bytes_per_step
from optaxclip.demo.options import Options
from optaxclip.demo.panels import require_matplotlib
from optaxclip.demo.progress import Progress
from optaxclip.demo.rows import ROWS
from optaxclip.demo.runs import runs
from optaxclip.demo.table import Line, table
from optaxclip.demo.timing import ROUNDS

FILES = (picture.NAME, "loss.png", "norm.png", "table.csv", "steps.csv")


def main(argv: Sequence[str] | None = None) -> int:
    """Trains a model per clipper and optimizer and prints a table. After the word "replay", see `replaying`.

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
    require_matplotlib()
    write = folder(asked.out or Path.cwd(), _files(asked))
    count = len(asked.rows) * len(asked.optimizers)
    each = bytes_per_step(count, figures=asked.out is not None)
    memory.require("--steps", asked.steps, each, ", or for fewer --clippers")
    job = Job(asked, text, Progress(count, asked.steps))
    print(_heading(asked, text), flush=True)
    interrupted = _is_interrupted(job)
    if interrupted:
        print(f"interrupted; {len(job.lines)} of {len(asked.rows)} rows finished", file=sys.stderr)
    if job.lines:
        with held_back() as raise_if_interrupted:
            _show(asked, job.lines, text, write)
            raise_if_interrupted()
    return INTERRUPTED if interrupted else 0


def _files(asked: Options) -> tuple[str, ...]:
    return (picture.NAME,) if asked.out is None else FILES


def _show(asked: Options, lines: Sequence[Line], text: Corpus, write: Callable[[Write], None]) -> None:
    """Files first: they must not be lost if the reader of stdout has gone. The table comes even if the disk is full."""
    try:
        write(lambda unfinished: _write_files(unfinished, asked, lines, text))
    finally:
        print(f"\n{table(asked.optimizers, lines)}\n\n{_footing(asked, text)}", flush=True)
    if asked.out is None:
        print(f"Picture: {picture.NAME}", flush=True)
    else:
        print(f"Figures and numbers in {str(asked.out)!r}: {', '.join(FILES)}", flush=True)


def _is_interrupted(job: Job) -> bool:
    try:
        job.run()
    except KeyboardInterrupt:
        return True
    return False


def _write_files(where: Path, asked: Options, lines: Sequence[Line], text: Corpus) -> None:
    guess = _bits_of_a_guess(text)
    picture.write_picture(where / picture.NAME, asked.optimizers, lines, guess)
    if asked.out is None:
        return
    trained = runs(asked.optimizers, lines)
    figures.write_losses(where / "loss.png", trained, guess)
    figures.write_norms(where / "norm.png", trained)
    csv_files.write_table(where / "table.csv", trained)
    csv_files.write_steps(where / "steps.csv", trained)


def _listing() -> str:
    width = max(map(len, ROWS))
    return "\n".join(f"{row.name:{width}}  {row.shown}" for row in ROWS.values())


def _heading(asked: Options, text: Corpus) -> str:
    characters = len(text.train) + len(text.held_out)
    optimizers = " and ".join(
        f"{each.shown} (learning rate {each.learning_rate:g})" for each in asked.optimizers.values()
    )
    return (
        f"Text:  {text.name}, {characters:,} characters\n"
        f"Model: {asked.model.shown}, seed {asked.seed}, on {jax.default_backend()}\n"
        f"Runs:  {asked.steps} steps of {optimizers}"
    )


def _footing(asked: Options, text: Corpus) -> str:
    return (
        f"Bits per character of the last tenth of the text; guessing takes {_bits_of_a_guess(text):.3f}.\n"
        "Clipped: the share of the finite steps that were clipped or skipped.\n"
        f"Time: a step of {next(iter(asked.optimizers.values())).shown}, relative to a step without clipping, "
        f"median of {ROUNDS} pairs."
    )


def _bits_of_a_guess(text: Corpus) -> float:
    return math.log2(len(text.alphabet))
