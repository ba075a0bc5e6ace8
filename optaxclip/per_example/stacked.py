"""Clips per-example gradients that you already have, stacked along the first axis, and adds them up."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optaxclip import core
from optaxclip._arguments import checks
from optaxclip._arguments.bounds import Number
from optaxclip._arrays import dtypes, trees
from optaxclip._numerics import arithmetic, rows, scaling, tree_norms
from optaxclip.per_example.problems import Grads


def per_example_global_norm_clip(grads: Grads, l2_norm_clip: Number) -> tuple[Grads, jax.Array]:
    r"""Scales the gradient of each example so that its global norm is at most `l2_norm_clip`, and adds them up.

    .. math:: \sum_i g_i \cdot \min(1, c / n_i), \qquad n_i = \|g_i\|_2

    Args:
      grads: pytree of arrays whose first axis indexes the examples, as `jax.vmap(jax.grad(fun), (None, 0))` returns it.
      l2_norm_clip: the bound c, at least 0, in the units of the gradient: a number or a scalar array.

    Returns:
      The sum, without the axis of examples, and the number of clipped examples, an int32 scalar.

    Raises:
      ValueError: if the bound is negative or NaN, if an array has no first axis, or if the first axes differ in length.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> grads = jnp.array([[3.0, 4.0], [0.3, 0.4], [jnp.nan, 0.0], [3e30, 4e30]])
      >>> total, clipped = optaxclip.per_example_global_norm_clip(grads, 1.0)
      >>> print(total, clipped)  # [0.6, 0.8] + [0.3, 0.4] + [0.6, 0.8]
      [1.5 2. ] 2

    Notes:
      - Guarantees: norms are correct over the whole float range. An example adds at most `l2_norm_clip * (1 + 1e-5)` to
        the sum. If its norm exceeds the largest float (four entries of 3e38), what it adds is finite and keeps its
        direction, but may exceed the bound. The sum is taken in float32 or wider, and has the dtype of the gradient.
        Integers become float32.
      - Edge cases: an example whose norm is not finite does not count, and is not counted as clipped. Examples of norm
        0 are never clipped. A bound of 0 gives zeros, inf changes nothing. Boolean, float0 and key leaves raise an
        error.
      - Placement: between the gradients and the optimizer. In `shard_map` each device clips its own examples. Gradients
        with respect to a replicated argument are not per-example gradients there; see
        `per_example.clipped_value_and_grad`.
      - Differs from optax: in optax one example with a NaN makes the sum NaN, and one of norm 1e20 counts as zeros.
        optax measures 16-bit gradients in 16 bits.

    References:
      Abadi et al., Deep learning with differential privacy, CCS 2016, arXiv:1607.00133.

    See also:
      `per_example.clipped_value_and_grad`, which needs no array of gradients; `per_example_layer_norm_clip`.

      Notebook: `notebooks/outliers_and_privacy.ipynb`, by `per_example.clipped_value_and_grad`.
    """
    l2_norm_clip = checks.number("l2_norm_clip", l2_norm_clip)
    flat, treedef = _examples(grads)
    if not flat:
        return grads, jnp.zeros((), jnp.int32)
    total, clipped = _clip(flat, l2_norm_clip)
    return treedef.unflatten(total), clipped


def per_example_layer_norm_clip(grads: Grads, global_l2_norm_clip: Number, uniform: bool = True) -> tuple[Grads, Grads]:
    r"""Scales each leaf of each example's gradient to its share of `global_l2_norm_clip`, and adds them up.

    .. math:: c_l = c / \sqrt{L} \quad\mathrm{or}\quad c_l = c \sqrt{D_l / D}

    The global norm of each example is then at most c.

    Args:
      grads: pytree of arrays whose first axis indexes the examples, one array per layer.
      global_l2_norm_clip: the bound c on all layers together, at least 0: a number or a scalar array.
      uniform: True (the default) for the first formula, equal bounds for all L layers. False for the second, where D_l
        is the number of entries in the layer, and D the number in all layers.

    Returns:
      The sum, without the axis of examples, and a pytree of its structure with the number of examples clipped in each
      layer.

    Raises:
      ValueError: as for `per_example_global_norm_clip`, or if `uniform` is not a boolean.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> grads = {"a": jnp.array([[6.0, 8.0], [0.0, 0.5]]), "b": jnp.array([[12.0, 16.0], [0.0, 0.0]])}
      >>> total, clipped = optaxclip.per_example_layer_norm_clip(grads, 2.0**0.5)  # a bound of 1 for each layer
      >>> print(total["a"], total["b"], clipped["a"], clipped["b"])
      [0.6 1.3] [0.6 0.8] 1 1

    Notes:
      - Guarantees, placement and differences from optax: as for `per_example_global_norm_clip`, for each layer alone.
      - Edge cases: an example whose norm is not finite in one layer counts in no layer, and is not counted as clipped.

    References:
      McMahan et al., Learning differentially private recurrent language models, ICLR 2018, arXiv:1710.06963.

    See also:
      `per_example_global_norm_clip`; `clip_by_leaf_norm` in `per_example.clipped_value_and_grad`.

      Notebook: `notebooks/outliers_and_privacy.ipynb`, by `per_example.clipped_value_and_grad`.
    """
    global_l2_norm_clip = checks.number("global_l2_norm_clip", global_l2_norm_clip)
    checks.flag("uniform", uniform)
    flat, treedef = _examples(grads)
    sizes = [math.prod(leaf.shape[1:]) for leaf in flat]
    shares = [1 / len(flat) if uniform else size / max(sum(sizes), 1) for size in sizes]
    finite = jnp.isfinite(_norms(flat)) if flat else None
    clips = [
        _clip([leaf], global_l2_norm_clip * math.sqrt(share), finite) for leaf, share in zip(flat, shares, strict=True)
    ]
    return treedef.unflatten([total for (total,), _ in clips]), treedef.unflatten([clipped for _, clipped in clips])


def _examples(grads: Grads) -> tuple[list[jax.Array], Any]:
    """Returns the arrays as floats, and their structure.

    Raises:
      ValueError: if an array has no first axis, or another number of examples than the first array.
    """
    flat, treedef = jax.tree.flatten(grads)
    dtypes.require_usable(grads, flat)
    shapes = dict(zip(trees.paths(grads), map(jnp.shape, flat), strict=True))
    for path, shape in shapes.items():
        first = next(iter(shapes.values()))
        if not shape or shape[0] != first[0]:
            raise ValueError(
                f"grads must have the examples along the first axis of every array, but {path!r} has the shape {shape}"
                + (f", and the first array has {first[0]} examples" if first else "")
            )
    return [_as_floats(leaf) for leaf in flat], treedef


def _as_floats(leaf: Any) -> jax.Array:
    array = jnp.asarray(leaf)
    if jnp.issubdtype(array.dtype, jnp.integer):
        return array.astype(jnp.float32)
    if not dtypes.is_inexact(array):
        raise ValueError(f"grads must be numbers, got an array of {array.dtype}")
    return array


def _norms(flat: Sequence[jax.Array]) -> jax.Array:
    """Returns the norm of each example."""
    return tree_norms.norm_of_parts(
        tree_norms.separate_norms(flat, [tuple(range(1, leaf.ndim)) for leaf in flat], [()] * len(flat), 2), 2
    )


def _clip(flat: Sequence[jax.Array], bound: Any, finite: jax.Array | None = None) -> tuple[list[jax.Array], jax.Array]:
    """Returns the sums of the clipped examples, and the number of clipped examples."""
    norms = _norms(flat)
    finite = jnp.isfinite(norms) if finite is None else finite
    high = core.upper_end(norms, bound)
    factor = scaling.factor(norms, jnp.minimum(norms, high))
    clipped = jnp.sum((norms > high) & finite, dtype=jnp.int32)

    def terms(leaf: jax.Array, is_finite: jax.Array, factor: scaling.Factor) -> jax.Array:
        is_finite, factor = jax.tree.map(lambda x: jnp.expand_dims(x, range(1, leaf.ndim)), (is_finite, factor))
        wide = leaf.astype(dtypes.wide(leaf.dtype))
        return jnp.where(is_finite, scaling.rescale(wide, factor), jnp.zeros_like(wide))

    totals = [rows.sum_of(terms, leaf, finite, factor) for leaf in flat]
    return [arithmetic.narrowed(total, leaf.dtype) for total, leaf in zip(totals, flat, strict=True)], clipped
