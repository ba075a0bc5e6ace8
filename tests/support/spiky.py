"""Gradients with spikes, and transformations over 1,000 steps of them in one scan."""

import jax
import jax.numpy as jnp
import numpy as np

STEPS = 1000
BLOCKS = {"a": slice(0, 3), "b": slice(3, 8)}  # the coordinates of each leaf


def gradients(rng, steps=STEPS, coordinates=8):
    """Float32 numbers as float64: a level per coordinate that falls tenfold, and spikes of ten to a thousand times.

    One step in fifty is a spike in all coordinates, one number in fifty a spike of its own.
    """
    level = np.geomspace(0.1, 10, coordinates) * 0.1 ** (np.arange(steps) / steps)[:, None]
    spikes = np.where(rng.random((steps, 1)) < 0.02, 10.0 ** rng.uniform(1, 3, (steps, 1)), 1)
    own = np.where(rng.random(level.shape) < 0.02, 10.0 ** rng.uniform(1, 3, level.shape), 1)
    return np.float32(level * spikes * own * rng.standard_normal(level.shape)).astype(np.float64)


def drive(tx, grads, observe=lambda state: ()):
    """What comes out at each step, in float64 and in the shape of `grads`, and what `observe` saw of the states."""

    @jax.jit
    def run(grads):
        params = {name: jnp.zeros(grads[0, block].shape) for name, block in BLOCKS.items()}

        def step(state, row):
            updates, state = tx.update({name: row[block] for name, block in BLOCKS.items()}, state, params)
            return state, (jnp.concatenate([updates[name] for name in BLOCKS]), observe(state))

        return jax.lax.scan(step, tx.init(params), grads)[1]

    outs, seen = run(jnp.asarray(grads, jnp.float32))
    return wide(outs), jax.tree.map(wide, seen)


def by_leaf(method, grads):
    """A `method` of the gradients of one tensor, leaf by leaf."""
    return np.concatenate([method(grads[:, block]) for block in BLOCKS.values()], axis=1)


def joined(tree):
    """An observed tree like the parameters, as steps by coordinates."""
    return np.concatenate([tree[name] for name in BLOCKS], axis=1)


def worst(ours, expected, scale=None):
    """The largest difference of all steps and coordinates, relative to what is expected or to `scale`."""
    scale = np.abs(expected) if scale is None else scale
    return np.max(np.abs(ours - expected) / np.where(scale > 0, scale, 1))


def wide(array):
    array = np.asarray(array)
    return array.astype(np.float64) if array.dtype.kind == "f" else array
