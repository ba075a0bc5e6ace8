"""The flight recorder: what a clipper did, what blew up first, and which steps were left out.

Everything that `clip_by` makes takes `record=k` and then keeps, in its own state, what it measured and permitted in the
last k steps. On GPUs and TPUs it costs no pass over the updates: the norms are there already, and the leaf that was the
first not to be finite is read off 2-norms, which share a pass with any other norm. So they do on CPUs with 2-norms of
leaves or all leaves; other norms cost a pass more there. `clip_stats` reads the records.
"""

import json
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


class ClipStats(NamedTuple):
    """What a clipper measured and did. G is the number of groups: 1 for a global norm, else one per leaf or label.

    Of the units or stacked layers of one leaf, the one that is furthest beyond its limit stands for the leaf.

    Attributes:
      recorded_steps: int32 scalar, the number of steps so far.
      clip_steps: int32 of shape (k,), the step that each row of the rings belongs to, counted from 1; 0 for none yet.
      clip_norm: floats of shape (k, G), the norms.
      clip_limit: floats of shape (k, G), the upper end of the band; the largest float where nothing bounds.
      clip_scale: floats of shape (k, G), by what the group was multiplied.
      clipped_steps: int32 scalar, the number of steps in which some group was scaled.
      nonfinite_steps: int32 scalar, the number of steps in which some norm was infinite or NaN.
      first_nonfinite_step: int32 scalar, the first of these; 0 for none yet.
      first_nonfinite_leaf: int32 scalar, the first leaf that was not finite in that step; -1 for none yet.
      norm_axes: uint8 of shape (48,), the mesh axes that the norms of the last step went over, with commas between.
      group_names: uint8 vector, the paths of the G groups. They are here as bytes so that they pass through jit, scan
        and checkpoints like any other array.
      leaf_names: uint8 vector, the paths of the leaves that hold floats.

    See also:
      `clip_stats`, which reads it.
    """

    recorded_steps: jax.Array
    clip_steps: jax.Array
    clip_norm: jax.Array
    clip_limit: jax.Array
    clip_scale: jax.Array
    clipped_steps: jax.Array
    nonfinite_steps: jax.Array
    first_nonfinite_step: jax.Array
    first_nonfinite_leaf: jax.Array
    norm_axes: jax.Array
    group_names: jax.Array
    leaf_names: jax.Array


def init(norms: Tree, updates: Tree, length: int) -> ClipStats:
    """An empty record of `length` steps, of norms like `norms`, of which only structure and types matter."""
    entries = jax.tree.leaves(norms)
    rings = (length, max(len(entries), 1))  # without groups one of norm 0 stands in: checkpoints refuse empty arrays
    dtype = groups.dtype(norms)
    return ClipStats(
        recorded_steps=jnp.zeros((), jnp.int32),
        clip_steps=jnp.zeros(length, jnp.int32),
        clip_norm=jnp.zeros(rings, dtype),
        clip_limit=jnp.full(rings, bounds.highest(dtype), dtype),
        clip_scale=jnp.ones(rings, dtype),
        clipped_steps=jnp.zeros((), jnp.int32),
        nonfinite_steps=jnp.zeros((), jnp.int32),
        first_nonfinite_step=jnp.zeros((), jnp.int32),
        first_nonfinite_leaf=jnp.full((), -1, jnp.int32),
        norm_axes=_axes_as_bytes([]),
        group_names=_encoded(trees.paths(norms)),
        leaf_names=_encoded(_paths_of_counted(updates)),
    )


def _paths_of_counted(tree: Tree) -> list[str]:
    # `init` may see other leaves beside these that `update` does not.
    pairs = zip(trees.paths(tree), jax.tree.leaves(tree), strict=True)
    return [path for path, leaf in pairs if dtypes.is_inexact(leaf)]


def require_state(state: Tree, recorded: type, length: int) -> None:
    """Raises unless a state has a record of `length` steps in it, or none if that is 0."""
    has = np.shape(state.clip_stats.clip_steps)[-1] if isinstance(state, recorded) else 0
    if has != length:
        expected = f"a record of {length} steps beside the threshold's state" if length else "the threshold's alone"
        came = f"a record of {has} steps beside it" if has else states.described(state)
        raise ValueError(states.wrong(f"a clipper built with record={length}", expected, came))


def advance(stats: ClipStats, judged: Any, leaves: Leaves) -> ClipStats:
    """The record with one step more.

    Args:
      stats: the record so far.
      judged: what was measured, and the limits and factors, as `core.Judged` has them.
      leaves: the updates that were measured.
    """
    step = jnp.asarray(optax.safe_increment(stats.recorded_steps))
    row = (step - 1) % len(stats.clip_steps)
    norm, limit, scale, clipped = _by_entry(judged, leaves, stats.clip_norm)
    nonfinite = ~jnp.all(jnp.isfinite(norm))
    is_first = nonfinite & (stats.first_nonfinite_step == 0)
    # Of another number of leaves than `init` saw the names are not known.
    has_names = _encoded(leaves.paths).shape == stats.leaf_names.shape
    leaf = _first_nonfinite(leaves) if has_names else jnp.full((), -1, jnp.int32)

    def into(ring: jax.Array, new: jax.Array) -> jax.Array:
        return ring.at[row].set(new.astype(ring.dtype))

    return stats._replace(
        recorded_steps=step,
        clip_steps=into(stats.clip_steps, step),
        clip_norm=into(stats.clip_norm, norm),
        clip_limit=into(stats.clip_limit, limit),
        clip_scale=into(stats.clip_scale, scale),
        clipped_steps=counted(stats.clipped_steps, clipped),
        nonfinite_steps=counted(stats.nonfinite_steps, nonfinite),
        first_nonfinite_step=jnp.where(is_first, step, stats.first_nonfinite_step),
        first_nonfinite_leaf=jnp.where(is_first & (leaf >= 0), leaf, stats.first_nonfinite_leaf),
        norm_axes=_axes_as_bytes(sorted(leaves.axes)),
    )


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


def _first_nonfinite(leaves: Leaves) -> jax.Array:
    """Which leaf is the first that is not finite: its number, or -1.

    It is read off the 2-norms of the leaves, which are those of a clipper by 2-norms, and so no further pass over them.
    """
    if not leaves:
        return jnp.full((), -1, jnp.int32)
    bad = jnp.stack(groups.vectorized(lambda norm: ~jnp.isfinite(norm), tree_norms.of_each(leaves, 2)))
    return jnp.where(jnp.any(bad), jnp.argmax(bad).astype(jnp.int32), -1)


def counted(total: jax.Array, happened: jax.Array) -> jax.Array:
    """A count, one higher if it happened."""
    return jnp.where(happened, jnp.asarray(optax.safe_increment(total)), total)


def _encoded(names: list[str]) -> jax.Array:
    """The names as bytes: JSON, in which a key may hold any character."""
    return jnp.asarray(np.frombuffer(json.dumps(names).encode(), np.uint8))


def decoded(names: Any) -> list[str]:
    """The names that `_encoded` made bytes of."""
    return json.loads(bytes(names))


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
