"""The flight recorder: what a clipper did, what blew up first, and which steps were left out.

Everything that `clip_by` makes takes `record=k` and then keeps, in its own state, what it measured and permitted in the
last k steps. On GPUs and TPUs it costs no pass over the updates: the norms are there already, and the leaf that was the
first not to be finite is read off 2-norms, which share a pass with any other norm. So they do on CPUs with 2-norms of
leaves or all leaves; other norms cost a pass more there. `clip_stats` reads the records.
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

    Of the units or stacked layers of one leaf, the one that is furthest beyond its limit stands for the leaf.

    There are two rings of k steps. The second stops k // 10 steps after the first step that was not finite, and so
    keeps what led there.

    Attributes:
      recorded_steps: int32 scalar, the number of steps so far.
      clip_steps: int32 of shape (k,), the step that each row of the first ring belongs to, counted from 1; 0 for none.
      clip_norm: floats of shape (k, G), the norms.
      clip_limit: floats of shape (k, G), the upper end of the band; the largest float where nothing bounds.
      clip_scale: floats of shape (k, G), by what the group was multiplied.
      kept_steps: as `clip_steps`, of the second ring; and so are
      kept_norm: the norms in it,
      kept_limit: the limits, and
      kept_scale: the scales.
      clipped_steps: int32 scalar, the number of steps in which some group was scaled.
      nonfinite_steps: int32 scalar, the number of steps in which some norm was infinite or NaN.
      first_nonfinite_step: int32 scalar, the first of these; 0 for none yet.
      first_nonfinite_leaf: int32 scalar, the first leaf, in the order of the tree, that was not finite in that step; -1
        for none yet.
      first_nonfinite_leaves: int32 scalar, how many of the leaves that the norm measures were not finite in that step.
      norm_axes: uint8 of shape (48,), the mesh axes that the norms of the last step went over, with commas between.
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


RINGS = ("clip", "kept")  # what the names of the fields of each begin with


def init(norms: Tree, updates: Tree, length: int) -> ClipStats:
    """An empty record of `length` steps, of norms like `norms`, of which only structure and types matter."""
    number = max(len(jax.tree.leaves(norms)), 1)  # one of norm 0 stands in for none: checkpoints refuse empty arrays
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
    # A tree without leaves may stand for another one, as in `optax.tree.map_params`.
    return Names(tuple(trees.paths(norms)), tuple(leaves)) if leaves else Names()


def _paths_of_counted(tree: Tree) -> list[str]:
    # `init` may see other leaves beside these that `update` does not.
    pairs = zip(trees.paths(tree), jax.tree.leaves(tree), strict=True)
    return [path for path, leaf in pairs if dtypes.is_inexact(leaf)]


def require_state(state: Tree, length: int) -> None:
    """Raises unless a state has a record of `length` steps in it, or none if that is 0."""
    has = np.shape(state.clip_stats.clip_steps)[-1] if isinstance(state, RecordedState) else 0
    if has != length:
        expected = f"a record of {length} steps beside the threshold's state" if length else "the threshold's alone"
        came = f"a record of {has} steps beside it" if has else states.described(state)
        raise ValueError(states.wrong(f"a clipper built with record={length}", expected, came))


def advance(stats: ClipStats, judged: Any, leaves: Leaves, is_measured: list[bool]) -> ClipStats:
    """The record with one step more.

    Args:
      stats: the record so far.
      judged: what was measured, and the limits and factors, as `core.Judged` has them.
      leaves: the updates.
      is_measured: which of these the norm measures. Of the others none is looked at: a frozen leaf may be NaN.
    """
    step = jnp.asarray(optax.safe_increment(stats.recorded_steps))
    norm, limit, scale, clipped = _by_entry(judged, leaves, stats.clip_norm)
    nonfinite = ~jnp.all(jnp.isfinite(norm))
    is_first = nonfinite & (stats.first_nonfinite_step == 0)
    names = stats.names
    if not names.are_known:
        names = _names(judged.norms, leaves.paths)
    leaf, number = _first_nonfinite(leaves, is_measured)
    if tuple(leaves.paths) != names.leaves:  # `init` saw others, and its names are not these
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
    """Both rings with a step more: the second one only until a few steps after `first`, if there was one."""
    length = len(stats.clip_steps)
    step, place = row["steps"], (row["steps"] - 1) % length
    is_over = step > last_step(jnp, "kept", length, step, first)
    places = {"clip": place, "kept": jnp.where(is_over, length, place)}  # what would go behind the end is dropped
    return {
        field: array.at[places[ring]].set(row[name].astype(array.dtype), mode="drop")
        for field, array in stats._asdict().items()
        for ring, _, name in [field.partition("_")]
        if ring in places and name in row
    }


def last_step(xp: Any, ring: str, length: int, now: Any, first_nonfinite: Any) -> Any:
    """The last step that is in a ring, by NumPy or by jax.numpy."""
    stopped = (first_nonfinite > 0) & (ring == "kept")
    return xp.where(stopped, xp.minimum(now, first_nonfinite + length // 10), now)


def _by_entry(judged: Any, leaves: Leaves, ring: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Norm, limit and scale of each entry of the norms, as vectors like those in `ring`; and whether any is scaled."""
    norms, limits = jax.tree.leaves(judged.norms), jax.tree.leaves(judged.limits)
    if max(len(norms), 1) != ring.shape[-1]:
        raise ValueError(
            f"the record is of {ring.shape[-1]} groups, and the updates have {len(norms)}: init saw another tree"
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
    """By what a group is multiplied, and whether it is at all."""
    return arithmetic.quotient(goal, norm), second != 1


def _worst_unit(norm: Any, limit: Any, scale: Any, clipped: Any, axes: tuple[str, ...]) -> tuple[jax.Array, ...]:
    """Of many groups in one array, on all devices, the one that is furthest beyond its limit."""
    beyond = excess(jnp, norm, limit, jnp.where(clipped, scale, jnp.ones_like(scale)))
    worst = jnp.max(beyond, initial=0)
    worst = jax.lax.pmax(worst, axes) if axes else worst

    def there(x: jax.Array) -> jax.Array:
        largest = arithmetic.largest(jnp.where(beyond == worst, x, jnp.zeros_like(x)))
        return jax.lax.pmax(largest, axes) if axes else largest

    some = jnp.any(clipped)
    return there(norm), there(limit), there(scale), jax.lax.pmax(some, axes) if axes else some


def excess(xp: Any, norm: Any, limit: Any, scale: Any) -> Any:
    """By what factor a norm is outside its band, on either side; below 1 inside, and inf if it is not finite."""
    positive = xp.where(limit > 0, limit, xp.ones_like(limit))
    ratio = xp.where(limit > 0, norm / positive, xp.where(norm > 0, bounds.highest(norm.dtype), 0))
    ratio = xp.where(scale > 1, scale, ratio)
    return xp.where(xp.isfinite(norm), ratio, xp.inf)


def _first_nonfinite(leaves: Leaves, is_measured: list[bool]) -> tuple[jax.Array, jax.Array]:
    """Which leaf is the first that is not finite, its number or -1, and how many are not.

    It is read off the 2-norms of the leaves, which are those of a clipper by 2-norms, and so no further pass over
    them. A norm that is told costs one here.
    """
    if not leaves:
        return jnp.full((), -1, jnp.int32), jnp.zeros((), jnp.int32)
    bad = jnp.stack(groups.vectorized(lambda norm: ~jnp.isfinite(norm), tree_norms.of_each(leaves, 2)))
    bad &= np.array(is_measured)
    first = jnp.where(jnp.any(bad), jnp.argmax(bad).astype(jnp.int32), -1)
    return first, jnp.sum(bad, dtype=jnp.int32)


def counted(total: jax.Array, happened: jax.Array) -> jax.Array:
    """A count, one higher if it happened."""
    return jnp.where(happened, jnp.asarray(optax.safe_increment(total)), total)


def _axes_as_bytes(names: list[str]) -> jax.Array:
    """Names of mesh axes in a fixed number of bytes: the state must not change its shape where they are bound."""
    room = np.zeros(48, np.uint8)
    joined = ",".join(names).encode()
    cut = joined if len(joined) <= room.size else joined[: room.size - 3] + b"..."
    text = np.frombuffer(cut, np.uint8)
    room[: text.size] = text
    return jnp.asarray(room)


def axes_from_bytes(text: Any) -> str:
    """What `_axes_as_bytes` wrote."""
    return bytes(text).rstrip(b"\0").decode(errors="ignore")
