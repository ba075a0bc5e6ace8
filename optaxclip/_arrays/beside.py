"""Works leaf by leaf, with a state per leaf: for methods that are not one norm against one threshold."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip._arrays import dtypes, states, trees
from optaxclip._arrays.trees import Tree


def each_leaf(fn: Callable[..., tuple[Any, ...]], updates: Tree, *others: Any) -> tuple[Any, ...]:
    """Applies a function to every leaf that holds floats, together with its entries in `others`.

    Args:
      fn: `(leaf, *beside) -> (new leaf, *new beside)`.
      updates: a pytree. Leaves without floats stay unchanged, and so do their entries in `others`.
      *others: pytrees with the structure of the parameters.

    Returns:
      The new `updates`, followed by the new others.

    Raises:
      ValueError: if the structure or a shape in one of the others differs from `updates`.
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
    """Raises ValueError unless `state` has an array of the right shape for every leaf of the updates."""
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
    """The results for one leaf. To jax it is a leaf itself."""

    def __init__(self, entries: tuple[Any, ...]) -> None:
        self.entries = entries


def zeros_like(params: Tree, dtype: Any = None, *, min_bits: int = 16) -> Any:
    """Returns zeros like every parameter; a scalar 0 for what has no numbers.

    The dtype is `dtype` if it is given, else `dtypes.of_state` of the parameter's dtype: float32 for parameters of
    fewer than `min_bits` bits. For a complex parameter the zeros are complex in any case.
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
    """Returns real zeros like every parameter."""

    def real(leaf: jax.Array) -> jax.Array:
        return jnp.asarray(jnp.real(leaf), dtype) if jnp.iscomplexobj(leaf) else leaf

    return jax.tree.map(real, zeros_like(params, dtype))
