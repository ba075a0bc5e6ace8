"""The first step of a row in every way in which optax puts it to work and on every kind of tree, in one program.

XLA merges what the ways have in common, so that together they take little longer to compile than the longest.
"""

import functools
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.conformance.rows import transformation
from tests.table import params, tree

MASK = {"dense": True, "scale": False}
MISSING = ("dense/bias", "dense", "scale")
LITTLE = {
    "dict": {},
    "tuple": (),
    "none": {"a": None},
    "scalar": np.float32(2),
    "empty": np.ones((0, 2), np.float32),
    "integers": {"a": np.arange(3, dtype=np.int32)},
}


class Way(NamedTuple):
    """A transformation, and what each of its steps is given; without `weights`, it is told of none."""

    tx: optax.GradientTransformationExtraArgs
    updates: Any
    weights: Any = None
    extra_args: Mapping[str, Any] = {}
    steps: int = 1


class Outcome(NamedTuple):
    """What went into the last step and came out of it."""

    given: Any
    first_state: Any
    updates: Any
    state: Any


def compositions(row, dtype="float32"):
    """Every way in which optax puts a transformation to work, around a fresh one."""
    tx = row.make()
    # Left to itself, inject_hyperparams gives a hyperparameter the parameters' dtype, and no bound is complex.
    bounds_dtype = jnp.float32 if dtype == "complex64" else None
    inject = optax.inject_hyperparams(row.factory, row.static_args, hyperparam_dtype=bounds_dtype)
    return {
        "chain": optax.chain(tx, optax.trace(0.9), optax.scale(-0.5)),
        "masked": optax.masked(tx, MASK),
        "partition": optax.partition({True: tx, False: optax.set_to_zero()}, MASK),
        "MultiSteps": optax.MultiSteps(
            tx, 2, accumulator_dtype=jnp.promote_types(dtype, "float32")
        ).gradient_transformation(),
        "inject_hyperparams": inject(*row.args, **row.kwargs),
    }


def odd_leaves():
    """What else is found in a tree of gradients; none of it can be clipped."""
    return {
        "steps": jnp.arange(3),
        "flag": jnp.asarray(True),
        "no_gradient": np.zeros((2,), jax.dtypes.float0),
        "key": jax.random.key(0),
        "empty": jnp.zeros((0, 3)),
    }


def without(updates, missing):
    """The updates with None in place of a leaf, or of a whole branch."""
    some = {"dense": dict(updates["dense"]), "scale": updates["scale"]}
    *above, last = missing.split("/")
    functools.reduce(operator.getitem, above, some)[last] = None
    return some


def ways(row, updates, weights):
    """Every way, by name."""
    tx, odd = transformation(row), odd_leaves()
    odd_updates, odd_weights = (tree | {"dense": tree["dense"] | odd} for tree in (updates, weights))
    found = {name: Way(around, updates, weights) for name, around in compositions(row).items() if name != "MultiSteps"}
    found["inject_hyperparams twice"] = found["inject_hyperparams"]._replace(steps=2)
    found["unknown arguments"] = Way(tx, updates, weights, {"value": 1.0, "something_else": jnp.zeros(2)})
    found["odd leaves"] = Way(tx, odd_updates, odd_weights)
    found |= {f"no {missing}": Way(tx, without(updates, missing), weights) for missing in MISSING}
    if not row.needs_params:
        found["no parameters"] = Way(tx, updates)
    if row.any_tree:
        found |= {name: Way(tx, few, few) for name, few in LITTLE.items()}
    return found


@functools.cache
def outcomes(row):
    """What comes of every way, by name."""

    def outcome(way, weights):
        given = jax.tree.map(jnp.asarray, way.updates)
        first = state = way.tx.init(weights if way.weights is None else way.weights)
        for _ in range(way.steps):
            updates, state = way.tx.update(given, state, way.weights, **way.extra_args)
        return Outcome(given, first, updates, state)

    @jax.jit
    def program(updates, weights):
        return {name: outcome(way, weights) for name, way in ways(row, updates, weights).items()}

    return program(tree(0, "float32"), params("float32"))
