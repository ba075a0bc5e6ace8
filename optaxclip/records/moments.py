"""Mean and standard deviation of past norms, from the states of thresholds that keep them."""

import functools
from typing import Any

import jax

from optaxclip._arrays.trees import Tree
from optaxclip.records import restored


@functools.singledispatch
def of_kind(state: Any) -> tuple[Any, Any]:
    """Returns mean and standard deviation of each group, two vectors. Each type of state registers its rule."""
    raise NotImplementedError(type(state))


def of_threshold(state: Tree) -> tuple[Any, Any] | None:
    """Returns mean and standard deviation from the state of a threshold, or from the first in a chain that has them."""
    kinds = [kind for kind in of_kind.registry if kind is not object]

    def has_moments(node: Any) -> bool:
        return any(restored.is_of(kind, node) for kind in kinds)

    for node in jax.tree.leaves(state, is_leaf=has_moments):
        for kind in kinds:
            if restored.is_of(kind, node):
                return of_kind(restored.unboxed(restored.as_kind(kind, node)))
    return None
