"""What programs found, in files: one per program, written whole as soon as it is finished, and read again later."""

import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import optaxclip
from optaxclip.demo.ending import InputError
from optaxclip.demo.folder import Write
from tests.benchmarks.sweep.methods import Method
from tests.benchmarks.sweep.programs import Outcome
from tests.benchmarks.sweep.tasks import Task


class ResultsError(InputError):
    """A file can't be used; the message says why."""


class Settings(NamedTuple):
    """On what the numbers depend, beside task and method. A rerun must have the same.

    Attributes:
      rates: the learning rates.
      seeds: how many seeds.
      steps: of each run.
      versions: of what computed them.
    """

    rates: list[float]
    seeds: int
    steps: int
    versions: str


def settings(rates: Sequence[float], seeds: int, steps: int) -> Settings:
    """The settings here and now."""
    bits = 8 * jax.dtypes.canonicalize_dtype(float).itemsize
    versions = (
        f"optaxclip {optaxclip.__version__}, optax {optax.__version__}, jax {jax.__version__}, "
        f"NumPy {np.__version__}, Python {platform.python_version()}, {jax.default_backend()}, {bits} bits"
    )
    return Settings(list(rates), seeds, steps, versions)


def file_name(task: Task, method: Method) -> str:
    """The name of a program's file."""
    return f"{task.name}-{method.name}.json"


def save(write: Callable[[Write], None], task: Task, method: Method, used: Settings, found: Outcome) -> None:
    """Writes a program's file.

    Args:
      write: that of a `folder`.
      task: the task.
      method: the method.
      used: the settings.
      found: what came of it.
    """
    content = {"task": task.name, "method": method.shown, **used._asdict(), **_lists(found)}
    text = json.dumps(content, allow_nan=False) + "\n"
    write(lambda unfinished: _write(unfinished / file_name(task, method), text))


def load(folder: Path, task: Task, method: Method, used: Settings) -> Outcome | None:
    """What an earlier program found; None if there was none.

    Args:
      folder: where the files are.
      task: the task.
      method: the method.
      used: the settings that it must have had.

    Raises:
      ResultsError: if it had others, or the file is none of ours.
    """
    path = folder / file_name(task, method)
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        before = Settings(*(content[field] for field in Settings._fields))
        found = Outcome(*(_array(content[field]) for field in Outcome._fields))
        shown = content["method"]
        if any(array is not None and array.shape != (len(before.rates), before.seeds) for array in found):
            raise ValueError
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ResultsError(f"cannot read {str(path)!r}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ResultsError(f"{str(path)!r} is no result of a sweep: delete it, or choose another --out") from error
    if (shown, before) != (method.shown, used):
        raise ResultsError(
            f"{str(path)!r} has other settings ({_difference(before, used) or shown}): "
            "repeat those, choose another --out, or delete the folder"
        )
    return found


def _difference(before: Settings, used: Settings) -> str:
    pairs = zip(Settings._fields, before, used, strict=True)
    return ", ".join(f"{name} {was}, now {now}" for name, was, now in pairs if was != now)


def _lists(found: Outcome) -> dict[str, Any]:
    """As lists; null where a number is not finite, which JSON has no word for."""

    def finite(row: np.ndarray) -> list[float | None]:
        return [float(each) if np.isfinite(each) else None for each in row]

    return {
        name: None if array is None else [finite(row) for row in array]
        for name, array in zip(Outcome._fields, found, strict=True)
    }


def _array(rows: Any) -> Any:
    return None if rows is None else np.array(rows, np.float64)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
