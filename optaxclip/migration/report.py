"""Describes in words what happened to the arrays of two states."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from optaxclip.migration.matching import Match
from optaxclip.migration.parts import Part, Path, Place


class Report(NamedTuple):
    """What `migrate` did, by path. A path stands for all arrays below it.

    Attributes:
      kept: paths in the new state whose arrays come from the old one, with their type, their old path if it was
        another, and what was changed.
      new: paths in the new state whose arrays come from `init`.
      dropped: paths in the old state that have no place in the new one.
    """

    kept: dict[str, str]
    new: dict[str, str]
    dropped: dict[str, str]

    def __str__(self) -> str:
        return "\n".join(line for name, found in self._asdict().items() for line in _lines(name, found))


def _lines(name: str, found: dict[str, str]) -> list[str]:
    if not found:
        return [f"{name}: nothing"]
    return [f"{name}:", *(f"  {path}: {note}" if note else f"  {path}" for path, note in found.items())]


class _Fate(NamedTuple):
    """What happened to a leaf: the list that it goes into, and the note there."""

    name: str
    note: str


def reported(new: Sequence[Place], old: Sequence[Place], found: Sequence[Match]) -> Report:
    """Returns the report on the leaves of two states and the matches of their parts."""
    kept = {(match.new, path): _note(match, path) for match in found for path in match.kept}
    used = {(match.old, path) for match in found for path in match.kept}
    unfilled = [place for place in new if place[:2] not in kept]
    after = [_Fate("kept", kept[place[:2]]) if place[:2] in kept else _Fate("new", "") for place in new]
    before = [
        _Fate("used", "") if place[:2] in used else _Fate("dropped", _other_shape(place, unfilled)) for place in old
    ]
    found_after, found_before = _gathered(new, after), _gathered(old, before)
    return Report(found_after.get("kept", {}), found_after.get("new", {}), found_before.get("dropped", {}))


def _note(match: Match, path: Path) -> str:
    moved = "" if match.new.path == match.old.path else f"from {shown(match.old.path)}"
    return ", ".join(filter(None, (moved, match.kept[path].note)))


def _other_shape(dropped: Place, unfilled: Iterable[Place]) -> str:
    """Describes a change of shape, if the new state has the same array in another shape."""
    for place in unfilled:
        is_same = place.inside == dropped.inside and place.part.fields == dropped.part.fields
        if is_same and dropped.part.node is not None and np.shape(place.leaf) != np.shape(dropped.leaf):
            return f"of shape {np.shape(dropped.leaf)}, now {np.shape(place.leaf)}"
    return ""


def _gathered(places: Sequence[Place], fates: Sequence[_Fate]) -> dict[str, dict[str, str]]:
    """Returns the lists, with one line for all leaves of a part or subtree with the same fate."""
    below: dict[Path, set[_Fate]] = {}
    for place, fate in zip(places, fates, strict=True):
        for end in range(len(place.path) + 1):
            below.setdefault(place.path[:end], set()).add(fate)
    lists: dict[str, dict[str, str]] = {}
    for place, fate in zip(places, fates, strict=True):
        path, part = place.path, place.part
        first = max(1, 0 if part.node is None else len(part.path))
        start = next((path[:end] for end in range(first, len(path)) if len(below[path[:end]]) == 1), path)
        kind = _kind(part) if start == part.path else ""
        lists.setdefault(fate.name, {})[shown(start)] = ", ".join(filter(None, (kind, fate.note)))
    return lists


def _kind(part: Part) -> str:
    return "" if part.node is None or not part.is_typed else type(part.node).__name__


def shown(path: Path) -> str:
    """Returns a path for messages."""
    return "/".join(path) or "the state"
