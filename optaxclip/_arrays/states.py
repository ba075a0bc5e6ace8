"""Checks of states: they must have the right type, and their numbers become jax arrays."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip._arrays.trees import Tree

State = TypeVar("State")


def of_kind(kind: type[State], state: Tree, caller: str) -> State:
    """Checks that a state has the class `kind`, and returns it with jax arrays.

    Args:
      kind: the class that the caller's `init` makes.
      state: what `update` received.
      caller: the name of the transformation, for the message.

    Raises:
      ValueError: if it is the state of another transformation.
    """
    if not isinstance(state, kind):
        raise ValueError(wrong(caller, kind.__name__, described(state)))
    return as_arrays(state)


def wrong(caller: str, expected: str, came: str) -> str:
    """Returns the message for a state that does not fit."""
    return (
        f"the state of {caller} must be {expected}, got {came}. Pass the state that its own init made. "
        "After a change of arguments, chain or parameter tree, convert the old state: "
        "state, report = optaxclip.migrate(tx, params, old_state)"
    )


def described(state: Tree) -> str:
    """Describes a state by its types, for messages."""
    if type(state) in (tuple, list):
        return f"a {type(state).__name__} of {len(state)}: {', '.join(map(described, state))}"
    return "None" if state is None else type(state).__name__


def as_arrays(tree: Tree) -> Any:
    """Returns a pytree of jax arrays. A checkpoint or a pickle may have NumPy arrays or Python numbers instead."""
    return jax.tree.map(_as_array, tree)


def _as_array(leaf: Any) -> Any:
    if not isinstance(leaf, bool | int | float | complex | np.ndarray | np.generic):
        return leaf
    dtype = np.asarray(leaf).dtype
    if not (jnp.issubdtype(dtype, jnp.number) or dtype == np.bool_) or dtype == jax.dtypes.float0:
        return leaf
    # The dtype is explicit: a Python number would be weakly typed, and would change the carry type of a scan. Python
    # integers are counts, which have 32 bits.
    return jnp.asarray(leaf, jnp.int32 if type(leaf) is int else jax.dtypes.canonicalize_dtype(dtype))
