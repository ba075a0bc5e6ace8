"""The text: a file, or the Python language reference, which every CPython carries for `help()`."""

import platform
from pathlib import Path
from typing import NamedTuple

import numpy as np

from optaxclip.demo import memory
from optaxclip.demo.batches import SEQUENCE
from optaxclip.demo.ending import InputError

BYTES = 64  # of memory that are needed for each byte of a text
_FEWEST = 10 * SEQUENCE + 1  # the last tenth, rounded up, holds one sequence


class CorpusError(InputError):
    """There is no text to train on; the message says why."""


class Corpus(NamedTuple):
    """A text as numbers, in two parts.

    Attributes:
      name: what it is.
      train: the first nine tenths, each character as its place in the alphabet.
      held_out: the last tenth.
      alphabet: every character that occurs, sorted.
    """

    name: str
    train: np.ndarray
    held_out: np.ndarray
    alphabet: str


def language_reference() -> Corpus:
    """The Python language reference: about 465,000 characters with Python 3.11.

    Raises:
      CorpusError: if this Python was installed without it.
    """
    try:
        # Some distributions leave it out, so it can't be imported at the top.
        from pydoc_data.topics import topics  # noqa: PLC0415
    except ImportError as error:
        raise CorpusError(f"this Python has no pydoc_data.topics, the text to train on: {error}") from error
    name = f"the Python language reference of Python {platform.python_version()}"
    return from_text(name, "".join(topics.values()))


def from_file(path: Path) -> Corpus:
    """The text in a file, in UTF-8.

    Raises:
      CorpusError: if it can't be read, is something else, or is too short.
    """
    name = repr(str(path))  # quoted, so that no name can break the message's line
    memory.require_file(path, BYTES)
    try:
        text = path.read_text(encoding="utf-8-sig")  # as utf-8, but for a mark at the start that is no character
    except OSError as error:
        raise CorpusError(f"cannot read {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CorpusError(f"{name} is not UTF-8: {error.reason} at byte {error.start}") from error
    return from_text(name, text)


def from_text(name: str, text: str) -> Corpus:
    """A text as a corpus.

    Raises:
      CorpusError: if the last tenth would be too short for one sequence.
    """
    if len(text) < _FEWEST:
        raise CorpusError(
            f"{name} has {len(text)} characters; at least {_FEWEST} are needed, "
            f"so that the last tenth, which is held out, has {SEQUENCE + 1}"
        )
    code_points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    alphabet, characters = np.unique(code_points, return_inverse=True)
    train, held_out = np.split(characters.astype(np.int32), [len(characters) * 9 // 10])
    return Corpus(name, train, held_out, "".join(map(chr, alphabet)))
