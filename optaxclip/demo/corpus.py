"""The text: the Python language reference, which every CPython carries for `help()`."""

from typing import NamedTuple

import numpy as np


class CorpusError(Exception):
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
    return from_text("the Python language reference", "".join(topics.values()))


def from_text(name: str, text: str) -> Corpus:
    """A text as a corpus."""
    code_points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    alphabet, characters = np.unique(code_points, return_inverse=True)
    train, held_out = np.split(characters.astype(np.int32), [len(characters) * 9 // 10])
    return Corpus(name, train, held_out, "".join(map(chr, alphabet)))
