"""Where a history of norms comes from: an array, or the record in an optimizer's state."""

from collections.abc import Iterable

import numpy as np

from optaxclip._arguments import checks
from optaxclip._arrays.trees import Tree
from optaxclip.records.reader import clip_stats

RECORD = "clip_norm"  # what `clip_stats` calls the norms


def checked(norms: Tree) -> np.ndarray:
    """A history as a float64 vector.

    Raises:
      ValueError: if it has not one dimension, is not real, or has a negative number in it.
    """
    try:
        history = np.asarray(norms)
    except (TypeError, ValueError):
        history = np.empty((), object)  # a tree of arrays or a key, refused below
    if history.ndim != 1 or not (history.dtype.kind in "fiu" or history.dtype.name == "bfloat16"):
        raise ValueError(
            f"norms must be a vector of real numbers, got shape {history.shape} of {history.dtype}; "
            "from_state(opt_state) takes them out of an optimizer's state"
        )
    history = history.astype(np.float64)
    if (history < 0).any():
        place = int(np.argmax(history < 0))
        raise ValueError(f"norms must be at least 0, got {history[place]:g} in step {place + 1}")
    return history


def from_state(opt_state: Tree, *, place: str = "", group: str = "") -> np.ndarray:
    """The norms that a clipper with `record=` has in an optimizer's state: the last k steps, oldest first.

    They are measured before the clip, so the clip does not hide what came in. `clip_by_global_norm(math.inf, record=k)`
    records the global norm and clips nothing.

    Args:
      opt_state: the state of any chain, wrapper or nesting of these.
      place: which record is meant where there are several, as `clip_stats` leads its keys: "0" for "0/clip_norm".
      group: the path of one group, a leaf say, where the record has several.

    Returns:
      A vector of up to k floats.

    Raises:
      ValueError: if there is no record; if there are several and no such place, or several groups and no such group.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.clip_by_global_norm(1.0, record=100)
      >>> state = tx.init(jnp.zeros(2))
      >>> for grads in ([0.3, 0.4], [3.0, 4.0]):
      ...     _, state = tx.update(jnp.array(grads), state)
      >>> print(optaxclip.diagnostics.from_state(state))
      [0.5 5. ]

    See also:
      `clip_stats`, for the rest of the record; `summary` and `plot`.

      Notebook: `notebooks/choosing_a_threshold.ipynb`, how to choose a bound.
    """
    checks.text("place", place)
    checks.text("group", group)
    found = clip_stats(opt_state, per_group=True, history=True)
    records = {name.removesuffix(RECORD).removesuffix("/"): each for name, each in found.items() if _is_record(name)}
    if not records:
        raise ValueError(
            "there is no record of norms in this state: build the clipper with record=k, for the last k steps"
        )
    if not place and len(records) == 1:
        place = next(iter(records))
    if place not in records:
        raise ValueError(f"no record at {place!r}; place must be one of {_listed(records)}")
    lead = f"{place}/{RECORD}/" if place else f"{RECORD}/"
    groups = {name.removeprefix(lead): each for name, each in found.items() if name.startswith(lead)}
    if not group and len(groups) < 2:
        return records[place]
    if group not in groups:
        raise ValueError(
            f"no group {group!r} in this record; group must be one of {_listed(groups)}, or record the global norm"
        )
    return groups[group]


def _is_record(name: str) -> bool:
    return name == RECORD or name.endswith(f"/{RECORD}")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def ordinary(history: np.ndarray) -> np.ndarray:
    """Which steps have a norm that is finite and positive."""
    return np.isfinite(history) & (history > 0)


def ordinary_norms(history: np.ndarray) -> np.ndarray:
    """The norms that are finite and positive, in order."""
    return history[ordinary(history)]
