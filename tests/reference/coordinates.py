"""The methods with state per coordinate, or a clip inside momentum, in float64 NumPy: plain loops over steps.

Each takes the gradients of one tensor, an array of steps by coordinates, and returns what comes out, in its shape.
Where the paper's norm is that of all parameters, these are all of them. What the public code named in a docstring does
is what is written here, but where the docstring says otherwise. Steps count from 1.
"""

import numpy as np


def rows(step, grads):
    """`step`: (t, gradient) -> what comes out, over all steps."""
    return np.array([step(t, g) for t, g in enumerate(np.asarray(grads, np.float64), 1)])


def spam_clip(grads, ratio=5000.0, decay=0.999, warmup_steps=19, period=None, *, clips_silent=False):
    """The clip of SPAM, Huang et al. 2025 (arXiv 2501.06842); `SPAM` of pytorch_optimizer.

    `clips_silent` is the published code: where v = 0 a coordinate is clipped to 0. Ours leaves it alone.
    """
    v = np.zeros_like(grads[0], np.float64)

    def step(t, g):
        phase = t if period is None else t % period
        if phase == 0:
            v[:] = 0
        spikes = (g**2 > ratio * v) & (phase > warmup_steps) & ((v > 0) | clips_silent)
        out = np.where(spikes, np.sign(g) * np.sqrt(ratio * v), g)
        v[:] = decay * v + (1 - decay) * out**2
        return out

    return rows(step, grads)


def adaptive_spike_clip(grads, decay=0.999):
    """AdaClip of Stable-SPAM, Huang et al. 2025 (arXiv 2502.17055); `StableSPAM` of pytorch_optimizer."""
    moving = 0.0

    def step(t, g):
        nonlocal moving
        largest = np.max(np.abs(g))
        moving = decay * moving + (1 - decay) * largest
        bound = moving / (1 - decay**t)
        return np.where(np.abs(g) > bound, g / largest * bound, g)

    return rows(step, grads)


def scale_by_adaptive_norm(grads, b1=0.7, b2=0.9, eps=1e-8):
    """AdaGN of Stable-SPAM. Zeros are taken in, as by the authors; pytorch_optimizer skips them."""
    m = v = 0.0

    def step(t, g):
        nonlocal m, v
        n = np.linalg.norm(g)
        m, v = b1 * m + (1 - b1) * n, b2 * v + (1 - b2) * n**2
        goal = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
        return g / n * goal if n > 0 else g

    return rows(step, grads)


def acclip(grads, b1=0.9, b2=0.99, alpha=1.0, eps=1e-5):
    """ACClip, Zhang et al. 2020 (arXiv 1912.03194); rivercold/ACClip-Pytorch with mod=0 and no weight decay."""
    m = tau = np.zeros_like(grads[0], np.float64)

    def step(t, g):
        nonlocal m, tau
        m, tau = b1 * m + (1 - b1) * g, b2 * tau + (1 - b2) * np.abs(g) ** alpha
        return np.minimum(1, tau ** (1 / alpha) / (np.abs(m) + eps)) * m

    return rows(step, grads)


def stable_adam(grads, b1=0.9, b2=0.99, eps=1e-6):
    """StableAdamW, Wortsman et al. 2023 (arXiv 2304.13013); `optimi.StableAdamW` without weight decay."""
    m = v = np.zeros_like(grads[0], np.float64)

    def step(t, g):
        nonlocal m, v
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
        excess = np.sqrt(np.mean(g**2 / np.maximum(v_hat, eps**2)))
        return m_hat / (np.sqrt(v_hat) + eps) / max(1, excess)

    return rows(step, grads)


def clipped_momentum(grads, max_norm, decay=0.9):
    """Mai and Johansson 2021 (arXiv 2102.06489): d <- clip(decay d + (1 - decay) g), which is what is kept."""
    d = np.zeros_like(grads[0], np.float64)

    def step(t, g):
        nonlocal d
        d = clip(decay * d + (1 - decay) * g, max_norm)
        return d

    return rows(step, grads)


def mixed_clip(grads, max_norm, decay=0.999, mix=0.7, smooth=False):
    """Zhang et al. 2020 (arXiv 2010.02519); `MixClip` in zbh2047/clipping-algorithms, which has the smooth form.

    Its `gamma` is `max_norm` times its `lr`, by which we divide what comes out.
    """
    m = np.zeros_like(grads[0], np.float64)
    bounded = soft_clip if smooth else clip

    def step(t, g):
        nonlocal m
        m = decay * m + (1 - decay) * g
        return mix * bounded(m, max_norm) + (1 - mix) * bounded(g, max_norm)

    return rows(step, grads)


def centered_clip(grads, max_norm):
    """Karimireddy et al. 2021 (arXiv 2012.10333), algorithm 2 for one worker and one iteration, from 0."""
    v = np.zeros_like(grads[0], np.float64)

    def step(t, g):
        nonlocal v
        v = v + clip(g - v, max_norm)
        return v

    return rows(step, grads)


def clip(x, c):
    n = np.linalg.norm(x)
    return x * (c / n) if n > c else x


def soft_clip(x, c):
    return x * c / (c + np.linalg.norm(x))
