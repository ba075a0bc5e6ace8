"""Bounds: numbers, arrays, optax schedules, or prefix pytrees of these.

A threshold with a schedule among its bounds counts its own steps; without one it has no state.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

Bound: TypeAlias = Any


class ScheduleState(NamedTuple):
    """State of a transformation whose bound follows a schedule.

    Attributes:
      schedule_step: int32 scalar, the number of updates so far, which the schedules are called with.
    """

    schedule_step: jax.Array


def init(named: Mapping[str, Bound]) -> ScheduleState | optax.EmptyState:
    """The state that bounds need, given by their arguments' names."""
    if any(callable(leaf) for leaf in jax.tree.leaves(tuple(named.values()))):
        return ScheduleState(jnp.zeros((), jnp.int32))
    return optax.EmptyState()


def resolve(named: Mapping[str, Bound], state: Any, tree: Any) -> tuple[list[Any], Any]:
    """The bounds of this step, and the state one step on (a state without a schedule, None too, stays what it was).

    Returns:
      For each bound, one number for all of `tree` or a pytree of its structure; and the state.
    """
    now = {
        name: jax.tree.map(lambda leaf: leaf(state.schedule_step) if callable(leaf) else leaf, bound)
        for name, bound in named.items()
    }
    if isinstance(state, ScheduleState):
        state = ScheduleState(jnp.asarray(optax.safe_increment(state.schedule_step)))
    return _spread(now, tree), state


def _spread(named: Mapping[str, Any], tree: Any) -> list[Any]:
    """Prefix pytrees brought to the structure of `tree`; one number stays one number."""
    spread: list[Any] = []
    for name, bound in named.items():
        try:
            spread.append(bound if callable(bound) or jnp.isscalar(bound) else jax.tree.broadcast(bound, tree))
        except ValueError as error:
            raise ValueError(f"{name} does not fit what it is to bound: {error}") from error
    return spread


def as_array(value: Any, dtype: Any) -> jax.Array | np.ndarray:
    """A number or array of a bound, in `dtype`; a Python number past the largest of `dtype` is inf."""
    if isinstance(value, jax.Array):
        return value.astype(dtype)
    with np.errstate(over="ignore"):
        return np.asarray(value).astype(dtype)
