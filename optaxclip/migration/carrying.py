"""Decides which arrays of an old part fit a new one. Some types of state register their own rules."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from optaxclip._arrays import dtypes
from optaxclip._numerics import arithmetic
from optaxclip.migration.parts import Part, Path
from optaxclip.records import ClipStats, recorder
from optaxclip.records.names import Names
from optaxclip.thresholds.deviations import LogWindowState, WindowState
from optaxclip.thresholds.quantiles import RecentNormsState


class Carried(NamedTuple):
    """What replaces an array from `init`.

    Attributes:
      value: the old array, or a conversion of it.
      note: describes the conversion in the report; empty for a copy.
    """

    value: Any
    note: str = ""


@functools.singledispatch
def carried(node: Any, new: Part, old: Part) -> dict[Path, Carried]:
    """Returns what of an old part goes into a new one, by the path inside: arrays of the same shape and kind of dtype.

    Args:
      node: the new part's own NamedTuple, whose type selects the rule.
      new: the new part.
      old: the old part, of the same type. From a checkpoint it may be a dict with the same fields.
    """
    del node
    return {
        path: Carried(old.leaves[path], _change_of_dtype(leaf, old.leaves[path]))
        for path, leaf in new.leaves.items()
        if path in old.leaves and _fits(leaf, old.leaves[path])
    }


def _fits(new: Any, old: Any) -> bool:
    if dtypes.of(new) is None or dtypes.of(old) is None:
        return False
    return np.shape(new) == np.shape(old) and _is_alike(dtypes.of(new), dtypes.of(old))


def _is_alike(one: Any, other: Any) -> bool:
    """Whether two dtypes are of one kind: both real floats, both complex, both integers, or the same."""
    kinds = (jnp.floating, jnp.complexfloating, jnp.integer)
    return one == other or any(jnp.issubdtype(one, kind) and jnp.issubdtype(other, kind) for kind in kinds)


def _change_of_dtype(new: Any, old: Any) -> str:
    """Describes a change of dtype for the report. Empty for a Python number, which has no dtype of its own."""
    came = getattr(old, "dtype", None)
    return "" if came is None or came == dtypes.of(new) else f"{came}, now {dtypes.of(new)}"


def fresh(value: Any, like: Any) -> jax.Array:
    """Copies a value in the dtype of `like`. If it is not on a device yet, it goes to that of `like`."""
    if not hasattr(value, "dtype"):
        return jnp.asarray(value, like.dtype)  # a Python number would be weakly typed
    if not isinstance(value, jax.Array) and getattr(like, "committed", False):
        array = jax.device_put(np.array(value), like.sharding)
    else:
        array = jnp.array(value, copy=True)
    if array.dtype == like.dtype:
        return array
    if jnp.issubdtype(like.dtype, jnp.floating):
        return arithmetic.narrowed(array, like.dtype)
    return array.astype(like.dtype)


@carried.register(WindowState)
@carried.register(LogWindowState)
@carried.register(RecentNormsState)
def _window(node: WindowState | LogWindowState | RecentNormsState, new: Part, old: Part) -> dict[Path, Carried]:
    ring, seen = [(name,) for name in node._fields[:2]]
    copied = carried.dispatch(object)(node, new, old)
    if ring in copied or seen not in copied or ring not in old.leaves:
        return copied
    before, after = np.shape(old.leaves[ring])[-1], np.shape(new.leaves[ring])[-1]
    moved, counted = _resized(jnp.asarray(old.leaves[ring]), jnp.asarray(old.leaves[seen]), after)
    copied[ring] = Carried(moved, f"{before} norms, now {after}")
    copied[seen] = Carried(counted, f"at most {before}, the norms that are there") if after > before else copied[seen]
    return copied


def _resized(ring: jax.Array, seen: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """Returns rings in another length with their newest entries, and the new counts. Each row is a ring.

    Entry number t of a ring is at `t % length`. A longer ring lacks older entries, so its count starts at those that it
    has.
    """
    before = ring.shape[-1]
    counted = jnp.minimum(seen, before) if length > before else seen
    places = jnp.arange(length, dtype=seen.dtype)[None, :]
    last = counted[:, None] - 1
    number = last - (last - places) % length  # of the newest entry that belongs here, by the new count
    is_there = (number >= 0) & (number > last - min(before, length))
    entry = number + (seen - counted)[:, None]
    values = jnp.take_along_axis(ring, entry % before, axis=1)
    # Some windows are filled with their first norm. It stays where no other norm is yet; other windows have 0 there.
    first = jnp.where(seen < before, ring[:, -1], jnp.zeros_like(ring[:, -1]))
    return jnp.where(is_there, values, first[:, None]), counted


@carried.register
def _record(node: ClipStats, new: Part, old: Part) -> dict[Path, Carried]:
    if node.names != (old.node.names if old.is_typed else Names()):
        return {}  # other groups, or another model
    if np.ndim(old.leaves.get(("clip_steps",), 0)) != 1:
        return {}  # several replicas
    copied = carried.dispatch(object)(node, new, old)
    before, after = (len(part.leaves["clip_steps",]) for part in (old, new))
    groups = {np.shape(part.leaves["clip_norm",])[-1] for part in (old, new)}
    if before == after or len(groups) > 1:
        return copied
    whole = {path: one.value for path, one in copied.items()} | _rings(new, old)
    return {path: Carried(value, f"{before} steps, now {after}") for path, value in whole.items()}


def _rings(new: Part, old: Part) -> dict[Path, jax.Array]:
    """Returns the rings of a record in another length, with each row at the place of its step."""
    now, first = (jnp.asarray(old.leaves[name,]) for name in ("recorded_steps", "first_nonfinite_step"))
    found: dict[Path, jax.Array] = {}
    for ring in recorder.RINGS:
        steps, length = jnp.asarray(old.leaves[f"{ring}_steps",]), len(new.leaves[f"{ring}_steps",])
        last = recorder.last_step(jnp, ring, length, now, first)
        is_in = (steps > jnp.maximum(0, last - length)) & (steps <= last)
        places = jnp.where(is_in, (steps - 1) % length, length)  # past the end, where writes are dropped
        for path in new.leaves:
            if path[0].startswith(f"{ring}_"):
                found[path] = jnp.asarray(new.leaves[path]).at[places].set(jnp.asarray(old.leaves[path]), mode="drop")
    return found


def _equal(one: Any, other: Any) -> bool:
    is_known = not isinstance(one, Tracer) and not isinstance(other, Tracer)
    return np.array_equal(one, other) if is_known else np.shape(one) == np.shape(other)


@carried.register
def _injected(node: optax.InjectStatefulHyperparamsState, new: Part, old: Part) -> dict[Path, Carried]:
    """Keeps old values, because a run may have changed them, but not the values of schedules."""
    now, before = set(_schedules(node)), set(_schedules(old.node))
    kept: dict[Path, Carried] = {}
    for path, (value, note) in carried.dispatch(object)(node, new, old).items():
        if path[0] != "hyperparams":
            kept[path] = Carried(value, note)
        elif path[1] not in now ^ before:
            setting = "" if path[1] in now else _setting(value, new.leaves[path])
            kept[path] = Carried(value, ", ".join(filter(None, (setting, note))))
    return kept


def _schedules(node: Any) -> Mapping[str, Any]:
    states = node["hyperparams_states"] if isinstance(node, Mapping) else node.hyperparams_states
    return states or {}


def _setting(old: Any, new: Any) -> str:
    if _equal(new, old):
        return ""
    if np.shape(new) or isinstance(old, Tracer) or isinstance(new, Tracer):
        return "tx has another value"
    return f"{float(old):g}; tx has {float(new):g}"
