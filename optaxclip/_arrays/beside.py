"""Leaf by leaf, with state beside each leaf: for the methods that are not one norm against one threshold."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip._arrays import dtypes, states, trees
from optaxclip._arrays.trees import Tree


def each_leaf(fn: Callable[..., tuple[Any, ...]], updates: Tree, *others: Any) -> tuple[Any, ...]:
    """Applies a function to every leaf that holds floats, with what `others` have beside it.

    Args:
      fn: `(leaf, *beside) -> (new leaf, *new beside)`.
      updates: a pytree. Leaves that hold no floats stay, and so does what is beside them.
      *others: pytrees of the structure of the parameters.

    Returns:
      The new `updates`, and the new others.

    Raises:
      ValueError: if one of the others has another structure than `updates`, or a leaf of another shape.
    """
    for other in others:
        require_beside(updates, other)

    def one(leaf: Any, *beside: Any) -> _Row:
        return _Row(fn(leaf, *beside) if dtypes.is_inexact(leaf) else (leaf, *beside))

    rows = jax.tree.map(one, updates, *others)
    return tuple(
        jax.tree.map(lambda row, i=i: row.entries[i], rows, is_leaf=lambda node: isinstance(node, _Row))
        for i in range(1 + len(others))
    )


def require_beside(updates: Tree, state: Tree) -> None:
    """Raises ValueError unless a state per parameter has, for every leaf of the updates, an array of its shape."""
    flat, treedef = jax.tree.flatten(updates)
    try:
        beside = treedef.flatten_up_to(state)
    except ValueError:
        raise ValueError(
            _wrong(f"one with arrays at {trees.listed(trees.paths(updates))}", trees.listed(trees.paths(state)))
        ) from None
    for i, (leaf, array) in enumerate(zip(flat, beside, strict=True)):
        is_number = dtypes.of(array) is not None
        if dtypes.is_inexact(leaf) and not (is_number and jnp.shape(array) == jnp.shape(leaf)):
            came = f"shape {jnp.shape(array)}" if is_number else f"a {type(array).__name__}"
            raise ValueError(_wrong(f"of shape {jnp.shape(leaf)} at {trees.paths(updates)[i]!r}", f"{came} there"))


def _wrong(expected: str, came: str) -> str:
    return states.wrong("a transformation that keeps an array per parameter", expected, came)


class _Row:
    """What there is for one leaf: a leaf itself to jax."""

    def __init__(self, entries: tuple[Any, ...]) -> None:
        self.entries = entries


def zeros_like(params: Tree, dtype: Any = None, *, min_bits: int = 16) -> Any:
    """Zeros beside every parameter, in `dtypes.of_state` of its dtype or in `dtype`; a scalar beside what can't be one.

    Beside a complex parameter they are complex, whatever the dtype. Where `dtype` is None and a parameter has
    fewer than `min_bits`, its zeros are float32.
    """

    def zeros(param: Any) -> jax.Array:
        if dtypes.is_inexact(param):
            own = dtypes.of_state(jnp.result_type(param), min_bits) if dtype is None else dtype
            if dtype is not None and jnp.iscomplexobj(param):
                own = np.promote_types(dtypes.accumulator(dtype), np.complex64)
            return jnp.zeros_like(param, dtype=own)
        is_number = hasattr(param, "dtype") and jnp.issubdtype(param.dtype, jnp.number)
        return jnp.zeros_like(param) if is_number else jnp.zeros((), jnp.int32)

    return jax.tree.map(zeros, params)


def sizes_like(params: Tree, dtype: Any) -> Any:
    """Real zeros beside every parameter."""

    def real(leaf: jax.Array) -> jax.Array:
        return jnp.asarray(jnp.real(leaf), dtype) if jnp.iscomplexobj(leaf) else leaf

    return jax.tree.map(real, zeros_like(params, dtype))
