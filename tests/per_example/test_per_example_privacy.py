"""Per-example clipping against jax-privacy, and any clip of ours inside of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip as oc
from optaxclip import per_example

jax_privacy = pytest.importorskip("jax_privacy", reason="pip install jax-privacy==2.0.0")

# It calls what optax has renamed.
pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:optax.global_norm is deprecated:DeprecationWarning"),
]

B, BOUND = 32, 3.0
FORMS = {"one pass": optax.chain(oc.clip_by_global_norm(BOUND)), "two passes": oc.clip_by_global_norm(BOUND)}


def loss(params, x, label):
    hidden = jax.nn.relu(x @ params["w"] + params["b"])
    out = hidden @ params["v"]
    return -jax.nn.log_softmax(out)[label], out


def given(rng):
    params = {"w": rng.normal(size=(6, 16)), "b": rng.normal(size=16), "v": rng.normal(size=(16, 3)) / 4}
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    x = np.logspace(-2, 1, B)[:, None] * rng.normal(size=(B, 6))
    return params, jnp.asarray(x, jnp.float32), jnp.asarray(rng.integers(0, 3, B))


def theirs(**options):
    return jax.jit(
        jax_privacy.clipped_grad(loss, has_aux=True, batch_argnums=(1, 2), keep_batch_dim=False, **options).fun
    )


def assert_close(ours, expected):
    for leaf, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=0, atol=2e-6 * np.max(np.abs(other)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("microbatch_size", [None, 8])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_equal(rng, form, microbatch_size, reduce):
    args = given(rng)
    options = {"microbatch_size": microbatch_size}
    expected, seen = theirs(
        l2_clip_norm=BOUND,
        normalize_by=B if reduce == "mean" else 1.0,
        return_values=True,
        return_grad_norms=True,
        **options,
    )(*args)
    step = per_example.clipped_value_and_grad(
        loss, FORMS[form], batch_argnums=(1, 2), has_aux=True, reduce=reduce, return_norms=True, **options
    )
    (value, aux), grads, norms = jax.jit(step)(*args)
    assert np.min(norms) < BOUND < np.max(norms)
    assert_close(grads, expected)
    assert_close(norms, seen.grad_norms)
    assert_close(aux, seen.aux)
    assert_close(value, getattr(jnp, reduce)(seen.values))


def test_any_clip_before_the_one_that_privacy_rests_on(rng):
    """The recipe: ours shapes the gradient of each example, theirs bounds it, and tells how much noise it takes."""
    args = given(rng)
    clip = oc.as_function(oc.clip_by_leaf_norm(0.2))
    private = jax_privacy.clipped_grad(
        lambda *args: loss(*args)[0],
        l2_clip_norm=0.3,
        batch_argnums=(1, 2),
        keep_batch_dim=False,
        pre_clipping_transform=clip,
    )
    both = optax.chain(oc.clip_by_leaf_norm(0.2), oc.clip_by_global_norm(0.3))
    step = per_example.clipped_value_and_grad(loss, both, batch_argnums=(1, 2), has_aux=True, reduce="sum")
    summed = jax.jit(private.fun)(*args)
    assert_close(summed, jax.jit(step)(*args)[1])
    assert private.sensitivity() == 0.3


def test_an_example_that_is_not_finite(rng):
    """Theirs zeroes single entries, so that the rest of such an example stays; ours leaves the example out."""
    params, x, label = given(rng)
    x = x.at[0, 0].set(jnp.inf)
    step = per_example.clipped_value_and_grad(
        loss, FORMS["two passes"], batch_argnums=(1, 2), has_aux=True, reduce="sum"
    )
    _, grads = jax.jit(step)(params, x, label)
    assert_close(grads, theirs(l2_clip_norm=BOUND)(params, x[1:], label[1:])[0])
