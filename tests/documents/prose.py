"""Counts the words of the documentation: per page, per sentence, and those that we avoid.

    python -m tests.documents.prose                 all pages and notebooks, the longest sentence of each
    python -m tests.documents.prose README.md

`test_prose` holds the pages of LIMITS to their limits. Code, tables and formulas count as no words. A table's cells are
searched for the words that we avoid, too.
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Limits(NamedTuple):
    """What a page may have at most. None is no limit."""

    words: int | None = None
    sentence: int | None = None  # words in one sentence
    lines: int | None = None  # of the file


# The first pattern that fits a file is its limit.
LIMITS = {
    "README.md": Limits(words=1000, sentence=35, lines=130),
    "notebooks/guides/*.md": Limits(words=1200, sentence=35),
    "notebooks/*.md": Limits(words=1500, sentence=35),
    "notebooks/*.ipynb": Limits(words=1500, sentence=35),
    "optaxclip/contrib/README.md": Limits(words=1500, sentence=35),
    "tests/benchmarks/README.md": Limits(sentence=35),  # tables, with what they say
    "CONTRIBUTING.md": Limits(words=1500, sentence=35),
    "SECURITY.md": Limits(words=200, sentence=35),
}

AVOIDED = re.compile(
    r"\b(besides|likewise|for ever|dear|mend|so many|of what \w+ adds|that is what|but for|or is there none"
    r"|is of no use|lets one see|as it came|comes to lie)\b",
    re.IGNORECASE,
)
ABBREVIATIONS = re.compile(r"\b(e\.g|i\.e|et al|vs|cf|fig|sec|no)\.", re.IGNORECASE)


def limited() -> dict[Path, Limits]:
    """The files that have limits, each with those of the first pattern that fits it."""
    files = {file: limits for pattern, limits in reversed(LIMITS.items()) for file in ROOT.glob(pattern)}
    return dict(sorted(files.items()))


def markdown_of(file: Path) -> str:
    """The text of a page, or of the Markdown cells of a notebook."""
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".ipynb":
        return text
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
    return "\n\n".join("".join(cell["source"]) for cell in cells)


def paragraphs(markdown: str) -> Iterator[str]:
    """Headings, paragraphs and entries of lists, each on one line, without markup."""
    markdown = re.sub(r"^(`{3,}|~{3,})[^\n]*\n.*?^\1[ \t]*$", "\n", markdown, flags=re.DOTALL | re.MULTILINE)
    markdown = re.sub(r"\A---\n.*?\n---\n|<!--.*?-->|\$\$.*?\$\$", "\n", markdown, flags=re.DOTALL)
    markdown = re.sub(r"^(:{3,}.*|:[\w-]+: .*|---+|[ \t]*\|.*)$", "\n", markdown, flags=re.MULTILINE)
    markdown = re.sub(r"^\s*(?:[-*+]|\d+\.|#+|:|>) ", "\n", markdown, flags=re.MULTILINE)
    for block in re.split(r"\n\s*\n", markdown):
        if text := " ".join(_plain(block).split()):
            yield text


def cells(markdown: str) -> Iterator[str]:
    """The texts in tables."""
    for row in re.findall(r"^\s*\|(.*)\|\s*$", markdown, flags=re.MULTILINE):
        yield from (_plain(cell).strip() for cell in row.split(" | "))


def _plain(text: str) -> str:
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"\{[\w:]+\}`([^`]*)`", r"\1", text)
    text = re.sub(r"`[^`]*`", "code", text)  # a call with ten arguments is one word
    return re.sub(r"\$[^$]*\$", "formula", text)


def words(text: str) -> list[str]:
    """What one reads as words: numbers are, dashes and signs are not."""
    return re.findall(r"[^\s*_()\[\]]*\w[^\s]*", text)


def sentences(paragraph: str) -> list[str]:
    """The sentences of a paragraph; neither a number's point nor that of "e.g." ends one."""
    paragraph = ABBREVIATIONS.sub(lambda found: found[0].replace(".", ""), paragraph)
    return [each for each in re.split(r"(?<=[.!?])[*_\")]*\s+(?=\W*[A-Z0-9a-z])", paragraph) if words(each)]


class Counted(NamedTuple):
    """What a file has."""

    words: int
    lines: int
    longest: str
    avoided: list[str]


def counted(file: Path) -> Counted:
    """Counts a file."""
    markdown = markdown_of(file)
    texts = list(paragraphs(markdown))
    longest = max((each for text in texts for each in sentences(text)), key=lambda each: len(words(each)), default="")
    avoided = [_quote(found) for text in (*texts, *cells(markdown)) for found in AVOIDED.finditer(text)]
    return Counted(sum(len(words(text)) for text in texts), markdown.count("\n"), longest, avoided)


def _quote(found: re.Match[str]) -> str:
    start, end = max(0, found.start() - 40), found.end() + 40
    return f"{found[0]}: ...{found.string[start:end]}..."


def main() -> None:
    """Prints what the pages have."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    given = parser.parse_args().files
    print("words  lines  longest sentence")
    for file in [each.resolve() for each in given] or limited():
        page = counted(file)
        print(
            f"{page.words:5}  {page.lines:5}  {len(words(page.longest)):2} in {file.relative_to(ROOT)}: {page.longest}"
        )
        for each in page.avoided:
            print(f"              avoid {each}")


if __name__ == "__main__":
    main()
