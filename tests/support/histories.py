"""Histories of norms, and the states of clippers that saw them."""

import jax
import numpy as np


def lognormal(rng, steps=1000, spread=0.4):
    return rng.lognormal(sigma=spread, size=steps)


def with_spikes(rng, steps=1000, share=0.01, size=(20, 50)):
    """Lognormal norms of median 1, and the steps, counted from 1, that were made spikes."""
    norms = lognormal(rng, steps)
    at = np.sort(rng.choice(steps, int(share * steps), replace=False))
    norms[at] = rng.uniform(*size, size=len(at))
    return norms, at + 1


def recorded(norms, tx):
    """The state after gradients of these norms: a leaf each where a row has several."""
    rows = np.asarray(norms, np.float32).reshape(len(norms), -1)

    def grads(row):
        return {chr(ord("a") + column): norm[None] for column, norm in enumerate(row)}

    update, state = jax.jit(tx.update), tx.init(grads(np.zeros_like(rows[0])))
    for row in rows:
        _, state = update(grads(row), state)
    return state
