"""What `python -m optaxclip advise` does: from a CSV file of norms to a summary, advice, and a figure."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from optaxclip import diagnostics
from optaxclip.demo import memory
from optaxclip.demo.ending import InputError
from optaxclip.demo.folder import folder
from optaxclip.demo.options import COMMAND, Parser, path
from optaxclip.diagnostics import Advice, Summary
from optaxclip.diagnostics.plots import require_matplotlib

NAME = "advise"
FIGURE = "advice.png"
ROUND = (1, 2, 5)  # candidate bounds are these, times powers of ten
BYTES = 160  # of memory that are needed for each byte of the file
FEW = 3  # decades about the median that the table covers at most, half of them below


class Asked(argparse.Namespace):
    """What was asked for.

    Attributes:
      norms: the CSV file.
      clipper: whose steps in it are meant; None if it has those of one only.
      out: the folder for the figure; None if none is wanted.
    """

    norms: Path
    clipper: str | None
    out: Path | None


def run(argv: Sequence[str]) -> int:
    """Prints what a history of norms looks like, and which clipper it speaks for.

    Args:
      argv: the arguments after `advise`.

    Returns:
      The exit code 0.

    Raises:
      InputError: if the input is wrong.
    """
    asked = _parser().parse_args(argv, Asked())
    try:
        memory.require_file(asked.norms, BYTES)
        norms = diagnostics.read_csv(asked.norms, clipper=asked.clipper)
        advice = diagnostics.advise(norms)
        if asked.out is None:
            print(_report(norms, advice))
        else:
            _write(norms, advice, asked.out)
    except (ValueError, ImportError) as error:
        raise InputError(str(error)) from error
    return 0


def _report(norms: np.ndarray, advice: Advice) -> str:
    """Summary, candidate bounds and advice, as plain text."""
    found = diagnostics.summary(norms)
    return "\n\n".join([_summary(found), _candidates(found, advice.bound), _advice(advice)])


def _parser() -> Parser:
    made = Parser(
        prog=f"{COMMAND} {NAME}",
        description="Says which clipper, with which bound, a recorded history of gradient norms speaks for.",
        allow_abbrev=False,
    )
    made.add_argument(
        "norms",
        type=path,
        metavar="norms.csv",
        help="the norms before the clip, one step per line: the steps.csv of python -m optaxclip --out, a file with a "
        "column norm, clip_norm, grad_norm or global_norm, or one with a single column; all with a header",
    )
    made.add_argument("--clipper", metavar="NAME", help="whose steps are meant, where the column row has several")
    made.add_argument("--out", type=path, metavar="DIR", help=f"write {FIGURE} to this folder (nothing)")
    return made


def _write(norms: np.ndarray, advice: Advice, out: Path) -> None:
    """Draws, then prints: nothing is printed where matplotlib is missing or the folder can't be written to."""
    require_matplotlib()
    write = folder(out, (FIGURE,))
    write(lambda unfinished: diagnostics.plot(norms, unfinished / FIGURE, bound=advice.bound))
    print(f"{_report(norms, advice)}\n\nFigure: {FIGURE} in {str(out)!r}")


def _summary(found: Summary) -> str:
    rows = {
        "steps": f"{found.steps}, of which {found.nonfinite} not finite, {found.zeros} zero",
        "norms": ", ".join(f"{_percentile(at)} {norm:.3g}" for at, norm in found.percentiles.items()),
        "tail index": _tail(found),
        "spikes": _spikes(found),
        "drift": "too few norms" if math.isnan(found.drift) else f"{found.drift:.3g}, last quarter to first",
    }
    return "\n".join(f"{name + ':':12}{value}" for name, value in rows.items())


def _percentile(at: float) -> str:
    return {50.0: "median", 100.0: "largest"}.get(at, f"{at:g} %")


def _tail(found: Summary) -> str:
    if math.isnan(found.tail_index):
        return "too few norms"
    low, high = found.tail_interval
    return f"{found.tail_index:.3g}, 95 % interval {low:.3g} to {high:.3g}, from the {found.tail_count} largest norms"


def _spikes(found: Summary) -> str:
    if not found.spikes:
        return "none"
    first = ", ".join(map(str, found.spikes[:10]))
    more = ", ..." if len(found.spikes) > 10 else ""
    return f"{len(found.spikes)} ({len(found.spikes) / found.steps:.1%} of the steps), in step {first}{more}"


def _candidates(found: Summary, bound: float | None) -> str:
    """The share of steps that each of a few round bounds would have clipped."""
    bounds = sorted({*_round_bounds(found), *([] if bound is None else [bound])})
    lines = [f"{each:>10g}  {found.clipped_share(each):>13.1%}{'  <' if each == bound else ''}" for each in bounds]
    return "\n".join([f"{'bound':>10}  {'steps clipped':>13}", f"{'-' * 10}  {'-' * 13}", *lines])


def _round_bounds(found: Summary) -> list[float]:
    """1, 2 and 5 times powers of ten, from the first percentile to the 99th, near the median where that is too many."""
    low, median, high = (found.percentiles[at] for at in (1.0, 50.0, 99.0))
    if not median > 0:  # there is none
        return []
    half = 10 ** (FEW / 2)
    low, high = max(low, median / half), min(high, median * half)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    bounds = [digit * 10.0**exponent for exponent in exponents for digit in ROUND]
    first = max((each for each in bounds if each <= low), default=low)
    last = min((each for each in bounds if each >= high), default=high)
    return [each for each in bounds if first <= each <= last]


def _advice(advice: Advice) -> str:
    heading = "Advice" if advice.tells else "The history does not tell; to start with"
    return "\n".join([f"{heading}: {advice.method}", *(f"- {reason}" for reason in advice.reasons)])
