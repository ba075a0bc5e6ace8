"""Tables as plain text."""

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows below a header, columns aligned: the names on the left, the numbers on the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * width for width in widths]
    return "\n".join(aligned(line, widths) for line in (header, rule, *rows))


def aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    """A line: the first cell on the left of its column, the others on the right."""
    first, *others = (
        cell.rjust(width) if number else cell.ljust(width)
        for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join((first, *others))
