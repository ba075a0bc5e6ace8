"""Norms of pytrees and norms of norms, on every kind of mesh."""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optaxclip._arrays import groups, layouts, mesh
from optaxclip._arrays.leaves import Leaf
from optaxclip._numerics import array_norms


def of_all(leaves: Sequence[Leaf], ord: float) -> jax.Array:
    """Returns one norm of all leaves together. It takes one collective per distinct set of mesh axes."""
    return total_norm([leaf.value for leaf in leaves], [leaf.axes for leaf in leaves], ord)


def of_each(leaves: Sequence[Leaf], ord: float, dims: Sequence[tuple[int, ...]] | None = None) -> list[jax.Array]:
    """Returns the norm of each leaf, or of its parts along the dimensions `dims`."""
    arrays = [leaf.value for leaf in leaves]
    if dims is None:
        return separate_norms(arrays, list(map(all_dims, arrays)), [leaf.axes for leaf in leaves], ord)
    axes = [leaf.axes_over(over) for leaf, over in zip(leaves, dims, strict=True)]
    return separate_norms(arrays, dims, axes, ord)


def total_norm(arrays: Sequence[Any], axes: Sequence[tuple[str, ...]], ord: float) -> jax.Array:
    """Returns one norm of all arrays, each split over its mesh axes in `axes`.

    It takes one collective per distinct set of axes.
    """
    norms = array_norms.norms(arrays, [tuple(range(jnp.ndim(array))) for array in arrays], ord)
    if not any(axes):
        return norm_of_parts(norms, ord) if norms else jnp.zeros((), jnp.float32)
    sets = groups.alike(map(_kind, norms, axes))
    totals = [norm_of_norms(jnp.stack([norms[i] for i in at]), names, ord) for (names, *_), at in sets.items()]
    return norm_of_parts(totals, ord)


def norm_of_parts(norms: Sequence[jax.Array], ord: float) -> jax.Array:
    """Returns the norm of parts with these norms, which have one shape and perhaps two dtypes, on this device."""
    if len(norms) == 1:
        return norms[0]
    kinds = {norm.dtype for norm in norms}
    if len(kinds) > 1:
        norms = [norm.astype(jnp.float64) for norm in norms]
    return norm_of_norms(jnp.stack(norms), (), ord)


def separate_norms(
    arrays: Sequence[Any], dims: Sequence[tuple[int, ...]], axes: Sequence[tuple[str, ...]], ord: float
) -> list[jax.Array]:
    """Returns the norm of each array over its dimensions `dims`, which are split over the mesh axes `axes`."""
    return across(array_norms.norms(arrays, dims, ord), axes, ord)


def across(norms: Sequence[jax.Array], axes: Sequence[tuple[str, ...]], ord: float) -> list[jax.Array]:
    """Takes each norm of this device's piece over its mesh axes.

    It takes one collective per distinct set of axes.
    """
    norms = list(norms)
    if not any(axes):
        return norms
    for (names, *_), at in groups.alike(map(_kind, norms, axes)).items():
        if not names:
            continue
        together = norm_of_norms(jnp.concatenate([norms[i].reshape(1, -1) for i in at], axis=1), names, ord)
        ends = list(itertools.accumulate(norms[i].size for i in at))
        for i, piece in zip(at, jnp.split(together, ends[:-1]), strict=True):
            norms[i] = piece.reshape(norms[i].shape)
    return norms


def _kind(norm: jax.Array, names: tuple[str, ...]) -> Any:
    """Returns a key that is equal for norms that may share a collective.

    Units of a leaf that lie on different devices must not make other norms vary.
    """
    return names, norm.dtype, layouts.varying(norm)


def all_dims(array: Any) -> tuple[int, ...]:
    """Returns every dimension of an array."""
    return tuple(range(jnp.ndim(array)))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _norm_of_norms(norms: jax.Array, axes: tuple[str, ...], ord: float) -> jax.Array:
    """Returns the norm over the leading axis of `norms` and over mesh axes. It is the same on every device."""
    norm = norms[0] if len(norms) == 1 else array_norms.norms([norms], [(0,)], ord)[0]
    if not axes:
        return norm
    if ord == 2:
        squares = jnp.stack(array_norms.squares_at_three_scales(norm))
        return array_norms.root_of_three_scales(*jax.lax.psum(squares, axes))
    if ord == math.inf:
        return jax.lax.pmax(norm, axes)
    return array_norms.norms([_from_all(norm, axes)], [(0,)], ord)[0]


def _from_all(norm: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Returns the norms of all devices along `axes`, on a new leading axis, with one collective.

    It is a sum in which each device has its own place. jax types a sum as the same on every device, a gathered array
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
    change = jnp.sum(array_norms.slope(norms, norm[None], (0,), axes, ord) * changes, axis=0)
    return norm, jax.lax.psum(change, axes) if axes else change


# At module level and jitted, so that eager calls do not compile again.
norm_of_norms = jax.jit(_norm_of_norms, static_argnums=(1, 2))
