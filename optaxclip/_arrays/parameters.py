"""The parameters beside the updates: which leaves are parameters, and which gradients are missing."""

from typing import Any

import jax
import jax.numpy as jnp

from optaxclip._arrays import dtypes, trees
from optaxclip._arrays.trees import Tree

# optax has this text in a private module. It is the message that users know.
NO_PARAMS = (
    "You are using a transformation that requires the current value of parameters, but you are not passing `params` "
    "when calling `update`."
)


def beside(updates: Tree, params: Tree) -> tuple[Any, Any]:
    """Returns the updates with missing gradients filled in, and the parameters in the same containers."""
    if params is not None and _are_alike(updates, params):
        return updates, params
    params = parameters(params, updates)
    return fill_missing(updates, params), params


def _are_alike(updates: Tree, params: Tree) -> bool:
    flat, treedef = jax.tree.flatten(params)
    others = [leaf for leaf in flat if not (hasattr(leaf, "dtype") and hasattr(leaf, "shape"))]
    return not others and treedef == jax.tree.structure(updates)


def parameters(params: Tree, updates: Tree = None) -> Any:
    """Returns `params` in the containers of `updates`, with None in place of everything that is no parameter.

    A whole model may be passed as its parameters: an Equinox module also holds functions, strings and settings. Arrays
    are parameters. A Python number is one only if `updates` has a leaf in its place. If the containers differ (a dict
    beside a `FrozenDict`, Flax's boxes beside plain arrays), the keys are matched.
    """
    if params is None:
        return None
    if updates is None:
        return jax.tree.map(lambda leaf: leaf if dtypes.of(leaf) is not None else None, params)
    if _are_alike(updates, params):
        return params
    aligned = trees.aligned(params, updates)
    params = params if aligned is None else aligned

    def known(update: Any, param: Any) -> Any:
        may_be_number = update is not None
        return jax.tree.map(
            lambda leaf: leaf if _is_array(leaf) or (may_be_number and dtypes.of(leaf) is not None) else None, param
        )

    try:
        return jax.tree.map(known, updates, params, is_leaf=trees.is_none)
    except ValueError:  # the structures differ: only callers that need parameters refuse that
        return jax.tree.map(lambda leaf: leaf if _is_array(leaf) else None, params)


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and hasattr(leaf, "shape")


def require_params(updates: Tree, params: Tree) -> None:
    """Raises ValueError unless there are parameters with the structure and shapes of the updates."""
    if params is None:
        raise ValueError(NO_PARAMS)
    if _shapes(updates) == _shapes(params):
        return
    problem = "updates and params differ in structure"
    aligned = jax.tree.leaves(trees.broadcast(problem, updates, params, ("updates", "params")))
    known = trees.paths(params)
    if missing := sorted(set(trees.paths(updates)) - set(known)):
        raise ValueError(
            f"update {missing[0]!r} has no parameter beside it; params has arrays at {trees.listed(known)}"
        )
    for path, param, update in zip(known, jax.tree.leaves(params), aligned, strict=True):
        if jnp.shape(param) != jnp.shape(update):
            raise ValueError(f"update and parameter {path!r} differ in shape: {jnp.shape(update)}, {jnp.shape(param)}")


def _shapes(tree: Tree) -> tuple[Any, list[tuple[int, ...]]]:
    flat, treedef = jax.tree.flatten(tree)
    return treedef, list(map(jnp.shape, flat))


def fill_missing(updates: Tree, params: Tree) -> Any:
    """Fills in zeros where `updates` has None and the parameters have leaves, so that groups and states fit.

    Args:
      updates: a pytree.
      params: the parameters, or a state of their structure.

    Raises:
      ValueError: if the structures differ.
    """
    if params is None or not any(map(trees.is_none, jax.tree.leaves(updates, is_leaf=trees.is_none))):
        return updates

    def zeros(param: Any) -> Any:
        return jnp.zeros_like(param) if dtypes.is_inexact(param) else param

    def fill(update: Any, param: Any) -> Any:
        return jax.tree.map(zeros, param) if update is None else update

    try:
        return jax.tree.map(fill, updates, params, is_leaf=trees.is_none)
    except ValueError as error:
        problem = "updates (None means no gradient) and the parameters or the state differ in structure"
        parting = trees.difference(updates, params, ("updates", "params or the state"))
        raise ValueError(f"{problem}: {parting or error}") from None


def drop_missing(updates: Tree, filled: Any) -> Any:
    """Returns `filled` with None in the places where `updates` has None."""
    return jax.tree.map(lambda old, new: None if old is None else new, updates, filled, is_leaf=trees.is_none)
