"""Matches the parts of an old state with those of a new one."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from optaxclip.migration.carrying import Carried, carried
from optaxclip.migration.parts import Part, Path


class Match(NamedTuple):
    """What a new part gets from an old one.

    Attributes:
      new: the new part.
      old: the old part.
      kept: what it gets, by the path inside.
    """

    new: Part
    old: Part
    kept: dict[Path, Carried]


def matches(new: Sequence[Part], old: Sequence[Part], per_parameter: Callable[[Part], bool]) -> list[Match]:
    """Matches parts of the same type, each at most once, then the states of parameters that moved to another part.

    The order of the parts is kept as far as possible, because the place in a chain says what passes through a part.

    Args:
      new: the parts of the new state.
      old: the parts of the old state.
      per_parameter: whether a part has arrays per parameter.
    """
    pairs = {(i, j): match for i, one in enumerate(new) for j, other in enumerate(old) if (match := _match(one, other))}
    worth = {pair: _worth(match, len(pairs) + 1, per_parameter) for pair, match in pairs.items()}
    chosen = dict(_in_order(worth, len(new), len(old)))
    for i, part in enumerate(new):
        # A part that moved past another one sees other norms. Its statistics do not fit any more, but moments and
        # counts do.
        free = [j for j in range(len(old)) if (i, j) in pairs and j not in chosen.values()]
        if i not in chosen and free and (per_parameter(part) or not _has_arrays(part)):
            chosen[i] = max(free, key=lambda j, i=i: worth[i, j])
    found = [pairs[pair] for pair in sorted(chosen.items())]
    return found + _of_moved_parameters(new, old, found)


def _match(new: Part, old: Part) -> Match | None:
    """Returns what one part gets from another; None if their types differ, or nothing that matters fits."""
    is_same_type = type(new.node) is type(old.node) if old.is_typed else new.fields == old.fields
    if not is_same_type or new.role != old.role:
        return None
    if new.node is None and new.keys != old.keys:
        return None  # a single array is known by its place
    kept = carried(new.node, new, old)
    matter = [path for path, leaf in new.leaves.items() if len(path) > 1 or np.ndim(leaf)] or list(new.leaves)
    return Match(new, old, kept) if any(path in kept for path in matter) else None


def _worth(match: Match, base: int, per_parameter: Callable[[Part], bool]) -> int:
    """Rates a match: most important is that it keeps something per parameter, least that nothing changes."""
    is_whole = len(match.kept) == len(match.new.leaves) == len(match.old.leaves)
    is_copy = is_whole and not any(one.note for one in match.kept.values())
    digits = (per_parameter(match.new), True, match.new.keys == match.old.keys, is_copy)
    return sum(digit * base**power for power, digit in enumerate(reversed(digits)))


def _in_order(worth: dict[tuple[int, int], int], rows: int, columns: int) -> list[tuple[int, int]]:
    """Returns the pairs (i, j) that increase in both indices and are worth most together: a sequence alignment."""
    best = [[0] * (columns + 1) for _ in range(rows + 1)]
    for i in reversed(range(rows)):
        for j in reversed(range(columns)):
            both = worth[i, j] + best[i + 1][j + 1] if (i, j) in worth else 0
            best[i][j] = max(best[i + 1][j], best[i][j + 1], both)
    chosen: list[tuple[int, int]] = []
    i = j = 0
    while i < rows and j < columns:
        if (i, j) in worth and best[i][j] == worth[i, j] + best[i + 1][j + 1]:
            chosen.append((i, j))
            i, j = i + 1, j + 1
        elif best[i][j] == best[i + 1][j]:
            i += 1
        else:
            j += 1
    return chosen


def _has_arrays(part: Part) -> bool:
    return any(np.ndim(leaf) for leaf in part.leaves.values())


def _of_moved_parameters(new: Sequence[Part], old: Sequence[Part], found: Sequence[Match]) -> list[Match]:
    """Matches per-parameter states that were in another part of the same type: their parameters have another label now.

    A part that is entirely new gets the old counts, too, because moments and their count belong together.
    """
    missing = {part: set(part.leaves) for part in new}
    unused = {part: set(part.leaves) for part in old}
    for match in found:
        missing[match.new] -= set(match.kept)
        unused[match.old] -= set(match.kept)
    is_matched = {match.new for match in found}
    moved: list[Match] = []
    for part in new:
        for other in old:
            shared = {path for path in missing[part] & unused[other] if len(path) > 1}
            match = _match(part, other) if shared else None
            if match is None or not (taken := {path: match.kept[path] for path in shared & set(match.kept)}):
                continue
            if part not in is_matched:
                is_matched.add(part)
                taken |= {path: one for path, one in match.kept.items() if len(path) == 1}
            missing[part] -= set(taken)
            unused[other] -= set(taken)
            moved.append(Match(part, other, taken))
    return moved
