"""Clippers over sequences of norms, each in one scan or several in one program, and how soon they follow a shift."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optaxclip as oc
from optaxclip import contrib
from tests.reference import adaptive


class Method(NamedTuple):
    """A method of ours beside its oracle, on the norms of one group.

    Attributes:
        make: () -> the transformation.
        published: norms -> the run of the source, where zero and non-finite norms are the guard's.
    """

    make: Callable[[], Any]
    published: Callable[[Any], adaptive.Run]


def one_tensor(norms, **options):
    """AdaGC on a single tensor, whose global norm is its own."""
    run = adaptive.adagc(np.asarray(norms)[:, None], **options)
    return adaptive.Run(run.bound[:, 0], run.after[:, 0], {"gamma": run.stats["gamma"][:, 0]})


# With their default arguments; `high` of AGGC has none, and 1.5 with 0.8 is the setting of the traces.
METHODS = {
    "autoclip": Method(oc.autoclip, adaptive.autoclip),
    "autoclip, window 100": Method(lambda: oc.autoclip(window=100), lambda norms: adaptive.autoclip(norms, window=100)),
    "percentile_clip": Method(contrib.percentile_clip, adaptive.percentile_clip),
    "zclip": Method(lambda: oc.zclip(max_norm=None), lambda norms: adaptive.zclip(norms, max_norm=None)),
    "adagc": Method(oc.adagc, one_tensor),
    "aggc": Method(
        lambda: contrib.aggc("all", 1.5, min_ratio=0.8),
        lambda norms: adaptive.aggc(norms, 1.5, 0.8, initial=0.0, max_down=0.9, max_up=1.1),
    ),
    "clip_by_history": Method(oc.clip_by_history, lambda norms: adaptive.clip_by_history(norms, take_in="raw")),
    "clip_by_tracked_quantile": Method(contrib.clip_by_tracked_quantile, adaptive.tracked_quantile),
    "clip_norm_growth": Method(contrib.clip_norm_growth, adaptive.clip_norm_growth),
}


def together(txs):
    """Several transformations as one, each on the same gradients: updates and states by name, one program for all."""

    def init(params):
        return {name: tx.init(params) for name, tx in txs.items()}

    def update(updates, states, params=None):
        results = {name: tx.update(updates, states[name], params) for name, tx in txs.items()}
        return {name: result[0] for name, result in results.items()}, {
            name: result[1] for name, result in results.items()
        }

    return optax.GradientTransformation(init, update)


def driver_of_all(txs, observe=lambda state: ()):
    """Jitted: norms -> of each transformation (the norms after clipping, what `observe` sees of each state then).

    Each tensor is a leaf of one number, its norm: an array of steps is one tensor, one of steps by tensors several.
    """
    tx = together(txs)

    def tensors(row):
        return {str(i): row[i, None] for i in range(row.size)}

    @jax.jit
    def run(rows):
        def step(states, row):
            updates, states = tx.update(tensors(row), states)
            after = {name: jnp.concatenate([each[key] for key in tensors(row)]) for name, each in updates.items()}
            return states, {name: (after[name], observe(states[name])) for name in txs}

        return jax.lax.scan(step, tx.init(tensors(np.zeros(rows.shape[1:], np.float32))), rows)[1]

    def drive(norms):
        norms = np.asarray(norms, np.float32)
        found = run(norms.reshape(len(norms), -1))
        return {
            name: (wide(after).reshape(norms.shape), jax.tree.map(wide, seen)) for name, (after, seen) in found.items()
        }

    return drive


def drive_all(txs, norms, observe=lambda state: ()):
    return driver_of_all(txs, observe)(norms)


def driver(tx, observe=lambda state: ()):
    """The same of one transformation."""
    run = driver_of_all({"": tx}, observe)
    return lambda norms: run(norms)[""]


def drive(tx, norms, observe=lambda state: ()):
    return driver(tx, observe)(norms)


def wide(array):
    array = np.asarray(array)
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def fields(*names):
    """An `observe` of these fields of the state, wherever they are in it: name -> steps by groups."""
    return lambda state: {name: optax.tree.get(state, name) for name in names}


def share_left(norms, after, window=21):
    """How much of its norm an update keeps: at each step the median over `window` steps about it, as far as given."""
    left = np.pad(np.asarray(after) / np.asarray(norms), window // 2, constant_values=np.nan)
    return np.nanmedian(np.lib.stride_tricks.sliding_window_view(left, window), axis=1)


def steps_to_follow(norms, after, at):
    """Steps from `at` (counted from 1) until updates keep as much as before it, to 10 %; None if they never do."""
    before = share_left(norms[: at - 1], after[: at - 1])
    again = share_left(norms[at - 1 :], after[at - 1 :]) >= 0.9 * np.median(before[-100:])
    return int(np.argmax(again)) if again.any() else None
