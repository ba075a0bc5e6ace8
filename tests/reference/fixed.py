"""The fixed clippers in float64 NumPy, each a line-by-line transcription of its source.

Trees are flat: a list or a dict of arrays. Every function returns the same container with float64 (complex128) arrays.
Nothing here guards a range: float64 squares every float32, and cubes it too.

One rule is ours and not the sources': a group whose norm is not finite is returned as it came.
"""

import numpy as np


def wide(x):
    x = np.asarray(x)
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def each(fn, tree, *rest):
    """`fn` over the leaves of flat trees of one structure."""
    if isinstance(tree, dict):
        return {key: fn(leaf, *(other[key] for other in rest)) for key, leaf in tree.items()}
    return [fn(*leaves) for leaves in zip(tree, *rest, strict=True)]


def leaves(tree):
    return list(tree.values()) if isinstance(tree, dict) else list(tree)


def layers(fn, x, *rest, stacked=None):
    """`fn` on each of the independent layers that the first `stacked` axes of a leaf index."""
    if not stacked:
        return fn(x, *rest)
    out = np.empty_like(x)
    for index in np.ndindex(x.shape[:stacked]):
        out[index] = fn(x[index], *(other[index] for other in rest))
    return out


def vector_norm(x, ord=2):
    """The p-norm of all entries, complex ones by modulus; 0 for an empty array."""
    size = np.abs(wide(x)).ravel()
    if size.size == 0:
        return 0.0
    return float(size.max() if ord == np.inf else np.sum(size**ord) ** (1 / ord))


def global_norm(tree, ord=2):
    """`torch.nn.utils.get_total_norm`: the p-norm of the leaves' p-norms."""
    return vector_norm(np.array([vector_norm(x, ord) for x in leaves(tree)]), ord)


def bring(x, norm, lower, upper):
    """`x`, of norm `norm`, into [lower, upper]. A zero norm cannot be raised."""
    x = wide(x)
    if not np.isfinite(norm):
        return x
    if norm > upper:
        return x * (upper / norm)
    if 0 < norm < lower:
        return x * (lower / norm)
    return x


def clip(updates, max_delta):
    """`optax.clip`, `torch.nn.utils.clip_grad_value_`: min(max(g, -c), c) per coordinate."""
    return clip_by_value(updates, -max_delta, max_delta)


def squashed(updates, scale, curve):
    """c f(x / c) per coordinate, f the tanh or the arsinh; of a complex number the modulus, along its direction."""

    def one(x):
        x = wide(x)
        size = np.abs(x)
        goal = scale * curve(size / scale)
        return np.where(size > 0, x * (goal / np.where(size > 0, size, 1)), x)

    return each(one, updates)


def clip_by_value(updates, min_value=None, max_value=None):
    """min(max(g, lo), hi) per coordinate; a complex number's modulus is brought into [lo, hi] along its direction."""
    lo = -np.inf if min_value is None else min_value
    hi = np.inf if max_value is None else max_value

    def one(x):
        x = wide(x)
        if not np.iscomplexobj(x):
            return np.minimum(np.maximum(x, lo), hi)
        size = np.abs(x)
        return x * np.divide(np.minimum(np.maximum(size, lo), hi), size, out=np.ones_like(size), where=size > 0)

    return each(one, updates)


def clip_by_global_norm(updates, max_norm, ord=2):
    """Pascanu et al. 2013 (arXiv 1211.5063), algorithm 1: if ||g|| >= c then g <- c g / ||g||; here for any p-norm."""
    norm = global_norm(updates, ord)
    return each(lambda x: bring(x, norm, 0, max_norm), updates)


def clip_by_leaf_norm(updates, max_norm, ord=2, stacked=None):
    """`tf.clip_by_norm`, Keras `clipnorm`: x * c / ||x|| where ||x|| > c, each tensor (or stacked layer) on its own."""

    def layer(x):
        return bring(x, vector_norm(x, ord), 0, max_norm)

    return each(lambda x: layers(layer, wide(x), stacked=stacked), updates)


def clip_by_block_rms(updates, threshold, stacked=None):
    """Adafactor (Shazeer and Stern 2018, arXiv 1804.04235), section 6: U / max(1, RMS(U)/d)."""

    def layer(x):
        return bring(x, vector_norm(x) / np.sqrt(max(x.size, 1)), 0, threshold)

    return each(lambda x: layers(layer, wide(x), stacked=stacked), updates)


def clip_by_norm_range(updates, min_norm, max_norm):
    """The global norm brought into [lo, hi]: too large is scaled down, too small but not zero scaled up."""
    norm = global_norm(updates)
    return each(lambda x: bring(x, norm, min_norm, max_norm), updates)


def smooth_clip_by_global_norm(updates, max_norm):
    """AUTO-S of Bu et al. 2022 (arXiv 2206.07136), section 4: C = R/(||g|| + gamma) with gamma = R = c."""
    norm = global_norm(updates)
    if not np.isfinite(norm):
        return each(wide, updates)
    factor = 1.0 if max_norm == np.inf else 0.0 if max_norm == 0 else max_norm / (max_norm + norm)
    return each(lambda x: wide(x) * factor, updates)


def unit_axes(shape, units):
    """Over which axes one unit's norm runs: optax's `unitwise_norm` ("io"), timm's ("oi"), or the whole ("leaf").

    "io" asks for the rank of the squeezed tensor first and then for the rank of the tensor itself, as optax does.
    """
    rank = len(shape)
    everything = tuple(range(rank))
    if units == "leaf":
        return everything
    if units == "oi":
        return everything if rank <= 1 else everything[1:]
    if sum(size != 1 for size in shape) <= 1:
        return everything
    return {2: (0,), 3: (0,), 4: (0, 1, 2), 5: (0, 1, 2, 3)}[rank]


def unit_norms(x, units, axis=None):
    axes = unit_axes(x.shape, units) if axis is None else axis
    return np.sqrt(np.sum(np.abs(wide(x)) ** 2, axis=axes, keepdims=True))


def adaptive_grad_clip(updates, params, clipping, eps=1e-3, axis=None, units="io", stacked=None):
    """AGC, Brock et al. 2021 (arXiv 2102.06171), equation 3: per unit, g <- lambda max(||w||, eps) g / ||g||."""

    def layer(g, w):
        norm = np.broadcast_to(unit_norms(g, units, axis), g.shape)
        limit = np.broadcast_to(clipping * np.maximum(unit_norms(w, units, axis), eps), g.shape)
        factor = np.divide(limit, norm, out=np.ones_like(norm), where=np.isfinite(norm) & (norm > limit))
        return g * factor

    return each(lambda g, w: layers(layer, wide(g), wide(w), stacked=stacked), updates, params)


def relative_change(u, w, relative=0.1, absolute=1e-7):
    """max_i |u_i| / (rel |w_i| + abs) over the coordinates with u_i != 0; inf where a limit is 0 under such a u_i."""
    size = np.abs(wide(u))
    limit = np.broadcast_to(relative * np.abs(wide(w)) + absolute, size.shape)
    ratio = np.divide(size, limit, out=np.full_like(size, np.inf), where=limit > 0)
    return float(np.max(np.where(size == 0, 0, ratio), initial=0))


def clippy(updates, params, relative=0.1, absolute=1e-7):
    """Clippy, Tang et al. 2023 (arXiv 2302.09178), algorithm 1; `shrink_by_references` in tensorflow/recommenders.

    Each tensor times min(1, min_i (rel |w_i| + abs) / |u_i|). A zero limit under a non-zero update stops the tensor.
    """

    def one(u, w):
        ratio = relative_change(u, w, relative, absolute)
        if np.isnan(ratio) or not np.all(np.isfinite(wide(u))):
            return wide(u)
        return wide(u) * (1.0 if ratio <= 1 else 1 / ratio)

    return each(one, updates, params)
