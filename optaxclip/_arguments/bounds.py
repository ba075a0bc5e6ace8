"""Bounds: numbers, arrays, optax schedules, or prefix pytrees of these.

None in a pytree means no bound for that leaf. A threshold with a schedule among its bounds counts steps; without one it
has no state.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip._arguments import checks
from optaxclip._arrays import states, trees
from optaxclip._arrays.trees import Tree

Bound: TypeAlias = Any  # a number, an array, a schedule, or a prefix pytree of these
Number: TypeAlias = float | jax.Array


class ScheduleState(NamedTuple):
    """State of a transformation whose bound follows a schedule.

    Attributes:
      schedule_step: int32 scalar, the number of updates so far. It is the argument of the schedules.
    """

    schedule_step: jax.Array


def init(*given: Bound) -> ScheduleState | optax.EmptyState:
    """Returns the state of these bounds: a step count if one is a schedule, else an empty state."""
    return ScheduleState(jnp.zeros((), jnp.int32)) if is_scheduled(*given) else optax.EmptyState()


def resolve(given: Sequence[Bound], state: Tree, tree: Tree) -> tuple[list[Any], Any]:
    """Evaluates bounds at the current step, and advances the step count.

    Returns:
      `(bounds, state)`. Each bound is one number for all of `tree`, or a pytree of its structure in which None means no
      bound. Without a schedule the state is returned unchanged, even if it is None.
    """
    if not is_scheduled(*given):
        return [_spread(bound, tree) for bound in given], state
    step = states.of_kind(ScheduleState, state, "a bound that follows a schedule").schedule_step
    now = [jax.tree.map(functools.partial(_at, step), bound, is_leaf=trees.is_function) for bound in given]
    return [_spread(bound, tree) for bound in now], ScheduleState(jnp.asarray(optax.safe_increment(step)))


def is_scheduled(*given: Bound) -> bool:
    """Whether one of the bounds is a schedule, which needs a step count."""
    others = [bound for bound in given if not jnp.isscalar(bound)]
    return any(callable(leaf) for leaf in jax.tree.leaves(others, is_leaf=trees.is_function)) if others else False


def _at(step: jax.Array, bound: Any) -> Any:
    if not callable(bound):
        return bound
    value = bound(step)
    if not all(map(checks.is_real, jax.tree.leaves(value))):
        raise ValueError(f"the schedule of a bound must return real numbers, got {value!r}")
    return value


def _spread(bound: Any, tree: Tree) -> Any:
    """Broadcasts a prefix pytree to the structure of `tree`. One number stays one number."""
    if jnp.isscalar(bound):
        return bound
    entries = trees.spread("a bound does not fit", bound, tree, ("the bound", "what it bounds"))
    flat, treedef = jax.tree.flatten(tree)
    for path, entry, bounded in zip(trees.paths(tree), entries, flat, strict=True):
        if entry is not None and not _fits(jnp.shape(entry), jnp.shape(bounded)):
            raise ValueError(
                f"a bound of shape {jnp.shape(entry)} does not fit {path!r}: it must broadcast to shape "
                f"{jnp.shape(bounded)}"
            )
    return treedef.unflatten(entries)


def _fits(shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """Whether an array of shape `shape` broadcasts to shape `whole`."""
    return len(shape) <= len(whole) and all(
        length in (1, full) for length, full in zip(reversed(shape), reversed(whole), strict=False)
    )


def as_array(value: Any, dtype: Any, *, none: float = math.inf) -> jax.Array | np.ndarray:
    """Converts one entry of a bound to an array of `dtype`.

    A Python number above the largest float of `dtype` becomes inf. None becomes `none`.
    """
    value = none if value is None else value
    if isinstance(value, jax.Array):
        return value.astype(dtype)
    with np.errstate(over="ignore"):
        return np.asarray(value).astype(dtype)


def highest(dtype: Any) -> float:
    """Returns the upper end of a band without a bound. It is finite because `jax_debug_infs` reports inf."""
    return float(jnp.finfo(dtype).max)
