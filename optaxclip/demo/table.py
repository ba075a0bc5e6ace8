"""The table that is printed, as plain text."""

import math
from collections.abc import Sequence

from optaxclip.demo.training import Result

HEADER = ("clipper", "bits per character", "non-finite steps", "steps clipped")


def table(results: Sequence[tuple[str, Result]]) -> str:
    """A line per result, columns aligned: the names on the left, the numbers on the right."""
    lines: list[tuple[str, ...]] = [HEADER, *((shown, *_cells(result)) for shown, result in results)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join(_aligned(line, widths) for line in lines)


def _cells(result: Result) -> tuple[str, str, str]:
    share = "-" if result.clipped_share is None else f"{result.clipped_share:.1%}"
    return _bits(result.bits), str(result.nonfinite_steps), share


def _bits(bits: float) -> str:
    if not math.isfinite(bits):
        return "lost"
    return f"{bits:.3f}" if bits < 1000 else f"{bits:.1e}"


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (
        cell.rjust(width) if number else cell.ljust(width)
        for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join((first, *others))
