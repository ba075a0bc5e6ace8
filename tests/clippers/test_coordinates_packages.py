"""Over 1,000 steps, in float32 as they run, against pytorch_optimizer 4.1.0 and torch-optimi 0.3.3.

Parameters are put back to 0 before every step and the learning rate is 1, so that they show what is added to them.
Tolerances are about twice the worst of five other seeds.
"""

import numpy as np
import optax
import pytest

from optaxclip import contrib
from tests.support import spiky

pytestmark = pytest.mark.parity

PERIOD, WARMUP = 300, 15


def package(name):
    return pytest.importorskip(name, reason="the oracle here: pip install 'optaxclip[parity]'")


def run(make, grads):
    """What an optimizer adds to a tensor per leaf, with the sign of the gradient; the gradients as it left them."""
    torch = package("torch")
    blocks = spiky.BLOCKS.values()
    params = [torch.nn.Parameter(torch.zeros(block.stop - block.start)) for block in blocks]
    optimizer = make(params)
    added, clipped = [], []
    for row in np.float32(grads):
        for p, block in zip(params, blocks, strict=True):
            p.data.zero_()
            p.grad = torch.tensor(row[block])
        optimizer.step()
        added.append(np.concatenate([-p.detach().numpy() for p in params]))
        clipped.append(np.concatenate([p.grad.numpy() for p in params]))
    return np.array(added, np.float64), np.array(clipped, np.float64)


def spam(grads, **options):
    options = {"lr": 1.0, "update_proj_gap": PERIOD, "warmup_epoch": WARMUP, "eps": 0.0} | options
    return run(lambda params: package("pytorch_optimizer").SPAM(params, **options), grads)


def stable_spam(grads, **options):
    options = {"lr": 1.0, "update_proj_gap": PERIOD} | options
    return run(lambda params: package("pytorch_optimizer").StableSPAM(params, **options), grads)


def cosine(phase):
    """How far the updates have grown, so many steps after a reset."""
    return 1 - 0.99 * (1 + np.cos(np.pi * phase / (WARMUP + 1))) / 2


def size(outs):
    return np.abs(outs).max(axis=1, keepdims=True)


STEP = np.arange(1, spiky.STEPS + 1)[:, None]
PHASE = STEP % PERIOD
IS_RESET = STEP >= PERIOD
GROWS = IS_RESET & (PHASE < WARMUP)


@pytest.mark.parametrize("threshold", [5000, 10])
def test_the_clip_of_spam(rng, threshold):
    grads = spiky.gradients(rng)
    _, clipped = spam(grads, threshold=threshold)
    ours, _ = spiky.drive(contrib.spam_clip(float(threshold), period=PERIOD), grads)
    assert spiky.worst(ours, clipped) < 7e-6
    assert np.sum(np.abs(clipped) < 0.99 * np.abs(grads)) >= 3


def test_spam(rng):
    """All of it. Its warm-up after a reset runs one step ahead of ours, and else there is no difference."""
    grads = spiky.gradients(rng)
    theirs, _ = spam(grads, threshold=50)
    adam = optax.adam(1.0, eps=0.0)
    tx = optax.chain(
        contrib.spam_clip(50.0, period=PERIOD), contrib.reset_state_every(adam, PERIOD, warmup_steps=WARMUP)
    )
    ours = -spiky.drive(tx, grads)[0]
    expected = theirs * np.where(GROWS, cosine(PHASE) / cosine(PHASE + 1), 1)
    assert spiky.worst(ours, expected, size(expected)) < 2e-5
    assert ours[PERIOD - 1, 0] / theirs[PERIOD - 1, 0] == pytest.approx(0.01 / cosine(1), rel=1e-4)


def test_spam_kills_silent_coordinates_and_ours_does_not(rng):
    """Peer defect 29."""
    grads = spiky.gradients(rng)
    grads[:60, 2] = 0
    _, clipped = spam(grads)
    ours, _ = spiky.drive(contrib.spam_clip(period=PERIOD), grads)
    reset = PERIOD - 1
    assert not np.any(clipped[:reset, 2])
    assert np.all(ours[60:, 2] != 0)
    assert ours[60, 2] == grads[60, 2]
    assert spiky.worst(ours[reset:], clipped[reset:]) < 1e-5  # the reset brings it back


def test_the_clips_of_stable_spam(rng):
    """Both, one after the other. A coordinate just at the bound may lie on either side of it by rounding: none does."""
    grads = spiky.gradients(rng)
    _, clipped = stable_spam(grads)
    ours, _ = spiky.drive(optax.chain(contrib.adaptive_spike_clip(), contrib.scale_by_adaptive_norm()), grads)
    assert spiky.worst(ours, clipped) < 1e-5


def test_stable_spam_and_its_resets(rng):
    """At a reset it counts the steps of Adam's debiasing anew, where ours go on and the updates grow along a cosine."""
    grads = spiky.gradients(rng)
    theirs, _ = stable_spam(grads, eps=0.0)
    tx = optax.chain(
        contrib.adaptive_spike_clip(),
        contrib.scale_by_adaptive_norm(eps=0.0),
        contrib.reset_state_every(optax.adam(1.0, eps=0.0), PERIOD, warmup_steps=WARMUP),
    )
    ours = -spiky.drive(tx, grads)[0]
    counted = np.where(IS_RESET, PHASE + 1, STEP)  # by theirs
    biased = theirs * (1 - 0.9**counted) / np.sqrt(1 - 0.999**counted)
    expected = biased / (1 - 0.9**STEP) * np.sqrt(1 - 0.999**STEP) * np.where(GROWS, cosine(PHASE), 1)
    np.testing.assert_allclose(expected[: PERIOD - 1], theirs[: PERIOD - 1], rtol=1e-12)
    assert spiky.worst(ours, expected, size(expected)) < 2e-5


def test_stable_spam_skips_zeros_and_ours_takes_them_in(rng):
    grads = spiky.gradients(rng)
    grads[400:410] = 0
    _, clipped = stable_spam(grads)
    ours, _ = spiky.drive(optax.chain(contrib.adaptive_spike_clip(), contrib.scale_by_adaptive_norm()), grads)
    assert spiky.worst(ours[:400], clipped[:400]) < 1e-5
    assert not np.any(ours[400:410])
    assert np.all(np.abs(ours[410]) < 0.9 * np.abs(clipped[410]))  # its average of norms fell
    # Zeros are not taken in by the first of the two: from then on their averages differ by a few steps in hundreds.
    np.testing.assert_allclose(ours[-100:], clipped[-100:], rtol=0.05)


@pytest.mark.parametrize(
    ("name", "eps", "options"),
    [
        ("pytorch_optimizer", 1e-8, {}),
        ("optimi", 1e-6, {}),
        ("optimi", 1e-6, {"betas": (0.8, 0.95)}),
    ],
)
def test_stable_adam(rng, name, eps, options):
    grads = spiky.gradients(rng)
    optimizer = package(name).StableAdamW
    theirs, _ = run(lambda params: optimizer(params, lr=1.0, weight_decay=0.0, eps=eps, **options), grads)
    b1, b2 = options.get("betas", (0.9, 0.99))
    ours, _ = spiky.drive(contrib.scale_by_stable_adam(b1, b2, eps=eps), grads)
    assert spiky.worst(ours, theirs, size(theirs)) < 5e-6
