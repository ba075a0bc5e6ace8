"""as_function: a transformation without state as a function of the gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip as oc
from tests.reference.trees import assert_same_bits

GRADS = {"w": jnp.array([[3.0, 0.0], [0.0, 4.0]]), "b": jnp.array([12.0])}  # of norm 13


def test_it_is_the_update():
    tx = oc.clip_by_global_norm(1.0)
    expected, _ = tx.update(GRADS, tx.init(GRADS))
    assert_same_bits(oc.as_function(tx)(GRADS), expected)
    assert_same_bits(jax.jit(oc.as_function(tx))(GRADS), jax.jit(lambda g: tx.update(g, tx.init(g))[0])(GRADS))


def test_under_vmap_each_example_is_clipped_by_itself():
    rows = jnp.array([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0], [3e30, 4e30]])
    clipped = jax.jit(jax.vmap(oc.as_function(oc.clip_by_global_norm(1.0))))(rows)
    np.testing.assert_allclose(clipped, [[0.6, 0.8], [0.3, 0.4], [0, 0], [0.6, 0.8]], rtol=1e-6)


def test_a_chain_without_state():
    chained = oc.as_function(optax.chain(oc.zero_nonfinite(), oc.clip_by_leaf_norm(1.0), optax.scale(2.0)))
    out = chained(GRADS | {"b": jnp.array([np.nan])})
    np.testing.assert_allclose(out["w"], [[1.2, 0.0], [0.0, 1.6]], rtol=1e-6)
    np.testing.assert_array_equal(out["b"], [0.0])


def test_with_parameters():
    tx = oc.adaptive_grad_clip(0.1)
    weights = jax.tree.map(jnp.ones_like, GRADS)
    assert_same_bits(oc.as_function(tx, weights)(GRADS), tx.update(GRADS, tx.init(weights), weights)[0])
    with pytest.raises(ValueError, match="params"):
        oc.as_function(tx)(GRADS)


@pytest.mark.parametrize(
    ("tx", "words"),
    [
        (oc.zclip(), "keeps 4 arrays"),
        (oc.clip_by_global_norm(lambda step: 1.0 / (1 + step)), r"keeps 1 arrays \(ScheduleState\)"),
        (optax.chain(oc.clip_by_global_norm(1.0), optax.adam(1e-3)), "keeps 5 arrays"),
        (oc.clip_by_global_norm(1.0, record=True), "RecordedState"),
        (oc.with_carry(oc.clip(1.0)), r"CarryState.*call its update yourself"),
    ],
)
def test_a_state_would_be_forgotten(tx, words):
    with pytest.raises(ValueError, match=f"without state.*{words}"):
        oc.as_function(tx)(GRADS)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:optax.global_norm is deprecated:DeprecationWarning")  # which it calls
def test_as_the_pre_clipping_transform_of_jax_privacy():
    jax_privacy = pytest.importorskip("jax_privacy", reason="pip install jax-privacy==2.0.0")

    def loss(weights, row):
        return jnp.vdot(weights, row)  # so that the gradient is the row

    rows = jnp.array([[3.0, 4.0], [30.0, 40.0], [0.03, 0.04]])
    summed = jax_privacy.clipped_grad(
        loss,
        l2_clip_norm=100.0,
        batch_argnums=1,
        keep_batch_dim=False,
        pre_clipping_transform=oc.as_function(oc.clip_by_global_norm(1.0)),
    )
    np.testing.assert_allclose(summed(jnp.ones(2), rows), [1.23, 1.64], rtol=1e-6)
