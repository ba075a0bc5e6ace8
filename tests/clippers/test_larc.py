"""LARC as one line: against NVIDIA apex's formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optaxclip import clip_by, norms, thresholds

TRUST, STEPS = 0.02, 30


def larc_of_apex(params, grads, rates, momentum, eps=1e-8):
    """The parameters of each step, by `apex/parallel/LARC.py`, without weight decay, around PyTorch's SGD."""
    params = [np.asarray(leaf, np.float64) for leaf in params]
    traces = [np.zeros_like(leaf) for leaf in params]
    history, clipped = [], 0
    for step, rate in zip(grads, rates, strict=True):
        for i, grad in enumerate(step):
            local, param_norm, grad_norm = 1.0, np.linalg.norm(params[i]), np.linalg.norm(np.float64(grad))
            if param_norm != 0 and grad_norm != 0:
                local = min(TRUST * param_norm / (grad_norm + eps) / rate, 1)
                clipped += local < 1
            traces[i] = momentum * traces[i] + local * np.float64(grad)
            params[i] = params[i] - rate * traces[i]
        history.append(list(params))
    return history, clipped


@pytest.mark.parametrize("scheduled", [False, True])
def test_larc_is_a_clip_relative_to_the_parameters(rng, scheduled):
    params = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((4, 3), (3,), (1,))]
    sizes = 10 ** rng.uniform(-3, 2, (STEPS, 3))
    grads = [
        [np.float32(size * rng.normal(size=leaf.shape)) for size, leaf in zip(each, params, strict=True)]
        for each in sizes
    ]
    grads[4][1] = np.zeros(3, np.float32)
    rate = optax.exponential_decay(0.5, 10, 0.5) if scheduled else 0.3
    rates = [float(rate(i)) if scheduled else rate for i in range(STEPS)]
    ratio = (lambda step: TRUST / rate(step)) if scheduled else TRUST / rate
    larc = clip_by(norms.leaf_norm(), thresholds.relative_to_params(ratio))
    tx = optax.chain(larc, optax.sgd(rate, momentum=0.9))

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state, ours = tx.init(params), params
    expected, clipped = larc_of_apex(params, grads, rates, 0.9)
    assert 0.3 < clipped / (3 * STEPS) < 0.9  # neither the identity nor a normaliser
    for each, right in zip(grads, expected, strict=True):
        ours, state = step(ours, state, each)
        for leaf, other in zip(ours, right, strict=True):
            np.testing.assert_allclose(leaf, other, rtol=2e-5, atol=2e-6)
