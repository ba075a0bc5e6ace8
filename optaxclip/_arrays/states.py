"""States as they arrive: of the right kind, and with jax's arrays in them."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip._arrays.trees import Tree

State = TypeVar("State")


def of_kind(kind: type[State], state: Tree, caller: str) -> State:
    """A state of the class `kind`, as jax's arrays.

    Args:
      kind: the class that the caller's `init` makes.
      state: what `update` was given.
      caller: the transformation's name, for the message.

    Raises:
      ValueError: if it is the state of another transformation.
    """
    if not isinstance(state, kind):
        raise ValueError(wrong(caller, kind.__name__, described(state)))
    return as_arrays(state)


def wrong(caller: str, expected: str, came: str) -> str:
    """What the message says wherever a state does not fit."""
    return (
        f"the state of {caller} must be {expected}, got {came}. Pass the state that its own init made, at its place in "
        "the chain; after a change of arguments, of the chain or of the tree, bring the old one over: "
        "state, report = optaxclip.migrate(tx, params, old_state)"
    )


def described(state: Tree) -> str:
    """What a state is, for messages."""
    if type(state) in (tuple, list):
        return f"a {type(state).__name__} of {len(state)}: {', '.join(map(described, state))}"
    return "None" if state is None else type(state).__name__


def as_arrays(tree: Tree) -> Any:
    """A pytree of jax's arrays, also where a checkpoint or a pickle returned NumPy's or Python's numbers."""
    return jax.tree.map(_as_array, tree)


def _as_array(leaf: Any) -> Any:
    if not isinstance(leaf, bool | int | float | complex | np.ndarray | np.generic):
        return leaf
    dtype = np.asarray(leaf).dtype
    if not (jnp.issubdtype(dtype, jnp.number) or dtype == np.bool_) or dtype == jax.dtypes.float0:
        return leaf
    # With a dtype of its own: a Python number would be weakly typed, and a scan's carry would change its type. Whole
    # numbers are counts, and these have 32 bits.
    return jnp.asarray(leaf, jnp.int32 if type(leaf) is int else jax.dtypes.canonicalize_dtype(dtype))
