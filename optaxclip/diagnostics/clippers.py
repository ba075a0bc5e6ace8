"""Clippers for replays: what they measure of the updates behind a history, and what they permit."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip._arrays import trees
from optaxclip._arrays.trees import Tree
from optaxclip.core import Clip, MadeOf, Norms, Threshold, permit, shapes_of
from optaxclip.diagnostics.histories import ONE_GROUP, History

Clipper = optax.GradientTransformation
UNKNOWN = ("one/leaf", "another/leaf")  # in place of the leaves of a history, if they are unknown


def named(clippers: tuple[Clipper, ...], by_name: Mapping[str, Clipper]) -> dict[str, MadeOf]:
    """Returns what each clipper was made of, by its name. Clippers without a name are numbered.

    Raises:
      ValueError: if a clipper was not made by `clip_by`.
    """
    numbered = {f"clipper {number}": each for number, each in enumerate(clippers, 1)}
    return {name: _made_of(name, each) for name, each in (numbered | dict(by_name)).items()}


def _made_of(name: str, clipper: Any) -> MadeOf:
    made_of = clipper.made_of if isinstance(clipper, Clip) else None
    if made_of is None:
        raise ValueError(
            f"{name} must be a clipper that clip_by makes, such as zclip(), neither wrapped nor chained, "
            f"got a {type(clipper).__name__}"
        )
    return made_of


class Permitted(NamedTuple):
    """What a clipper permits over a history, in arrays of shape (n, G).

    Attributes:
      limit: the upper end of the band; inf if there is no bound.
      norm_after: the norm after the clip.
      clipped: whether the clip scaled the group.
    """

    limit: np.ndarray
    norm_after: np.ndarray
    clipped: np.ndarray


def permitted(name: str, made_of: MadeOf, history: History) -> Permitted:
    """Asks a clipper's threshold about each step of a history, in order and from its initial state.

    Raises:
      ValueError: if the clipper measures other groups than the history has, or needs more than their norms.
    """
    measured = _measured(name, made_of, history)
    order = _order(name, trees.paths(measured), history.groups)

    def no_params() -> Norms:
        raise ValueError(
            f"{name} can't be replayed: its threshold asks for the parameters, but a history has only norms"
        )

    limits, goals, changed = jax.device_get(
        _scan(made_of.threshold, measured, jnp.asarray(history.norms[:, order]), no_params)
    )
    back = np.argsort(order)
    limits, goals, changed = limits[:, back], goals[:, back], changed[:, back]
    unbounded = limits >= np.finfo(limits.dtype).max
    return Permitted(
        np.where(unbounded, limits.dtype.type(math.inf), limits), np.where(changed, goals, history.norms), changed
    )


def _scan(threshold: Threshold, measured: Norms, rows: jax.Array, param_norms: Any) -> Any:
    """Returns the limit of each norm, the norm that the clip aims at, and whether it scales at all."""
    treedef = jax.tree.structure(measured)

    def step(state: Any, row: jax.Array) -> Any:
        judged = permit(threshold, treedef.unflatten(list(row)), state, param_norms)
        factors = treedef.flatten_up_to(judged.factors)
        columns = (
            jax.tree.leaves(judged.limits),
            [factor.goal for factor in factors],
            [factor.second != 1 for factor in factors],
        )
        return judged.state, tuple(jnp.stack(column) for column in columns)

    return jax.jit(lambda rows: jax.lax.scan(step, threshold.init(measured), rows)[1])(rows)


def _measured(name: str, made_of: MadeOf, history: History) -> Norms:
    """Returns the shapes that the clipper's norm measures of the updates behind a history."""
    updates = _tree(history.leaves or UNKNOWN)
    try:
        measured = shapes_of(made_of.norm, updates, None)
    except ValueError as error:
        raise ValueError(f"{name} can't be replayed on these norms: {error}") from error
    if any(norm.shape for norm in jax.tree.leaves(measured)):
        raise ValueError(
            f"{name} can't be replayed on these norms: {made_of.norm} measures parts of leaves, but a history has at "
            "most one norm per leaf"
        )
    return jax.tree.map(lambda norm: jax.ShapeDtypeStruct(norm.shape, history.norms.dtype), measured)


def _tree(leaves: tuple[str, ...]) -> Tree:
    """Returns shapes of matrices at these paths, as nested dicts."""
    tree: dict[str, Any] = {}
    for path in leaves:
        *above, last = path.split("/")
        branch = tree
        for key in above:
            branch = branch.setdefault(key, {})
        branch[last] = jax.ShapeDtypeStruct((2, 2), jnp.float32)
    return tree


def _order(name: str, paths: list[str], groups: tuple[str, ...] | None) -> list[int]:
    """Returns the column of a history for each group of a clipper."""
    if len(paths) == 1 and groups == ONE_GROUP:
        return [0]
    if groups is None:
        raise ValueError(
            "this record does not know the names of its groups: restore them with optaxclip.migrate, or run a step"
        )
    if set(paths) != set(groups):
        if groups == ONE_GROUP:
            differs = "it measures several per step, but there is one"
        elif len(paths) == 1:
            differs = f"it measures one per step, but there is one for each of {trees.listed(list(groups))}"
        else:
            differs = f"its groups are {trees.listed(paths)}, but theirs are {trees.listed(list(groups))}"
        raise ValueError(f"{name} can't be replayed on these norms: {differs}")
    return [groups.index(path) for path in paths]
