"""The flight recorder: what a clipper did, which leaf was not finite first, and which steps were skipped.

Everything that `clip_by` makes takes `record=k`. Then it keeps norms and bounds of the last k steps in its own state.
`clip_stats` reads the records.

On GPUs and TPUs this takes no pass over the updates: the norms are known already, and the first leaf that is not finite
is found from 2-norms, which share a pass with any other norm. On CPUs, recording takes no pass if the clipper measures
2-norms of leaves or of all leaves. With any other norm it takes one pass there.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip._arguments import bounds
from optaxclip._arrays import dtypes, groups, mesh, states, trees
from optaxclip._arrays.leaves import Leaves
from optaxclip._arrays.trees import Tree
from optaxclip._numerics import arithmetic, scaling, tree_norms
from optaxclip.records.names import Names


class ClipStats(NamedTuple):
    """What a clipper measured and did. G is the number of groups: 1 for a global norm, else one per leaf or label.

    If a leaf has several units or stacked layers, the one furthest beyond its bound is recorded.

    There are two rings of k steps. The second one stops k // 10 steps after the first step that was not finite, and so
    keeps the steps before it.

    Attributes:
      recorded_steps: int32 scalar, the number of steps so far.
      clip_steps: int32 of shape (k,), the step of each row of the first ring, counted from 1; 0 for an empty row.
      clip_norm: floats of shape (k, G), the norms.
      clip_limit: floats of shape (k, G), the upper end of the band; the largest float if there is no bound.
      clip_scale: floats of shape (k, G), the factors of the groups.
      kept_steps: like `clip_steps`, in the second ring.
      kept_norm: like `clip_norm`, in the second ring.
      kept_limit: like `clip_limit`, in the second ring.
      kept_scale: like `clip_scale`, in the second ring.
      clipped_steps: int32 scalar, the number of steps in which some group was scaled.
      nonfinite_steps: int32 scalar, the number of steps in which some norm was infinite or NaN.
      first_nonfinite_step: int32 scalar, the first of these steps; 0 if there was none.
      first_nonfinite_leaf: int32 scalar, the first leaf, in tree order, that was not finite in that step; -1 if there
        was none.
      first_nonfinite_leaves: int32 scalar, the number of measured leaves that were not finite in that step.
      norm_axes: uint8 of shape (48,), the mesh axes that the norms of the last step were taken over, separated by
        commas.
      names: the paths of groups and leaves, a `Names` without arrays.

    See also:
      `clip_stats`, which reads it.
    """

    recorded_steps: jax.Array
    clip_steps: jax.Array
    clip_norm: jax.Array
    clip_limit: jax.Array
    clip_scale: jax.Array
    kept_steps: jax.Array
    kept_norm: jax.Array
    kept_limit: jax.Array
    kept_scale: jax.Array
    clipped_steps: jax.Array
    nonfinite_steps: jax.Array
    first_nonfinite_step: jax.Array
    first_nonfinite_leaf: jax.Array
    first_nonfinite_leaves: jax.Array
    norm_axes: jax.Array
    names: Names


class RecordedState(NamedTuple):
    """State of a transformation built with `record=`.

    Attributes:
      threshold_state: the threshold's own state.
      clip_stats: the record.
    """

    threshold_state: Any
    clip_stats: ClipStats


RINGS = ("clip", "kept")  # the prefixes of their fields


def init(norms: Tree, updates: Tree, length: int) -> ClipStats:
    """Returns an empty record of `length` steps, for norms with the structure and dtypes of `norms`."""
    number = max(len(jax.tree.leaves(norms)), 1)  # at least one group, because checkpoints refuse empty arrays
    rings = {
        f"{ring}_{name}": array
        for ring in RINGS
        for name, array in _empty_ring(length, number, groups.dtype(norms)).items()
    }
    return ClipStats(
        **rings,
        recorded_steps=jnp.zeros((), jnp.int32),
        clipped_steps=jnp.zeros((), jnp.int32),
        nonfinite_steps=jnp.zeros((), jnp.int32),
        first_nonfinite_step=jnp.zeros((), jnp.int32),
        first_nonfinite_leaf=jnp.full((), -1, jnp.int32),
        first_nonfinite_leaves=jnp.zeros((), jnp.int32),
        norm_axes=_axes_as_bytes([]),
        names=_names(norms, _paths_of_counted(updates)),
    )


def _empty_ring(length: int, number: int, dtype: Any) -> dict[str, jax.Array]:
    return {
        "steps": jnp.zeros(length, jnp.int32),
        "norm": jnp.zeros((length, number), dtype),
        "limit": jnp.full((length, number), bounds.highest(dtype), dtype),
        "scale": jnp.ones((length, number), dtype),
    }


def _names(norms: Tree, leaves: list[str]) -> Names:
    # A tree without leaves may stand for another tree, as in `optax.tree.map_params`.
    return Names(tuple(trees.paths(norms)), tuple(leaves)) if leaves else Names()


def _paths_of_counted(tree: Tree) -> list[str]:
    # `init` may see other leaves, without floats, that `update` does not.
    pairs = zip(trees.paths(tree), jax.tree.leaves(tree), strict=True)
    return [path for path, leaf in pairs if dtypes.is_inexact(leaf)]


def require_state(state: Tree, length: int) -> None:
    """Raises ValueError unless a state has a record of `length` steps; for 0, unless it has none."""
    has = np.shape(state.clip_stats.clip_steps)[-1] if isinstance(state, RecordedState) else 0
    if has != length:
        expected = f"the threshold's state {f'with a record of {length} steps' if length else 'without a record'}"
        came = f"one with a record of {has} steps" if has else states.described(state)
        raise ValueError(states.wrong(f"a clipper built with record={length}", expected, came))


def advance(stats: ClipStats, judged: Any, leaves: Leaves, is_measured: list[bool]) -> ClipStats:
    """Returns the record after one more step.

    Args:
      stats: the record so far.
      judged: the norms, limits and factors, as in `core.Judged`.
      leaves: the updates.
      is_measured: for each leaf, whether the norm measures it. The others are ignored: a frozen leaf may be NaN.
    """
    step = jnp.asarray(optax.safe_increment(stats.recorded_steps))
    norm, limit, scale, clipped = _by_entry(judged, leaves, stats.clip_norm)
    nonfinite = ~jnp.all(jnp.isfinite(norm))
    is_first = nonfinite & (stats.first_nonfinite_step == 0)
    names = stats.names
    if not names.are_known:
        names = _names(judged.norms, leaves.paths)
    leaf, number = _first_nonfinite(leaves, is_measured)
    if tuple(leaves.paths) != names.leaves:  # `init` saw other leaves, so its names do not fit
        leaf = jnp.full((), -1, jnp.int32)
    first = jnp.where(is_first, step, stats.first_nonfinite_step)
    row = {"steps": step, "norm": norm, "limit": limit, "scale": scale}
    return stats._replace(
        **_with_row(stats, row, first),
        recorded_steps=step,
        clipped_steps=counted(stats.clipped_steps, clipped),
        nonfinite_steps=counted(stats.nonfinite_steps, nonfinite),
        first_nonfinite_step=first,
        first_nonfinite_leaf=jnp.where(is_first & (leaf >= 0), leaf, stats.first_nonfinite_leaf),
        first_nonfinite_leaves=jnp.where(is_first, number, stats.first_nonfinite_leaves),
        norm_axes=_axes_as_bytes(sorted(leaves.axes)),
        names=names,
    )


def _with_row(stats: ClipStats, row: dict[str, jax.Array], first: jax.Array) -> dict[str, jax.Array]:
    """Adds a step to both rings; to the second one only until a few steps after `first`, if there was one."""
    length = len(stats.clip_steps)
    step, place = row["steps"], (row["steps"] - 1) % length
    is_over = step > last_step(jnp, "kept", length, step, first)
    places = {"clip": place, "kept": jnp.where(is_over, length, place)}  # writes past the end are dropped
    return {
        field: array.at[places[ring]].set(row[name].astype(array.dtype), mode="drop")
        for field, array in stats._asdict().items()
        for ring, _, name in [field.partition("_")]
        if ring in places and name in row
    }


def last_step(xp: Any, ring: str, length: int, now: Any, first_nonfinite: Any) -> Any:
    """Returns the last step in a ring, by NumPy or by jax.numpy."""
    stopped = (first_nonfinite > 0) & (ring == "kept")
    return xp.where(stopped, xp.minimum(now, first_nonfinite + length // 10), now)


def _by_entry(judged: Any, leaves: Leaves, ring: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns norm, limit and scale of each group, as vectors like a row of `ring`, and whether any group is scaled."""
    norms, limits = jax.tree.leaves(judged.norms), jax.tree.leaves(judged.limits)
    if max(len(norms), 1) != ring.shape[-1]:
        raise ValueError(
            f"the record has {ring.shape[-1]} groups, but the updates have {len(norms)}: init saw another tree. "
            "Convert the state: state, report = optaxclip.migrate(tx, params, old_state)"
        )
    if not norms:
        nothing = jnp.zeros(1, ring.dtype)
        return nothing, jnp.full(1, bounds.highest(ring.dtype), ring.dtype), nothing + 1, jnp.zeros((), jnp.bool_)
    factors = jax.tree.leaves(judged.factors, is_leaf=lambda node: isinstance(node, scaling.Factor))
    changes = [(factor.goal, factor.norm, factor.second) for factor in factors]
    scales, clipped = zip(*groups.vectorized(_scale, *zip(*changes, strict=True)), strict=True)
    rows = [
        _worst_unit(*row, mesh.may_vary_over(row[0], leaves.axes)) if row[0].ndim else row
        for row in zip(norms, limits, scales, clipped, strict=True)
    ]
    norm, limit, scale, some = (jnp.stack(column) for column in zip(*rows, strict=True))
    return norm.astype(ring.dtype), limit.astype(ring.dtype), scale.astype(ring.dtype), jnp.any(some)


def _scale(goal: jax.Array, norm: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the factor of a group, and whether the group is scaled at all."""
    return arithmetic.quotient(goal, norm), second != 1


def _worst_unit(norm: Any, limit: Any, scale: Any, clipped: Any, axes: tuple[str, ...]) -> tuple[jax.Array, ...]:
    """Returns the entry that is furthest beyond its limit, of many groups in one array, on all devices."""
    beyond = excess(jnp, norm, limit, jnp.where(clipped, scale, jnp.ones_like(scale)))
    worst = jnp.max(beyond, initial=0)
    worst = jax.lax.pmax(worst, axes) if axes else worst

    def there(x: jax.Array) -> jax.Array:
        largest = arithmetic.largest(jnp.where(beyond == worst, x, jnp.zeros_like(x)))
        return jax.lax.pmax(largest, axes) if axes else largest

    some = jnp.any(clipped)
    return there(norm), there(limit), there(scale), jax.lax.pmax(some, axes) if axes else some


def excess(xp: Any, norm: Any, limit: Any, scale: Any) -> Any:
    """Returns by which factor a norm is outside its band, on either side; below 1 inside, inf if it is not finite."""
    positive = xp.where(limit > 0, limit, xp.ones_like(limit))
    ratio = xp.where(limit > 0, norm / positive, xp.where(norm > 0, bounds.highest(norm.dtype), 0))
    ratio = xp.where(scale > 1, scale, ratio)
    return xp.where(xp.isfinite(norm), ratio, xp.inf)


def _first_nonfinite(leaves: Leaves, is_measured: list[bool]) -> tuple[jax.Array, jax.Array]:
    """Returns the number of the first leaf that is not finite, or -1, and how many are not.

    Both come from the 2-norms of the leaves. A clipper by 2-norms calculates these anyway, so they take no further
    pass. If the norm is passed to `update`, they take one.
    """
    if not leaves:
        return jnp.full((), -1, jnp.int32), jnp.zeros((), jnp.int32)
    bad = jnp.stack(groups.vectorized(lambda norm: ~jnp.isfinite(norm), tree_norms.of_each(leaves, 2)))
    bad &= np.array(is_measured)
    first = jnp.where(jnp.any(bad), jnp.argmax(bad).astype(jnp.int32), -1)
    return first, jnp.sum(bad, dtype=jnp.int32)


def counted(total: jax.Array, happened: jax.Array) -> jax.Array:
    """Returns a count, increased by one if `happened`."""
    return jnp.where(happened, jnp.asarray(optax.safe_increment(total)), total)


def _axes_as_bytes(names: list[str]) -> jax.Array:
    """Encodes names of mesh axes in a fixed number of bytes.

    The state must have the same shape inside and outside `shard_map`.
    """
    room = np.zeros(48, np.uint8)
    joined = ",".join(names).encode()
    cut = joined if len(joined) <= room.size else joined[: room.size - 3] + b"..."
    text = np.frombuffer(cut, np.uint8)
    room[: text.size] = text
    return jnp.asarray(room)


def axes_from_bytes(text: Any) -> str:
    """Decodes what `_axes_as_bytes` encoded."""
    return bytes(text).rstrip(b"\0").decode(errors="ignore")
