"""What the records in an optimizer's state say."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optaxclip._arguments import bounds, checks
from optaxclip._arrays import states
from optaxclip._arrays.trees import Tree
from optaxclip.records.recorder import ClipStats, axes_from_bytes, decoded, excess


def clip_stats(opt_state: Tree, *, per_group: bool = False, history: bool = False) -> dict[str, Any]:
    """Reads what the clippers and skips in an optimizer's state did, as a flat dict ready to log.

    For a clipper that was built with `record=`:

    ======================  ===========================================================================================
    `clip_steps`            steps so far
    `clip_norm`             norm in the last step
    `clip_limit`            bound in the last step, the upper end of the band
    `clip_scale`            factor of the updates in the last step; 1 if they were not scaled
    `clipped_share`         share of all steps in which some group was scaled
    `nonfinite_steps`       number of steps in which some norm was infinite or NaN
    `first_nonfinite_step`  the first of these, counted from 1; 0 if there was none
    `first_nonfinite_leaf`  path of the first non-finite leaf in that step; "" if there was none
    `norm_axes`             mesh axes that the norm went over, as "data,model"; absent if it went over none
    ======================  ===========================================================================================

    With several groups, norm, limit and scale are those of the group furthest outside its band.

    For `skip_nonfinite` and `skip_spikes`:

    =====================  ============================================================================================
    `skip_steps`           steps so far
    `skipped_steps`        number of skipped steps, the sum of the three reasons
    `skipped_in_row`       number of steps skipped in a row up to now
    `skipped_nonfinite`    skipped because a gradient or the loss was infinite or NaN
    `skipped_norm`         skipped because a norm was above its threshold
    `skipped_loss`         skipped because the loss was, and no norm
    =====================  ============================================================================================

    Args:
      opt_state: the state of any chain, partition, wrapper or nesting of these. With several clippers, each key starts
        with the place that tells its clipper from the others: "0/clip_norm", "decoder/clip_norm". The same holds for
        several skips.
      per_group: whether to add norm, limit and scale of every group, as "clip_norm/<path of the group>".
      history: whether to return steps, norm, limit and scale as NumPy arrays over the recorded steps, oldest first.

    Returns:
      A dict of Python numbers and strings; empty if there is no record. In a jitted function, which can't return a
      string, a dict of scalar arrays without `first_nonfinite_leaf` and `norm_axes`.

    Raises:
      ValueError: if `per_group` or `history` is no bool, or is asked for in a jitted function; or if the states of
        several replicas are stacked in one.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optaxclip
      >>> tx = optax.chain(optaxclip.clip_by_global_norm(1.0, record=True), optax.adam(1e-3))
      >>> params = {"w": jnp.ones(2)}
      >>> state = tx.init(params)
      >>> for grads in ([0.3, 0.4], [3.0, 4.0]):
      ...     updates, state = tx.update({"w": jnp.array(grads)}, state, params)
      >>> for name, value in optaxclip.clip_stats(state).items():
      ...     print(f"{name}: {value:.1f}" if isinstance(value, float) else f"{name}: {value!r}")
      clip_steps: 2
      clip_norm: 5.0
      clip_limit: 1.0
      clip_scale: 0.2
      clipped_share: 0.5
      nonfinite_steps: 0
      first_nonfinite_step: 0
      first_nonfinite_leaf: ''

    See also:
      `ClipStats`, what is recorded; `diagnostics.from_state`, for the norms as a history.

      Notebooks: `notebooks/quickstart.ipynb`, a clipped and recorded run in twenty lines; `notebooks/recipes.ipynb`,
        logs, loops, other libraries, checkpoints.
    """
    checks.flag("per_group", per_group)
    checks.flag("history", history)
    return {
        place + name: value
        for kind in _kinds()
        for place, record in _found(opt_state, kind).items()
        for name, value in summary(record, per_group=per_group, history=history).items()
    }


@functools.singledispatch
def summary(record: Any, *, per_group: bool, history: bool) -> dict[str, Any]:
    """What `clip_stats` says of a record; each kind of record registers its own."""
    raise NotImplementedError(type(record))


def _kinds() -> list[type]:
    return [kind for kind in summary.registry if kind is not object]


def _found(opt_state: Tree, kind: type) -> dict[str, Any]:
    """The records of one kind, by what tells the place of each from the others."""

    def is_record(node: Any) -> bool:
        return isinstance(node, kind)

    flat = jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=is_record)
    records = [(path, node) for path, node in flat if is_record(node)]
    return dict(zip(_distinct([path for path, _ in records]), [_unboxed(node) for _, node in records], strict=True))


def _unboxed(record: Any) -> Any:
    """A record of arrays: Flax boxes each leaf of a state, and checkpoints return NumPy's arrays and Python numbers."""
    return states.as_arrays(type(record)(*(jax.tree.leaves(field)[0] for field in record)))


def is_traced(stats: tuple[Any, ...]) -> bool:
    """Whether a record is seen inside a jitted function."""
    return any(isinstance(leaf, Tracer) for leaf in stats)


def require_one(steps: Any, ndim: int) -> None:
    """Raises where records of several replicas are stacked."""
    if steps.ndim != ndim:
        raise ValueError("the record has leading axes; take that of one replica: jax.tree.map(lambda x: x[0], state)")


@summary.register
def _of_clips(stats: ClipStats, *, per_group: bool, history: bool) -> dict[str, Any]:
    require_one(stats.clip_steps, 1)
    if not is_traced(stats):
        stats = ClipStats(*jax.device_get(tuple(stats)))
        with np.errstate(all="ignore"):  # inf and NaN are what a record is there to show
            return _numbers(stats, np, history) | _named(stats, per_group, history)
    if per_group or history:
        raise ValueError("per_group and history need a concrete state: ask for them outside the jitted function")
    return _numbers(stats, jnp, history)


def _numbers(stats: ClipStats, xp: Any, history: bool) -> dict[str, Any]:
    """All but the names, by NumPy or by jax.numpy."""
    steps, rings = _rows(stats, xp, history)
    furthest = xp.argmax(excess(xp, *rings.values()), axis=-1)[..., None]
    taken = {name: xp.take_along_axis(ring, furthest, axis=-1)[..., 0] for name, ring in rings.items()}
    share = stats.clipped_steps / xp.maximum(stats.recorded_steps, 1)
    counts = {name: getattr(stats, name) for name in ("nonfinite_steps", "first_nonfinite_step")}
    found = {"clip_steps": steps, **taken, "clipped_share": share, **counts}
    return found if xp is jnp else {name: _plain(value) for name, value in found.items()}


def _named(stats: ClipStats, per_group: bool, history: bool) -> dict[str, Any]:
    """What only makes sense with the names, which a traced record cannot tell."""
    number = int(stats.first_nonfinite_leaf)
    found: dict[str, Any] = {"first_nonfinite_leaf": decoded(stats.leaf_names)[number] if number >= 0 else ""}
    if axes := axes_from_bytes(stats.norm_axes):
        found["norm_axes"] = axes
    groups = decoded(stats.group_names)
    if per_group and groups != [""]:  # a global norm has no path
        _, rings = _rows(stats, np, history)
        for place, group in enumerate(groups):
            found |= {f"{name}/{group}": _plain(ring[..., place]) for name, ring in rings.items()}
    return found


def _rows(stats: ClipStats, xp: Any, history: bool) -> tuple[Any, dict[str, Any]]:
    """The steps recorded, oldest first, and their rows of the rings; or the last of them alone.

    A ring that was restored into one of another length may hold rows of older steps: these do not count.
    """
    steps = stats.clip_steps
    is_recent = (steps > stats.recorded_steps - len(steps)) & (steps > 0)
    steps = xp.where(is_recent, steps, 0)
    order = xp.argsort(steps)
    rows = order[steps[order] > 0] if history else order[-1]
    rings = {name: xp.where(is_recent[:, None], getattr(stats, name), empty) for name, empty in _RINGS.items()}
    rings["clip_limit"] = _as_shown(rings["clip_limit"], xp)
    return (steps[rows] if history else stats.recorded_steps), {name: ring[rows] for name, ring in rings.items()}


_RINGS = {"clip_norm": 0.0, "clip_limit": np.inf, "clip_scale": 1.0}  # and what is in a row without a step


def _as_shown(limits: Any, xp: Any) -> Any:
    """inf where the record has the largest float, which bounds nothing."""
    return xp.where(limits >= bounds.highest(limits.dtype), np.inf, limits).astype(limits.dtype)


def _plain(value: Any) -> Any:
    """A Python number for a scalar; an array stays what it is."""
    return value if np.ndim(value) else value.item()


_WRAPPERS = ("inner_state", "inner_states", "inner_opt_state")  # fields of optax's wrappers


def _distinct(paths: list[tuple[Any, ...]]) -> list[str]:
    """What tells each path from the others, as "0/" or "decoder/"; "" if there is only one."""
    if len(paths) < 2:
        return [""] * len(paths)
    names = [[jax.tree_util.keystr((key,), simple=True) for key in path] for path in paths]
    telling = [[name for name in path if name not in _WRAPPERS] for path in names]
    names = telling if len(set(map(tuple, telling))) == len(names) else names
    for end in (0, -1):  # what all begin with, and what all end with, tells nothing
        while min(map(len, names)) > 1 and len({path[end] for path in names}) == 1:
            names = [path[1:] if end == 0 else path[:-1] for path in names]
    joined = ["/".join([*path, ""]) for path in names]
    # Keys that contain a "/" may make two the same; jax's own notation tells them apart.
    return joined if len(set(joined)) == len(joined) else [jax.tree_util.keystr(path) + "/" for path in paths]
