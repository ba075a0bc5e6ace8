"""Optimizer steps with every transformation, and with optax's."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
import optax

import optaxclip as oc
from tests import table
from tests.benchmarks import clips, trees

Make = Callable[[], Any]  # makes an optimizer

ADAM = "adam"
APPLY_IF_FINITE = "optax.apply_if_finite(adam)"
TREES: dict[str, Callable[..., Any]] = {
    **trees.TREES,
    "gpt2s": partial(trees.gpt2, layers=3),
    "one": lambda dtype=np.float32: {"kernel": jax.ShapeDtypeStruct((4096, 4096), dtype)},
}


def adam() -> optax.GradientTransformation:
    return optax.adam(1e-3)


def before_adam(make: Make) -> Any:
    return optax.chain(make(), adam())


def after_adam(make: Make) -> Any:
    return optax.chain(optax.scale_by_adam(), make(), optax.scale(-1e-3))


def rows(*, any_tree: bool) -> dict[str, Make]:
    """The rows of the table of tests, before Adam; only those for every tree, or all, for that table's own."""
    chosen = (row for row in table.ROWS if row.any_tree or not any_tree)
    return {row.name: partial(before_adam, row.make) for row in chosen}


# The arguments that the rows don't have.
MORE: dict[str, Make] = {
    "clip_by_global_norm, record=100": partial(before_adam, lambda: oc.clip_by_global_norm(1.0, record=100)),
    "clip_by_leaf_norm, record=100": partial(before_adam, lambda: oc.clip_by_leaf_norm(1.0, record=100)),
    "skip_nonfinite(adam)": lambda: oc.skip_nonfinite(adam()),
    "skip_spikes(adam)": lambda: oc.skip_spikes(adam(), oc.thresholds.mean_std(6.0)),
}


def steps() -> dict[str, Make]:
    """Adam alone, optax's transformations, and ours: before Adam, and after it where optax has the same."""
    known = {ADAM: adam, APPLY_IF_FINITE: lambda: optax.apply_if_finite(adam(), 5)}
    known |= {name: partial(before_adam, make) for name, make in clips.OPTAX.items()}
    known |= rows(any_tree=True) | MORE
    for name, make in clips.OPTAX.items():
        ours = name.removeprefix("optax.")
        known[f"after adam: {name}"] = partial(after_adam, make)
        known[f"after adam: {ours}"] = partial(after_adam, clips.OURS[ours])
    return known
