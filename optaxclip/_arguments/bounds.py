"""Bounds: numbers, arrays, optax schedules, or prefix pytrees of these. None in a pytree is no bound for that leaf.

A threshold with a schedule among its bounds counts its own steps; without one it has no state.
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
      schedule_step: int32 scalar, the number of updates so far, which the schedules are called with.
    """

    schedule_step: jax.Array


def init(*given: Bound) -> ScheduleState | optax.EmptyState:
    """The state that bounds need."""
    return ScheduleState(jnp.zeros((), jnp.int32)) if is_scheduled(*given) else optax.EmptyState()


def resolve(given: Sequence[Bound], state: Tree, tree: Tree) -> tuple[list[Any], Any]:
    """The bounds of this step, and the state one step on (a state without a schedule, None too, stays what it was).

    Returns:
      For each bound, one number for all of `tree` or a pytree of its structure, in which None is no bound; and the
      state.
    """
    if not is_scheduled(*given):
        return [_spread(bound, tree) for bound in given], state
    step = states.of_kind(ScheduleState, state, "a bound that follows a schedule").schedule_step
    now = [jax.tree.map(functools.partial(_at, step), bound, is_leaf=trees.is_function) for bound in given]
    return [_spread(bound, tree) for bound in now], ScheduleState(jnp.asarray(optax.safe_increment(step)))


def is_scheduled(*given: Bound) -> bool:
    """Whether there is a schedule among bounds, so that they need a count of steps."""
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
    """A prefix pytree brought to the structure of `tree`; one number stays one number."""
    if jnp.isscalar(bound):
        return bound
    entries = trees.spread("a bound does not fit", bound, tree, ("the bound", "what it bounds"))
    flat, treedef = jax.tree.flatten(tree)
    for path, entry, bounded in zip(trees.paths(tree), entries, flat, strict=True):
        if entry is not None and not _fits(jnp.shape(entry), jnp.shape(bounded)):
            raise ValueError(
                f"a bound of shape {jnp.shape(entry)} does not fit {path!r}, where what it bounds has shape "
                f"{jnp.shape(bounded)}"
            )
    return treedef.unflatten(entries)


def _fits(shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """Whether an array of one shape broadcasts to another without changing it."""
    return len(shape) <= len(whole) and all(
        length in (1, full) for length, full in zip(reversed(shape), reversed(whole), strict=False)
    )


def as_array(value: Any, dtype: Any, *, none: float = math.inf) -> jax.Array | np.ndarray:
    """A number or array of a bound, in `dtype`.

    A Python number past the largest of `dtype` is inf. None, where a pytree of bounds has one, is the number `none`.
    """
    value = none if value is None else value
    if isinstance(value, jax.Array):
        return value.astype(dtype)
    with np.errstate(over="ignore"):
        return np.asarray(value).astype(dtype)


def highest(dtype: Any) -> float:
    """The upper end of a band that bounds nothing. It is no infinity, which `jax_debug_infs` would report."""
    return float(jnp.finfo(dtype).max)
