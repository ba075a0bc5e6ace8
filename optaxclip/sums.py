"""Norms of pytrees and norms of norms, on every kind of mesh."""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optaxclip import checks, dtypes, groups, layouts, mesh, reductions


def global_norm(tree: Any, *, ord: float = 2, axes: mesh.Axes = "auto") -> jax.Array:
    r"""The norm of all leaves of a pytree taken together, right over the whole float range and on every kind of mesh.

    .. math:: \|x\|_p = \Bigl(\sum_{\mathrm{leaves}} \sum_i |x_i|^p\Bigr)^{1/p}

    Args:
      tree: pytree of arrays of any shapes and dtypes. Complex entries count by modulus; integer, boolean, float0 and
        PRNG-key leaves are not counted.
      ord: p, a number of at least 1, or inf for the largest modulus.
      axes: over which mesh axes the leaves are split, inside `shard_map` and `pmap`. `"auto"` asks the types
        (`check_vma=True`); otherwise a name, a tuple of names, a prefix pytree of PartitionSpec, or None for this
        device's share alone.

    Returns:
      A scalar: float32, or float64 if a leaf is. 0 for an empty tree; inf or NaN where an entry is. A norm past the
      largest float is the largest float.

    Raises:
      ValueError: if `ord` is below 1 or NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> print(optaxclip.global_norm({"a": jnp.array([3.0]), "b": jnp.array([4.0])}))
      5.0
      >>> print(optaxclip.global_norm(jnp.array([3e30, 4e30])))  # a plain sum of squares is inf here
      5e+30

    See also:
      `norms.global_norm`, the same for `clip_by` to measure; `clip_stats`, for the norms that a clipper has measured.

      Notebook: `notebooks/scaling_out.ipynb`, on several devices.
    """
    p = checks.order("ord", ord)
    checks.axes(axes)
    splits = mesh.split_of(tree, axes=axes)
    counted = [
        (leaf, split) for leaf, split in zip(jax.tree.leaves(tree), splits, strict=True) if dtypes.is_inexact(leaf)
    ]
    return total_norm([leaf for leaf, _ in counted], [split.axes for _, split in counted], p)


def total_norm(leaves: Sequence[Any], axes: Sequence[tuple[str, ...]], ord: float) -> jax.Array:
    """One norm of all `leaves`, each split over its mesh axes in `axes`. One collective per distinct set of axes."""
    norms = reductions.norms(leaves, list(map(all_dims, leaves)), ord)
    sets = groups.alike(_kind(*each) for each in zip(norms, axes, strict=True))
    totals = [norm_of_norms(jnp.stack([norms[i] for i in at]), names, ord) for (names, *_), at in sets.items()]
    return norm_of_parts(totals, ord) if totals else jnp.zeros((), jnp.float32)


def norm_of_parts(norms: Sequence[jax.Array], ord: float) -> jax.Array:
    """The norm of what has these norms, of one shape and perhaps of two dtypes, on this device."""
    widest = max((norm.dtype for norm in norms), key=lambda dtype: dtype.itemsize)
    return norm_of_norms(jnp.stack([norm.astype(widest) for norm in norms]), (), ord)


def separate_norms(
    leaves: Sequence[Any], dims: Sequence[tuple[int, ...]], axes: Sequence[tuple[str, ...]], ord: float
) -> list[jax.Array]:
    """The norm of each leaf over its dimensions `dims`, which are split over the mesh axes `axes`."""
    return across(reductions.norms(leaves, dims, ord), axes, ord)


def across(norms: Sequence[jax.Array], axes: Sequence[tuple[str, ...]], ord: float) -> list[jax.Array]:
    """Each of `norms`, of what this device holds, taken over its mesh axes. One collective per distinct set of axes."""
    norms = list(norms)
    for (names, *_), at in groups.alike(_kind(*each) for each in zip(norms, axes, strict=True)).items():
        if not names:
            continue
        together = norm_of_norms(jnp.concatenate([norms[i].reshape(1, -1) for i in at], axis=1), names, ord)
        ends = list(itertools.accumulate(norms[i].size for i in at))
        for i, piece in zip(at, jnp.split(together, ends[:-1]), strict=True):
            norms[i] = piece.reshape(norms[i].shape)
    return norms


def _kind(norm: jax.Array, names: tuple[str, ...]) -> Any:
    """What is taken together. Units of a leaf that lie on different devices must not make others vary as well."""
    return names, norm.dtype, layouts.varying(norm)


def all_dims(leaf: Any) -> tuple[int, ...]:
    """Every dimension of a leaf."""
    return tuple(range(jnp.ndim(leaf)))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _norm_of_norms(norms: jax.Array, axes: tuple[str, ...], ord: float) -> jax.Array:
    """The norm of norms, over the leading axis of `norms` and over the mesh axes `axes`, the same on every device."""
    norm = norms[0] if len(norms) == 1 else reductions.norms([norms], [(0,)], ord)[0]
    if not axes:
        return norm
    if ord == 2:
        squares = jnp.stack(reductions.squares_at_three_scales(norm))
        return reductions.root_of_three_scales(*jax.lax.psum(squares, axes))
    if ord == math.inf:
        return jax.lax.pmax(norm, axes)
    return reductions.norms([_from_all(norm, axes)], [(0,)], ord)[0]


def _from_all(norm: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The norms of all devices along `axes`, along a leading axis, in one collective.

    A sum in which each device has a place of its own is typed as the same on every device, where a gathered array is
    not.
    """
    places = jnp.arange(mesh.whole_size((), axes)) == jax.lax.axis_index(axes)
    return jax.lax.psum(
        jnp.where(jnp.expand_dims(places, range(1, 1 + norm.ndim)), norm[None], jnp.zeros_like(norm)[None]), axes
    )


@_norm_of_norms.defjvp
def _norm_of_norms_jvp(axes: tuple[str, ...], ord: float, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (norms,), (changes,) = primals, tangents
    norm = norm_of_norms(norms, axes, ord)
    change = jnp.sum(reductions.slope(norms, norm[None], (0,), axes, ord) * changes, axis=0)
    return norm, jax.lax.psum(change, axes) if axes else change


# At module level and jitted, so that eager calls do not compile anew.
norm_of_norms = jax.jit(_norm_of_norms, static_argnums=(1, 2))
