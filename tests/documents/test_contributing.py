"""The code in CONTRIBUTING.md runs and does what is said beside it."""

import jax
import numpy as np
import pytest

import optaxclip as oc
from tests.support.pages import blocks, run


@pytest.fixture(scope="module")
def new():
    """What the code in CONTRIBUTING.md defines."""
    namespace = {"__name__": "contributing"}
    for block in blocks("CONTRIBUTING.md"):
        run(block, namespace)
    return namespace


def test_the_example_of_a_new_clipper_agrees_with_its_reference(new):
    row = new["row"]
    assert row.factory.__name__ == row.public
    updates = {"a": np.array([0.5, -2.0], np.float32), "b": np.array([[0.25]], np.float32)}
    tx = row.make()
    clipped, _ = jax.jit(tx.update)(updates, tx.init(updates))
    expected = new["reference"](updates, *row.args)
    for name, leaf in clipped.items():
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-6)
    for measured, low, high in row.measured(clipped, updates).values():
        assert low <= measured <= high * (1 + 1e-5)


def test_the_norm_and_the_threshold_written_there_clip(new):
    grads = {"a": np.array([0.5, -2.0], np.float32), "b": np.zeros(3, np.float32)}
    by_norm = oc.clip_by(new["leaf_max"], oc.thresholds.constant(1.0))
    updates, _ = jax.jit(by_norm.update)(grads, by_norm.init(grads))
    np.testing.assert_array_equal(updates["a"], [0.25, -1.0])
    update, init = (jax.jit(function) for function in (new["tx"].update, new["tx"].init))  # the last one there
    state = init(grads)
    for scale, kept in ((1, 1), (8, 2), (8, 4)):
        updates, state = update({**grads, "a": scale * grads["a"]}, state)
        np.testing.assert_allclose(updates["a"], kept * grads["a"], rtol=1e-6)
    np.testing.assert_array_equal(updates["b"], 0)
