"""The folder for figures and numbers: a file in it is whole, or it is not there, and no folder is left empty."""

import contextlib
import tempfile
from collections.abc import Callable, Generator, Iterable
from pathlib import Path

from optaxclip.demo.ending import InputError, OutputError
from optaxclip.demo.interrupts import cleaned_up

Write = Callable[[Path], None]


class FolderError(InputError):
    """Nothing can be written there; the message says why."""


class WriteError(OutputError):
    """The files could not be written after all; the message says why."""


def folder(path: Path, names: Iterable[str]) -> Callable[[Write], None]:
    """Checks that files can be written to a folder. One that does not exist is made only when they are written.

    Args:
      path: where; parents that are missing are made.
      names: of the files that will be written.

    Returns:
      A function that writes files: it calls its argument with another folder, empty and on the same disk, and moves
      what is in there when it returns. Older files of the same names are replaced. It raises WriteError if that is not
      possible.

    Raises:
      FolderError: if nothing can be written there.
    """
    with _explained(path, FolderError), _made(path):
        for name in names:
            if (path / name).is_dir():
                raise FolderError(f"cannot write {str(path / name)!r}: it is a folder")
    return lambda write: _write(path, write)


def _write(path: Path, write: Write) -> None:
    with _explained(path, WriteError), _made(path) as unfinished:
        write(unfinished)
        for file in sorted(unfinished.iterdir()):
            file.replace(path / file.name)


@contextlib.contextmanager
def _made(path: Path) -> Generator[Path, None, None]:
    """The folder, and in it an empty one, which goes away again. So does all that is new and still empty."""
    if path.exists() and not path.is_dir():
        raise FolderError(f"cannot write to {str(path)!r}: it is not a folder")
    missing = [each for each in (path, *path.parents) if not each.exists()]
    with cleaned_up():
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path, prefix=".unfinished-") as unfinished:
                yield Path(unfinished)
        finally:
            for each in missing:
                with contextlib.suppress(OSError):
                    each.rmdir()  # refuses unless it is empty


@contextlib.contextmanager
def _explained(path: Path, kind: type[Exception]) -> Generator[None, None, None]:
    try:
        yield
    except OSError as error:
        raise kind(f"cannot write to {str(path)!r}: {error.strerror or error}") from error
