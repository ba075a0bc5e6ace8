"""Replays the norms of a run through other clippers."""

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from optaxclip._arrays.trees import Tree
from optaxclip.diagnostics.clippers import Clipper, named, permitted
from optaxclip.diagnostics.histories import LAST, ONE_GROUP, History, history_of
from optaxclip.diagnostics.summaries import is_spike
from optaxclip.diagnostics.tables import table

SHOWN_SPIKES = 8  # the largest ones, one row each
OPEN_LOOP = "Open loop: these are the norms of the run as it was.\nAnother clipper would have changed the later ones."


class Replayed(NamedTuple):
    """What one clipper would have done, in arrays with the shape of the norms.

    Attributes:
      limit: the upper end of the band in each step: larger norms would have been clipped. inf if there is no bound.
      norm_after: the norm after the clip.
      clipped: whether the norm would have been scaled.

    See also:
      `replay`.
    """

    limit: np.ndarray
    norm_after: np.ndarray
    clipped: np.ndarray

    @property
    def clipped_share(self) -> float:
        """Returns the share of all steps in which some group would have been scaled; NaN without steps."""
        if not len(self.clipped):
            return math.nan
        return float(np.mean(self.clipped.reshape(len(self.clipped), -1).any(axis=1)))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Replay:
    """What `replay` found. It prints as a table.

    Attributes:
      steps: the steps, counted from 1.
      norms: the norms before the clip: one per step, or one per step and group.
      groups: the paths of the groups, one per column of the norms; ("",) for a single norm.
      spikes: which norms are spikes within their group, as `summary` defines them. It has the shape of the norms.
      clippers: the `Replayed` of each clipper, by name.

    See also:
      `replay`.
    """

    steps: np.ndarray
    norms: np.ndarray
    groups: tuple[str, ...]
    spikes: np.ndarray
    clippers: Mapping[str, Replayed]

    def __repr__(self) -> str:
        """Returns a table with a line per clipper, and one with a line per spike."""
        parts = [f"{_heading(self)}\n{OPEN_LOOP}", _table_of_clippers(self)]
        return "\n\n".join(parts + ([_table_of_spikes(self)] if self.spikes.any() else []))


def replay(norms: Tree, *clippers: Clipper, place: str = "", history: str = LAST, **named_clippers: Clipper) -> Replay:
    """Replays recorded norms through clippers: the limits, the norms after the clip, and the share clipped.

    The loop is open: the norms are those of the recorded run. With another clipper the parameters would have been
    different, and so would the later norms. Each clipper starts from its initial state, as in a new run. Its limits are
    those of the transformation itself, bit for bit.

    Args:
      norms: a history of norms, a vector or list, one per step; or an optimizer's state with the record of a clipper.
      *clippers: clippers made by `clip_by` or a method built on it, such as `zclip()`. The result calls them
        "clipper 1" and so on.
      place: which record of the state, as in `from_state`.
      history: which of its steps, as in `from_state`.
      **named_clippers: clippers with a name for the result.

    Returns:
      A `Replay`, which prints as a table.

    Raises:
      ValueError: if `norms` is neither a history nor a state with a record, if there is no clipper, or if a clipper was
        not made by `clip_by`, needs parameters, or measures other groups than those of the norms.

    Example:
      >>> import optaxclip
      >>> from optaxclip import diagnostics
      >>> norms = [1.0] * 30 + [50.0] + [1.0] * 9
      >>> found = diagnostics.replay(norms, fixed=optaxclip.clip_by_global_norm(2.0), zclip=optaxclip.zclip())
      >>> print(found)
      Steps 1 to 40.
      Open loop: these are the norms of the run as it was.
      Another clipper would have changed the later ones.
      <BLANKLINE>
      clipper  clipped  median limit  largest before  largest after
      -------  -------  ------------  --------------  -------------
      fixed       2.5%             2              50              2
      zclip       2.5%             1              50              1
      <BLANKLINE>
      Spikes, and what would have become of them:
      step  norm  fixed  zclip
      ----  ----  -----  -----
      31      50      2      1

    Notes:
      - Groups: a vector has one group, so each clipper must measure one norm. A record with several groups, one per
        leaf or label, fits clippers that measure the same groups.
      - Edge cases: norms that are 0, infinite or NaN pass unchanged, as they do in a run. If the threshold follows the
        norms, the limit of such a step has no effect. `replay` can't tell whether the clipper would have measured the
        same norms: a clipper by 1-norms accepts 2-norms.
      - Cost: one `jax.lax.scan` per clipper over all steps, which is compiled in every call.

    See also:
      `plot`, for the same as a figure; `summary`, for the norms alone.

      Notebooks: `notebooks/choosing_a_threshold.ipynb`, how to choose a bound; `notebooks/programs.ipynb`, on the norms
      of three programs.
    """
    made_of = named(clippers, named_clippers)
    if not made_of:
        raise ValueError("clippers must be at least one, as in replay(norms, zclip=optaxclip.zclip())")
    given = history_of(norms, place, history)
    done = {name: Replayed(*map(_shaped, permitted(name, each, given))) for name, each in made_of.items()}
    groups = given.groups or ()
    return Replay(given.steps, _shaped(given.norms), groups, _shaped(spikes_of(given)), MappingProxyType(done))


def _shaped(columns: np.ndarray) -> np.ndarray:
    """Drops the axis of groups if there is only one."""
    return columns[:, 0] if columns.shape[1] == 1 else columns


def spikes_of(history: History) -> np.ndarray:
    """Returns which norms of each group are spikes."""
    return np.stack([is_spike(column.astype(np.float64)) for column in history.norms.T], axis=1)


# As text.


def _heading(found: Replay) -> str:
    if not len(found.steps):
        return "No steps."
    groups = "" if found.groups == ONE_GROUP else f", {len(found.groups)} groups"
    lost = int((~np.isfinite(found.norms)).reshape(len(found.steps), -1).any(axis=1).sum())
    return f"Steps {found.steps[0]} to {found.steps[-1]}{groups}" + (f"; {lost} of them not finite." if lost else ".")


def _table_of_clippers(found: Replay) -> str:
    header = ("clipper", "clipped", "median limit", "largest before", "largest after")
    rows = [
        (name, _share(done.clipped_share), _median(done.limit), _largest(found.norms), _largest(done.norm_after))
        for name, done in found.clippers.items()
    ]
    return table(header, rows)


def _table_of_spikes(found: Replay) -> str:
    """Shows the largest spikes, in their order, with the norms after each clipper."""
    spikes = np.argwhere(found.spikes.reshape(len(found.steps), -1))
    before, *after = (each.reshape(len(found.steps), -1) for each in _norms(found))
    largest = np.argsort(-before[tuple(spikes.T)], kind="stable")[:SHOWN_SPIKES]
    has_groups = found.groups != ONE_GROUP
    header = ("step", *(["group"] if has_groups else []), "norm", *found.clippers)
    rows: list[tuple[str, ...]] = []
    for step, group in spikes[np.sort(largest)]:
        sizes = (_number(float(each[step, group])) for each in (before, *after))
        rows.append((str(found.steps[step]), *([found.groups[group]] if has_groups else []), *sizes))
    more = len(spikes) - len(rows)
    shown = f"Spikes, and what would have become of them:\n{table(header, rows)}"
    return shown + (f"\nand {more} smaller ones" if more else "")


def _norms(found: Replay) -> list[np.ndarray]:
    """Returns the norms before any clip, and after each clipper."""
    return [found.norms, *(done.norm_after for done in found.clippers.values())]


def _share(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1%}"


def _median(values: np.ndarray) -> str:
    return _number(float(np.median(values))) if values.size else "-"


def _largest(values: np.ndarray) -> str:
    finite = values[np.isfinite(values)]
    return _number(float(finite.max())) if finite.size else "-"


def _number(value: float) -> str:
    return f"{value:.3g}"
