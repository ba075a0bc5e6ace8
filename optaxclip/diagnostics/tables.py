"""Formats tables as plain text."""

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Formats rows below a header in aligned columns: names on the left, numbers on the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * width for width in widths]
    return "\n".join(aligned(line, widths) for line in (header, rule, *rows))


def aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Formats a line: the first cell aligned left, the others right."""
    first, *others = (
        cell.rjust(width) if number else cell.ljust(width)
        for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join((first, *others))
