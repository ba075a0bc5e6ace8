"""The flight recorder: what a clipper did, and what blew up first.

Everything that `clip_by` makes takes `record=k` and then keeps, in its own state, what it measured and permitted in the
last k steps. It costs no pass over the updates: the norms are there already, and only in the first step whose norm is
not finite are the leaves searched. `clip_stats` finds the records in any optimizer state and says what is in them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from optaxclip import leaves, mesh, scaling, sums


class ClipStats(NamedTuple):
    """What a clipper measured and did. G is the number of groups: 1 for a global norm, else one per leaf or label.

    Of the units or stacked layers of one leaf, the one that is furthest beyond its limit stands for the leaf.

    Attributes:
      clip_steps: int32 of shape (k,), the step that each row of the rings belongs to, counted from 1; 0 for none yet.
      clip_norm: floats of shape (k, G), the norms.
      clip_limit: floats of shape (k, G), the upper end of the band.
      clip_scale: floats of shape (k, G), by what the group was multiplied.
      clipped_steps: int32 scalar, the number of steps in which some group was scaled.
      nonfinite_steps: int32 scalar, the number of steps in which some norm was infinite or NaN.
      first_nonfinite_step: int32 scalar, the first of these; 0 for none yet.
      first_nonfinite_leaf: int32 scalar, the first leaf that was not finite in that step; -1 for none yet.
      group_names: uint8 vector, the paths of the G groups. They are here as bytes so that they pass through jit, scan
        and checkpoints like any other array.
      leaf_names: uint8 vector, the paths of the leaves.
    """

    clip_steps: jax.Array
    clip_norm: jax.Array
    clip_limit: jax.Array
    clip_scale: jax.Array
    clipped_steps: jax.Array
    nonfinite_steps: jax.Array
    first_nonfinite_step: jax.Array
    first_nonfinite_leaf: jax.Array
    group_names: jax.Array
    leaf_names: jax.Array


def init(norms: Any, updates: Any, length: int) -> ClipStats:
    """An empty record of `length` steps, of norms like `norms`, of which only structure and types matter."""
    entries = jax.tree.leaves(norms)
    rings = (length, max(len(entries), 1))  # without groups one of norm 0 stands in: checkpoints refuse empty arrays
    dtype = jnp.result_type(jnp.float32, *(entry.dtype for entry in entries))
    return ClipStats(
        clip_steps=jnp.zeros(length, jnp.int32),
        clip_norm=jnp.zeros(rings, dtype),
        clip_limit=jnp.full(rings, jnp.inf, dtype),
        clip_scale=jnp.ones(rings, dtype),
        clipped_steps=jnp.zeros((), jnp.int32),
        nonfinite_steps=jnp.zeros((), jnp.int32),
        first_nonfinite_step=jnp.zeros((), jnp.int32),
        first_nonfinite_leaf=jnp.full((), -1, jnp.int32),
        group_names=_encoded(leaves.paths(norms)),
        leaf_names=_encoded(leaves.paths(updates)),
    )


def require_state(state: Any, recorded: type, length: int) -> None:
    """Raises unless a state has a record of `length` steps in it, or none if that is 0."""
    has = state.clip_stats.clip_steps.shape[-1] if isinstance(state, recorded) else 0
    if has != length:
        raise ValueError(f"the clipper was built with record={length}, and its state has a record of {has} steps")


def advance(
    stats: ClipStats, norms: Any, limits: Any, permitted: Any, updates: Any, splits: Sequence[mesh.Split]
) -> ClipStats:
    """The record with one step more.

    Args:
      stats: the record so far.
      norms: what was measured.
      limits: the upper end of the band, of the structure of `norms`.
      permitted: what each norm became, likewise.
      updates: the updates that were measured.
      splits: over which mesh axes each of their leaves is split.
    """
    # Counts start at 0 and so, with every step that is written, does the largest.
    step = jnp.asarray(optax.safe_increment(jnp.max(stats.clip_steps)))
    row = (step - 1) % len(stats.clip_steps)
    if max(len(jax.tree.leaves(norms)), 1) != stats.clip_norm.shape[-1]:
        raise ValueError(
            f"the record is of {stats.clip_norm.shape[-1]} groups, and the updates have {len(jax.tree.leaves(norms))}: "
            "init saw another tree"
        )
    norm, limit, goal, clipped = _by_entry(norms, limits, permitted, splits, stats.clip_norm.dtype)
    kept = scaling.is_kept(norm, goal)
    scale = sums.quotient(jnp.where(kept, jnp.ones_like(goal), goal), jnp.where(kept, jnp.ones_like(norm), norm))
    nonfinite = ~jnp.all(jnp.isfinite(norm))
    is_first = nonfinite & (stats.first_nonfinite_step == 0)
    leaf = _search_if(is_first, jax.tree.leaves(updates))
    # The devices agree outside of the branch: inside it a collective would hang if they ever took different ones.
    if axes := mesh.may_vary_over(leaf, splits):
        leaf = jax.lax.pmin(leaf, axes)

    def into(ring: jax.Array, new: jax.Array) -> jax.Array:
        return ring.at[row].set(new.astype(ring.dtype))

    return stats._replace(
        clip_steps=into(stats.clip_steps, step),
        clip_norm=into(stats.clip_norm, norm),
        clip_limit=into(stats.clip_limit, limit),
        clip_scale=into(stats.clip_scale, scale),
        clipped_steps=_counted(stats.clipped_steps, clipped),
        nonfinite_steps=_counted(stats.nonfinite_steps, nonfinite),
        first_nonfinite_step=jnp.where(is_first, step, stats.first_nonfinite_step),
        first_nonfinite_leaf=jnp.where(is_first & (leaf < _NONE), leaf, stats.first_nonfinite_leaf),
    )


def clip_stats(opt_state: Any, *, per_group: bool = False, history: bool = False) -> dict[str, Any]:
    """What the clippers in an optimizer's state did, as a flat dict that is ready to log.

    ======================  ===========================================================================================
    `clip_steps`            steps so far
    `clip_norm`             norm in the last step
    `clip_limit`            what was permitted in the last step, the upper end of the band
    `clip_scale`            by what the updates were multiplied in the last step; 1 if they were left alone
    `clipped_share`         share of all steps in which some group was scaled
    `nonfinite_steps`       number of steps in which some norm was infinite or NaN
    `first_nonfinite_step`  the first of these, counted from 1; 0 if there was none
    `first_nonfinite_leaf`  path of the first leaf that was not finite in that step; "" if there was none
    ======================  ===========================================================================================

    Where a clipper has several groups, norm, limit and scale are those of the group furthest outside its band.

    Args:
      opt_state: the state of any chain, partition, wrapper or nesting of these, with clippers in it that were built
        with `record=`. Where there are several, every key is led by the place in the state that tells it from the
        others: "0/clip_norm", "decoder/clip_norm".
      per_group: whether norm, limit and scale of every group are wanted too, as "clip_norm/<path of the group>".
      history: whether steps, norm, limit and scale are wanted as NumPy arrays over the steps recorded, oldest first.

    Returns:
      A dict of Python numbers (and one string); empty if there is no record. In a jitted function, which can't return a
      string, a dict of scalar arrays without `first_nonfinite_leaf`.

    Raises:
      ValueError: if `per_group` or `history` is asked for in a jitted function, or the states of several replicas are
        stacked in one.

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
    """
    flat = jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=_is_record)
    records = [(path, node) for path, node in flat if _is_record(node)]
    places = _distinct([path for path, _ in records])
    return {
        place + name: value
        for place, (_, record) in zip(places, records, strict=True)
        for name, value in _summary(record, per_group, history).items()
    }


def _summary(stats: ClipStats, per_group: bool, history: bool) -> dict[str, Any]:
    if stats.clip_steps.ndim != 1:
        raise ValueError("the record has leading axes; take that of one replica: jax.tree.map(lambda x: x[0], state)")
    if not any(isinstance(leaf, Tracer) for leaf in stats):
        stats = ClipStats(*jax.device_get(tuple(stats)))
        with np.errstate(all="ignore"):  # inf and NaN are what a record is there to show
            return _numbers(stats, np, history) | _named(stats, per_group, history)
    if per_group or history:
        raise ValueError("per_group and history need a concrete state: ask for them outside the jitted function")
    return _numbers(stats, jnp, history)


def _numbers(stats: ClipStats, xp: Any, history: bool) -> dict[str, Any]:
    """All but the names, by NumPy or by jax.numpy."""
    steps, rings = _rows(stats, xp, history)
    furthest = xp.argmax(_excess(xp, *rings.values()), axis=-1)[..., None]
    taken = {name: xp.take_along_axis(ring, furthest, axis=-1)[..., 0] for name, ring in rings.items()}
    share = stats.clipped_steps / xp.maximum(xp.max(stats.clip_steps), 1)
    counts = {name: getattr(stats, name) for name in ("nonfinite_steps", "first_nonfinite_step")}
    found = {"clip_steps": steps, **taken, "clipped_share": share, **counts}
    return found if xp is jnp else {name: _plain(value) for name, value in found.items()}


def _named(stats: ClipStats, per_group: bool, history: bool) -> dict[str, Any]:
    """What only makes sense with the names, which a traced record cannot tell."""
    number = int(stats.first_nonfinite_leaf)
    found: dict[str, Any] = {"first_nonfinite_leaf": _decoded(stats.leaf_names)[number] if number >= 0 else ""}
    if per_group:
        _, rings = _rows(stats, np, history)
        for place, group in enumerate(_decoded(stats.group_names)):
            if not group:  # the one of a global norm, which has no path
                continue
            found |= {f"{name}/{group}": _plain(ring[..., place]) for name, ring in rings.items()}
    return found


def _rows(stats: ClipStats, xp: Any, history: bool) -> tuple[Any, dict[str, Any]]:
    """The steps recorded, oldest first, and their rows of the rings; or the last of them alone."""
    order = xp.argsort(stats.clip_steps)
    rows = order[stats.clip_steps[order] > 0] if history else order[-1]
    return stats.clip_steps[rows], {name: getattr(stats, name)[rows] for name in _RINGS}


_RINGS = ("clip_norm", "clip_limit", "clip_scale")


def _plain(value: Any) -> Any:
    """A Python number for a scalar; an array stays what it is."""
    return value if np.ndim(value) else value.item()


def _by_entry(
    norms: Any, limits: Any, permitted: Any, splits: Sequence[mesh.Split], dtype: Any
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Norm, limit and permitted norm of each entry of `norms`, as vectors; and whether any of them is scaled."""
    trees = [jax.tree.leaves(tree) for tree in (norms, limits, permitted)]
    rows: list[tuple[jax.Array, ...]] = []
    for norm, limit, goal in zip(*trees, strict=True):
        clipped = ~scaling.is_kept(norm, goal)
        row = (norm, limit, goal, clipped)
        rows.append(row if norm.ndim == 0 else _worst_unit(*row, mesh.may_vary_over(norm, splits)))
    if not rows:
        return jnp.zeros(1, dtype), jnp.full(1, jnp.inf, dtype), jnp.zeros(1, dtype), jnp.zeros((), jnp.bool_)
    norm, limit, goal, clipped = (jnp.stack(column) for column in zip(*rows, strict=True))
    return norm.astype(dtype), limit.astype(dtype), goal.astype(dtype), jnp.any(clipped)


def _worst_unit(norm: Any, limit: Any, goal: Any, clipped: Any, axes: tuple[str, ...]) -> tuple[jax.Array, ...]:
    """Of many groups in one array, on all devices, the one that is furthest beyond its limit."""
    excess = _excess(jnp, norm, limit, jnp.where(clipped, goal / jnp.where(clipped, norm, 1), 1))
    worst = jnp.max(excess, initial=0)
    worst = jax.lax.pmax(worst, axes) if axes else worst

    def there(x: jax.Array) -> jax.Array:
        largest = sums.largest(jnp.where(excess == worst, x, jnp.zeros_like(x)))
        return jax.lax.pmax(largest, axes) if axes else largest

    some = jnp.any(clipped)
    return there(norm), there(limit), there(goal), jax.lax.pmax(some, axes) if axes else some


def _excess(xp: Any, norm: Any, limit: Any, scale: Any) -> Any:
    """By what factor a norm is outside its band, on either side; below 1 inside, and inf if it is not finite."""
    positive = xp.where(limit > 0, limit, xp.ones_like(limit))
    ratio = xp.where(limit > 0, norm / positive, xp.where(norm > 0, xp.inf, 0))
    ratio = xp.where(scale > 1, scale, ratio)
    return xp.where(xp.isfinite(norm), ratio, xp.inf)


# At module level and jitted, so that eager calls do not compile anew.
@jax.jit
def _search_if(wanted: jax.Array, updates: list[Any]) -> jax.Array:
    """Which leaf is the first that is not finite, on this device: its number, or `_NONE`. Reads them only if wanted."""
    counted = [i for i, leaf in enumerate(updates) if sums.is_counted(leaf)]
    names = {name for i in counted for name in mesh.varying(updates[i])}

    def search(updates: list[Any]) -> jax.Array:
        bad = jnp.stack([sums.has_nonfinite(jnp.asarray(updates[i])) for i in counted])
        number = jnp.asarray(counted, jnp.int32)[jnp.argmax(bad)]
        return mesh.varying_over(jnp.where(jnp.any(bad), number, _NONE), names)

    def skip(updates: list[Any]) -> jax.Array:
        del updates
        return mesh.varying_over(jnp.full((), _NONE, jnp.int32), names)

    return jax.lax.cond(wanted, search, skip, updates) if counted else jnp.full((), _NONE, jnp.int32)


_NONE = np.iinfo(np.int32).max


def _counted(total: jax.Array, happened: jax.Array) -> jax.Array:
    return jnp.where(happened, jnp.asarray(optax.safe_increment(total)), total)


def _encoded(names: list[str]) -> jax.Array:
    """The names as bytes, a zero after each."""
    return jnp.asarray(np.frombuffer("".join(name + "\0" for name in names or [""]).encode(), np.uint8))


def _decoded(names: Any) -> list[str]:
    return bytes(names).decode().split("\0")[:-1]


def _is_record(node: Any) -> bool:
    return isinstance(node, ClipStats)


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
    return ["/".join([*path, ""]) for path in names]
