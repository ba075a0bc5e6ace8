"""Bounds: numbers, arrays, optax schedules, or prefix pytrees of these.

A threshold with a schedule among its bounds counts its own steps; without one it has no state.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip import leaves

Bound: TypeAlias = Any


class ScheduleState(NamedTuple):
    """State of a transformation whose bound follows a schedule.

    Attributes:
      schedule_step: int32 scalar, the number of updates so far, which the schedules are called with.
    """

    schedule_step: jax.Array


def init(*given: Bound) -> ScheduleState | optax.EmptyState:
    """The state that bounds need."""
    if any(callable(leaf) for leaf in jax.tree.leaves(given)):
        return ScheduleState(jnp.zeros((), jnp.int32))
    return optax.EmptyState()


def resolve(given: Sequence[Bound], state: Any, tree: Any) -> tuple[list[Any], Any]:
    """The bounds of this step, and the state one step on (a state without a schedule, None too, stays what it was).

    Returns:
      For each bound, one number for all of `tree` or a pytree of its structure; and the state.
    """
    scheduled = any(callable(leaf) for leaf in jax.tree.leaves(tuple(given)))
    if not scheduled:
        return [_spread(bound, tree) for bound in given], state
    if not isinstance(state, ScheduleState):
        raise ValueError(f"a bound is a schedule, which needs the ScheduleState that `init` makes; got {state!r}")
    now = [jax.tree.map(lambda leaf: leaf(state.schedule_step) if callable(leaf) else leaf, bound) for bound in given]
    step = jnp.asarray(optax.safe_increment(state.schedule_step))
    return [_spread(bound, tree) for bound in now], ScheduleState(step)


def _spread(bound: Any, tree: Any) -> Any:
    """A prefix pytree brought to the structure of `tree`; one number stays one number."""
    if jnp.isscalar(bound):
        return bound
    spread = leaves.broadcast("a bound does not fit what it bounds", bound, tree)
    for path, entry, bounded in zip(leaves.paths(tree), jax.tree.leaves(spread), jax.tree.leaves(tree), strict=True):
        shape, whole = jnp.shape(entry), jnp.shape(bounded)
        if not _fits(shape, whole):
            raise ValueError(f"a bound of shape {shape} does not fit {path!r}, where what it bounds has shape {whole}")
    return spread


def _fits(shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """Whether an array of one shape broadcasts to another without changing it."""
    return len(shape) <= len(whole) and all(
        length in (1, full) for length, full in zip(reversed(shape), reversed(whole), strict=False)
    )


def as_array(value: Any, dtype: Any) -> jax.Array | np.ndarray:
    """A number or array of a bound, in `dtype`; a Python number past the largest of `dtype` is inf."""
    if isinstance(value, jax.Array):
        return value.astype(dtype)
    with np.errstate(over="ignore"):
        return np.asarray(value).astype(dtype)
