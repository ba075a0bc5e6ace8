"""Reads a history of norms from an array, or from the record in an optimizer's state."""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import numpy as np

from optaxclip._arguments import checks
from optaxclip._arrays.trees import Tree
from optaxclip.records import reader
from optaxclip.records.reader import KEPT, Recorded

LAST = "last"  # a value of `history`: the last steps. The other one is `KEPT`
ONE_GROUP = ("",)  # a single norm has no path


class History(NamedTuple):
    """Norms over the steps, of one group or several.

    Attributes:
      steps: integers of shape (n,), counted from 1.
      norms: floats of shape (n, G).
      groups: the paths of the groups; None if a record does not know them.
      leaves: the paths of the measured leaves; empty if they are unknown.
      limits: the limits of the clipper that recorded the norms, of the same shape; None without a record.
      scales: the factors of that clipper, of the same shape; None without a record.
    """

    steps: np.ndarray
    norms: np.ndarray
    groups: tuple[str, ...] | None = ONE_GROUP
    leaves: tuple[str, ...] = ()
    limits: np.ndarray | None = None
    scales: np.ndarray | None = None


def history_of(norms: Tree, place: str, history: str) -> History:
    """Returns a history from a vector of norms, or from the record in a state.

    Args:
      norms: a vector of norms, or a state.
      place: which record, as in `from_state`.
      history: which of its steps, as in `from_state`.

    Raises:
      ValueError: if `norms` is neither, or if `place` or `history` do not fit.
    """
    if not reader.is_recorded(norms):
        vector = _as_measured(norms)
        _require_choice(place, history)
        if place or history != LAST:
            raise ValueError(
                f"place={place!r} and history={history!r} choose from a state, but norms is a vector: leave them out"
            )
        return History(np.arange(1, len(vector) + 1), vector[:, None])
    record = _record_at(norms, place, history)
    number = record.norm.shape[1]
    groups = ONE_GROUP if number == 1 else record.names.groups
    return History(record.steps, record.norm, groups, record.names.leaves, record.limit, record.scale)


def _as_measured(norms: Tree) -> np.ndarray:
    """Returns a vector in the dtype of a clipper's norms: float64 for float64 leaves, else float32."""
    vector = checked(norms)
    is_wide = np.asarray(norms).dtype == np.float64 and jax.dtypes.canonicalize_dtype(np.float64) == np.float64
    info = np.finfo(np.float64 if is_wide else np.float32)
    # Like a measured norm: finite ones are at most the largest float, and 0 below the smallest normal one.
    in_range = np.where(np.isinf(vector), vector, np.minimum(vector, float(info.max)))
    return np.where(vector < info.tiny, 0, in_range).astype(info.dtype)


def _require_choice(place: str, history: str) -> None:
    checks.text("place", place)
    checks.one_of("history", history, (LAST, KEPT))


def _record_at(opt_state: Tree, place: str, history: str) -> Recorded:
    """Returns the record at a place. If there is only one record, the place may be empty."""
    _require_choice(place, history)
    records = reader.recorded(opt_state, KEPT if history == KEPT else True)
    if not place and len(records) == 1:
        return next(iter(records.values()))
    if place not in records:
        raise ValueError(f"no record at {place!r}; place must be one of {_listed(records)}")
    return records[place]


def checked(norms: Tree) -> np.ndarray:
    """Returns a history as a float64 vector.

    Raises:
      ValueError: if it is no vector, not real, or has a negative number in it.
    """
    try:
        # `np.asarray(optax.EmptyState())` would be an empty vector of norms.
        history = np.empty((), object) if hasattr(norms, "_fields") else np.asarray(norms)
    except (TypeError, ValueError):
        history = np.empty((), object)  # a tree of arrays or a key, refused below
    if history.ndim != 1 or not (history.dtype.kind in "fiu" or history.dtype.name == "bfloat16"):
        raise ValueError(
            f"norms must be a vector of real numbers, got shape {history.shape} of {history.dtype}; "
            "diagnostics.from_state(opt_state) reads them from the state of a clipper that was built with record="
        )
    history = history.astype(np.float64)
    if (history < 0).any():
        place = int(np.argmax(history < 0))
        raise ValueError(f"norms must be at least 0, got {history[place]:g} in step {place + 1}")
    return history


def from_state(opt_state: Tree, *, place: str = "", group: str = "", history: str = LAST) -> np.ndarray:
    """Returns the norms that a clipper with `record=k` has in an optimizer's state: up to k steps, oldest first.

    They are measured before the clip, so the clip does not hide spikes. `clip_by_global_norm(math.inf, record=k)`
    records the global norm and clips nothing.

    Args:
      opt_state: the state of any chain, wrapper or nesting of these.
      place: which record, if there are several: the start of its keys in `clip_stats`, "0" for "0/clip_norm".
      group: the path of one group, for example of a leaf, if the record has several.
      history: "last" (the default) for the last steps; "first_nonfinite" for the steps up to the first non-finite one,
        and a few after it, however long ago it was.

    Returns:
      A vector of up to k floats.

    Raises:
      ValueError: if there is no record, or if there are several and `place` or `group` does not name one of them.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.clip_by_global_norm(1.0, record=100)
      >>> update, state = jax.jit(tx.update), tx.init(jnp.zeros(2))
      >>> for grads in ([0.3, 0.4], [3.0, 4.0]):
      ...     _, state = update(jnp.array(grads), state)
      >>> print(optaxclip.diagnostics.from_state(state))
      [0.5 5. ]

    See also:
      `clip_stats`, for the rest of the record; `summary`, `replay` and `plot`.

      Notebook: `notebooks/choosing_a_threshold.ipynb`, how to choose a bound.
    """
    checks.text("group", group)
    record = _record_at(opt_state, place, history)
    number = record.norm.shape[1]
    if not group and number == 1:
        return record.norm[:, 0]
    groups = [record.names.group(i) for i in range(number)] if record.names.groups != ONE_GROUP else []
    if group not in groups:
        raise ValueError(
            f"no group {group!r} in this record; group must be one of {_listed(groups)}, or record the global norm"
        )
    return record.norm[:, groups.index(group)]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def ordinary(history: np.ndarray) -> np.ndarray:
    """Returns which steps have a norm that is finite and positive."""
    return np.isfinite(history) & (history > 0)


def ordinary_norms(history: np.ndarray) -> np.ndarray:
    """Returns the norms that are finite and positive, in order."""
    return history[ordinary(history)]
