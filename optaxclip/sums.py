"""Range-safe norms of arrays and pytrees, and norms of norms.

A plain float32 sum of squares overflows from a norm of 2e19 on and underflows below 1e-23. Here it is taken as it is,
in one pass, and only where it turns out to lie outside the range in which it can be trusted is the array read again,
divided by its largest entry. That choice is a `lax.cond` per large array, so that one of zeros, which takes the second
path at every step, takes no other along. A small array is divided at once. For one norm of them all small ones of a
kind are stacked and count as one array, which is what keeps compile time down.

Norms accumulate in float32, or in float64 for float64 arrays. A norm beyond the largest number saturates there: it is
infinite only where an entry is. Subnormal entries count as zero.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optaxclip import checks, columns, dtypes, layouts, mesh

# Arrays of up to this many entries are copied into a stack with their like, or else read twice: at this size both cost
# microseconds, and a branch costs more to compile.
_SMALL = 1 << 14


def is_counted(leaf: Any) -> bool:
    """Whether a leaf counts in norms: real or complex floats do; integers, booleans, float0 and keys do not."""
    return dtypes.is_inexact(leaf)


def accumulator(dtype: Any) -> Any:
    """The real dtype that norms of arrays of `dtype` have."""
    return jnp.float64 if dtype in (jnp.float64, jnp.complex128) else jnp.float32


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
    counted = [(leaf, split) for leaf, split in zip(jax.tree.leaves(tree), splits, strict=True) if is_counted(leaf)]
    return total_norm([leaf for leaf, _ in counted], [split.axes for _, split in counted], p)


def total_norm(leaves: Sequence[Any], axes: Sequence[tuple[str, ...]], ord: float) -> jax.Array:
    """One norm of all `leaves`, each split over its mesh axes in `axes`. One collective per distinct set of axes."""
    sets: dict[Any, list[jax.Array]] = {}
    for names, alike in _alike(leaves, axes):
        if len(alike) == 1:
            norms = _norm(jnp.asarray(alike[0]), all_dims(alike[0]), ord)[None]
        else:
            together = jnp.stack(alike)
            norms = _norm(together, all_dims(together)[1:], ord)
        sets.setdefault((names, norms.dtype), []).append(norms)
    norms = [norm_of_norms(jnp.concatenate(pieces), names, ord) for (names, _), pieces in sets.items()]
    if not norms:
        return jnp.zeros((), jnp.float32)
    if len(norms) == 1:
        return norms[0]
    return norm_of_parts(norms, ord)


def norm_of_parts(norms: Sequence[jax.Array], ord: float) -> jax.Array:
    """The norm of what has these norms, of one shape and perhaps of two dtypes, on this device."""
    widest = max((norm.dtype for norm in norms), key=lambda dtype: dtype.itemsize)
    return norm_of_norms(jnp.stack([norm.astype(widest) for norm in norms]), (), ord)


def _alike(leaves: Sequence[Any], axes: Sequence[tuple[str, ...]]) -> list[tuple[tuple[str, ...], list[Any]]]:
    """Leaves that can be stacked, and each other one alone, with the mesh axes that they are split over."""
    alike: dict[Any, list[Any]] = {}
    for i, (leaf, names) in enumerate(zip(leaves, axes, strict=True)):
        # The type holds shape, dtype, sharding and mesh axes. A large leaf is alike to none, nor is one that XLA lays
        # out as it likes: what is stacked it would lay out alike.
        stacks = jnp.size(leaf) <= _SMALL and layouts.is_known(leaf)
        alike.setdefault((names, jax.typeof(leaf) if stacks else i), []).append(leaf)
    return [(names, together) for (names, _), together in alike.items()]


def separate_norms(
    leaves: Sequence[Any], dims: Sequence[tuple[int, ...]], axes: Sequence[tuple[str, ...]], ord: float
) -> list[jax.Array]:
    """The norm of each leaf over its dimensions `dims`, which are split over the mesh axes `axes`."""
    return across([_norm(jnp.asarray(leaf), over, ord) for leaf, over in zip(leaves, dims, strict=True)], axes, ord)


def across(norms: Sequence[jax.Array], axes: Sequence[tuple[str, ...]], ord: float) -> list[jax.Array]:
    """Each of `norms`, of what this device holds, taken over its mesh axes. One collective per distinct set of axes."""
    norms = list(norms)
    sets: dict[Any, list[int]] = {}
    for i, (norm, names) in enumerate(zip(norms, axes, strict=True)):
        if names:  # units of one leaf may lie on different devices: those that do must not make others vary as well
            sets.setdefault((names, norm.dtype, layouts.varying(norm)), []).append(i)
    for (names, *_), at in sets.items():
        together = norm_of_norms(jnp.concatenate([norms[i].reshape(1, -1) for i in at], axis=1), names, ord)
        ends = list(itertools.accumulate(norms[i].size for i in at))
        for i, piece in zip(at, jnp.split(together, ends[:-1]), strict=True):
            norms[i] = piece.reshape(norms[i].shape)
    return norms


def all_dims(leaf: Any) -> tuple[int, ...]:
    """Every dimension of a leaf."""
    return tuple(range(jnp.ndim(leaf)))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _norm_of_array(x: jax.Array, dims: tuple[int, ...], ord: float) -> jax.Array:
    """The norm of one array over its dimensions `dims`."""
    number = math.prod(x.shape[dim] for dim in dims)
    if number == 1 or ord == math.inf:
        size = largest(x, dims)
        return jnp.where(size < jnp.finfo(size.dtype).tiny, jnp.zeros_like(size), size)  # subnormal
    if x.size <= _SMALL and _can_leave_range(x.dtype, ord):
        return _norm_by_largest(x, dims, ord)
    total = columns.sum_of(lambda x: _power(x, ord), x, dims)
    if not _can_leave_range(x.dtype, ord):
        return _root(total, ord)
    trusted = (total >= _smallest_trusted(total.dtype, number)) & (total <= jnp.finfo(total.dtype).max)
    return jax.lax.cond(jnp.all(trusted), lambda _: _root(total, ord), lambda x: _norm_by_largest(x, dims, ord), x)


def _norm_by_largest(x: jax.Array, dims: tuple[int, ...], ord: float) -> jax.Array:
    """The norm as largest modulus times the norm of the shares of it: two passes, no overflow, no underflow."""
    largest = or_one(columns.max_of(modulus, x, dims))
    size = jnp.expand_dims(largest, dims)
    total = columns.sum_of(lambda x: _power(quotient(x.astype(wide(x.dtype)), size), ord), x, dims)
    return _saturate(_root(total, ord), largest)


@_norm_of_array.defjvp
def _norm_jvp(dims: tuple[int, ...], ord: float, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    norm = _norm(x, dims, ord)
    slope = _slope(x.astype(wide(x.dtype)), jnp.expand_dims(norm, dims), dims, (), ord)
    return norm, jnp.sum(_real(jnp.conj(slope) * dx.astype(slope.dtype)), axis=dims)


# At module level and jitted, so that eager calls do not compile anew.
_norm = jax.jit(_norm_of_array, static_argnums=(1, 2))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _norm_across(norms: jax.Array, axes: tuple[str, ...], ord: float) -> jax.Array:
    """The norm of norms, over the leading axis of `norms` and over the mesh axes `axes`, the same on every device."""
    if ord == 2:
        return _two_norm_of_norms(norms, axes)
    if ord == math.inf:
        size = largest(norms, (0,))
        return jax.lax.pmax(size, axes) if axes else size
    norms = _from_all(norms, axes)
    size = or_one(largest(norms, (0,)))
    return _saturate(_root(jnp.sum(_power(quotient(norms, size[None]), ord), axis=0), ord), size)


def _from_all(norms: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The norms of all devices along `axes`, along the leading axis of `norms`, in one collective.

    The largest of them and then a sum would be two. A sum in which each device has a place of its own is typed as the
    same on every device, where a gathered array is not.
    """
    if not axes:
        return norms
    places = jnp.arange(mesh.whole_size((), axes)) == jax.lax.axis_index(axes)
    spread = jnp.where(jnp.expand_dims(places, range(1, 1 + norms.ndim)), norms[None], jnp.zeros_like(norms)[None])
    return jax.lax.psum(spread, axes).reshape(-1, *norms.shape[1:])


def _two_norm_of_norms(norms: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Squares at three scales, summed in one collective; at least one of the three sums can be trusted."""
    info = jnp.finfo(norms.dtype)
    scale, floor, cap = (2.0 ** (binades * info.maxexp // 128) for binades in (76, -90, 50))
    # The clamps change no sum that is used. They stand between the two multiplications, which XLA (jax 0.8
    # and 0.10, no longer 0.12) would otherwise fold into one by the square of the scale, 0 or inf.
    down, up = jnp.maximum(norms / scale, floor), jnp.minimum(norms * scale, cap)
    large, plain, small = _sum_across(jnp.square(jnp.stack([down, norms, up], axis=1)), axes)
    small_norm = jnp.sqrt(small) / scale
    norm = jnp.where(plain >= _smallest_trusted(plain.dtype, len(norms)), jnp.sqrt(plain), small_norm)
    return jnp.where(plain <= info.max, norm, _saturate(jnp.sqrt(large), jnp.asarray(scale, norms.dtype)))


@_norm_across.defjvp
def _norm_across_jvp(axes: tuple[str, ...], ord: float, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (norms,), (changes,) = primals, tangents
    norm = norm_of_norms(norms, axes, ord)
    return norm, _sum_across(_slope(norms, norm[None], (0,), axes, ord) * changes, axes)


norm_of_norms = jax.jit(_norm_across, static_argnums=(1, 2))


def root(x: jax.Array) -> jax.Array:
    """The square root, with a derivative of 0 at 0."""
    return jnp.where(x == 0, jnp.zeros_like(x), jnp.sqrt(jnp.where(x == 0, jnp.ones_like(x), x)))


@jax.custom_jvp
def quotient(x: jax.Array, whole: jax.Array) -> jax.Array:
    """x / whole for positive wholes, over the whole range, and so its derivative.

    XLA turns a division by a broadcast number into a multiplication by its reciprocal, and that is subnormal, so 0,
    from 8e37 on. And the derivative of a plain division squares the denominator, which underflows below 1e-19.
    """
    if jnp.iscomplexobj(x):
        return jax.lax.complex(quotient(jnp.real(x), whole), quotient(jnp.imag(x), whole))
    if x.shape == whole.shape:  # nothing is broadcast
        return x / whole
    shift = jnp.where(whole > 2.0**100, jnp.full_like(whole, 2.0**-4), jnp.ones_like(whole))
    return x * (1 / (whole * shift)).astype(x.dtype) * shift.astype(x.dtype)


@quotient.defjvp
def _quotient_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x, whole), (dx, d_whole) = primals, tangents
    share = quotient(x, whole)
    return share, quotient(dx, whole) - share * quotient(d_whole, whole).astype(share.dtype)


def _slope(x: jax.Array, norm: jax.Array, dims: tuple[int, ...], axes: tuple[str, ...], ord: float) -> jax.Array:
    """The derivative of the norm over `dims` and `axes` with respect to x; 0 where the norm is."""
    if ord == 1:
        return jnp.sign(x)
    if ord == math.inf:
        attained = (jnp.abs(x) == norm).astype(x.dtype)
        ties = jnp.sum(attained, axis=dims, keepdims=True)
        return jnp.sign(x) * attained / (jax.lax.psum(ties, axes) if axes else ties)
    share = quotient(x, or_one(norm))
    return share if ord == 2 else jnp.sign(x) * (jnp.abs(share) ** (ord - 1)).astype(x.dtype)


def _sum_across(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    total = jnp.sum(x, axis=0)
    return jax.lax.psum(total, axes) if axes else total


def largest(x: jax.Array, dims: tuple[int, ...] | None = None) -> jax.Array:
    """The largest modulus. It is inf where an entry is NaN; see `has_nonfinite`."""
    return jnp.where(has_nonfinite(x, dims), jnp.inf, jnp.max(modulus(x), axis=dims, initial=0))


def has_nonfinite(x: jax.Array, dims: tuple[int, ...] | None = None) -> jax.Array:
    """Whether an entry is infinite or NaN: x - x is 0 unless it is NaN.

    XLA fuses this sum into one pass, where it would write a mask of flags to memory. A sum over devices keeps NaN; a
    maximum over them need not, and XLA's for CPUs (jax 0.10, 0.12) loses it on one device as well.
    """
    return jnp.isnan(jnp.sum(x - x, axis=dims))


def wide(dtype: Any) -> Any:
    """The dtype to calculate in: `accumulator`, but complex for complex."""
    return dtype if jnp.issubdtype(dtype, jnp.complexfloating) else accumulator(dtype)


def modulus(x: Any) -> jax.Array:
    """The absolute value, in `accumulator` of the dtype; that of finite complex numbers saturates."""
    x = jnp.asarray(x)
    size = jnp.abs(x.astype(wide(x.dtype)))
    return (
        jnp.where(jnp.isfinite(x), jnp.minimum(size, jnp.finfo(size.dtype).max), size) if jnp.iscomplexobj(x) else size
    )


def _real(x: jax.Array) -> jax.Array:
    return jnp.real(x) if jnp.iscomplexobj(x) else x


def _power(x: jax.Array, ord: float) -> jax.Array:
    """The modulus to the power `ord`."""
    x = x.astype(wide(x.dtype))
    if ord == 2:
        return jnp.square(x.real) + jnp.square(x.imag) if jnp.iscomplexobj(x) else jnp.square(x)
    # A whole power is a few products, where a float power is a logarithm and an exponential.
    return jnp.abs(x) ** (int(ord) if ord == int(ord) else ord)


def _root(total: jax.Array, ord: float) -> jax.Array:
    if ord == 1:
        return total
    return jnp.sqrt(total) if ord == 2 else total ** (1 / ord)


def _can_leave_range(dtype: Any, ord: float) -> bool:
    """Whether a plain sum of powers of finite numbers can overflow or underflow; for float16 and ord 2 it can't."""
    return (jnp.finfo(dtype).maxexp + 10) * ord + 30 > jnp.finfo(accumulator(dtype)).maxexp


def _smallest_trusted(dtype: Any, size: int) -> float:
    """The smallest sum of `size` powers that underflow of some of them cannot have changed visibly."""
    info = jnp.finfo(dtype)
    return size * float(info.tiny) / float(info.eps)


def or_one(x: jax.Array) -> jax.Array:
    """x where one can divide by it, else 1."""
    return jnp.where((x > 0) & jnp.isfinite(x), x, jnp.ones_like(x))


def _saturate(norm: jax.Array, scale: jax.Array) -> jax.Array:
    """norm * scale, at most the largest number unless `norm` is infinite itself."""
    scaled = norm * scale
    return jnp.where(jnp.isfinite(norm), jnp.minimum(scaled, jnp.finfo(scaled.dtype).max), scaled)
