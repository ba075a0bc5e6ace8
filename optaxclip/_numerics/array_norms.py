"""Norms of arrays over the whole float range, in one pass and without a branch.

A float32 sum of squares overflows for norms above 2e19 and underflows below 1e-23. Therefore:

- On CPUs and GPUs powers are summed in float64. It has room for the square of every float32, and for powers up to the
  seventh.
- On TPUs float64 is a pair of float32, with the range of one, and no dtype is wider. There, squares are summed at three
  scales, by the size of the entry (Blue, A Portable Fortran Program to Find the Euclidean Norm of a Vector, 1978;
  LAPACK's `nrm2` since 3.10). float64 arrays take this form on every platform.
- For all other powers, entries are divided by the largest one first. This takes one more pass.

Norms are float32, or float64 for float64 arrays. A norm above the largest float saturates: it is infinite only if an
entry is. A norm below the smallest normal float is 0.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip._arrays import dtypes, groups, layouts
from optaxclip._numerics import arithmetic, rows

Dims: TypeAlias = tuple[int, ...]
Sums: TypeAlias = tuple[jax.Array, ...]

# Arrays of up to this many entries are stacked with arrays of the same shape and reduced together, which compiles
# faster.
_SMALL = 1 << 14


def norms(arrays: Sequence[Any], dims: Sequence[Dims], ord: float) -> list[jax.Array]:
    """Returns the norm of each array over its dimensions `dims`, of this device's piece."""
    # The dtype is explicit: Python numbers are weakly typed, and would change dtype under enable_x64.
    return _norms([jnp.asarray(x, jnp.result_type(x)) for x in arrays], tuple(dims), ord) if arrays else []


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _norms_of(arrays: list[jax.Array], dims: tuple[Dims, ...], ord: float) -> list[jax.Array]:
    has_columns = any(x.ndim - 1 not in over for x, over in zip(arrays, dims, strict=True))
    platforms = ("cpu", "tpu", "default") if has_columns else ("tpu", "default")  # every platform named here is traced
    return jax.lax.platform_dependent(
        arrays, **{name: functools.partial(_norms_on, name, dims=dims, ord=ord) for name in platforms}
    )


# At module level and jitted, so that eager calls do not compile again.
_norms = jax.jit(_norms_of, static_argnums=(1, 2))


@_norms_of.defjvp
def _norms_jvp(dims: tuple[Dims, ...], ord: float, primals: Any, tangents: Any) -> tuple[list[Any], list[Any]]:
    (arrays,), (changes,) = primals, tangents
    found = _norms(arrays, dims, ord)
    return found, [_change(*each, ord) for each in zip(arrays, changes, found, dims, strict=True)]


def _change(x: jax.Array, dx: jax.Array, norm: jax.Array, dims: Dims, ord: float) -> jax.Array:
    by_entry = slope(x.astype(dtypes.wide(x.dtype)), jnp.expand_dims(norm, dims), dims, (), ord)
    return jnp.sum(jnp.real(jnp.conj(by_entry) * dx.astype(by_entry.dtype)), axis=dims)


def slope(x: jax.Array, norm: jax.Array, dims: Dims, axes: tuple[str, ...], ord: float) -> jax.Array:
    """Returns the derivative of the norm over `dims` and mesh axes by x. It is 0 where the norm is 0."""
    if ord == 1:
        return jnp.sign(x)
    if ord == math.inf:
        attained = (jnp.abs(x) == norm).astype(x.dtype)
        ties = jnp.sum(attained, axis=dims, keepdims=True)
        return jnp.sign(x) * attained / (jax.lax.psum(ties, axes) if axes else ties)
    share = arithmetic.quotient(x, arithmetic.or_one(norm))
    return share if ord == 2 else jnp.sign(x) * (jnp.abs(share) ** (ord - 1)).astype(x.dtype)


def _norms_on(platform: str, arrays: list[jax.Array], *, dims: Sequence[Dims], ord: float) -> list[jax.Array]:
    forms = groups.alike(_form(platform, x, over, ord) for x, over in zip(arrays, dims, strict=True))
    found: dict[int, jax.Array] = {}
    # The only place where a program without float64 uses float64. Everything in it has an explicit dtype.
    with jax.enable_x64(True):
        for form, at in forms.items():
            sums = _sums([arrays[i] for i in at], [dims[i] for i in at], functools.partial(form.sums, ord=ord))
            roots = groups.vectorized(functools.partial(form.root, ord=ord), *zip(*sums, strict=True))
            found |= zip(at, roots, strict=True)
    return [found[i] for i in range(len(arrays))]


def _sums(arrays: list[jax.Array], dims: list[Dims], sums_of: Callable[..., Sums]) -> list[Sums]:
    """Returns the sums of each array."""

    def kind(i: int) -> Any:
        # Arrays whose layout XLA decides are not stacked: stacked, they would share one layout.
        stacks = arrays[i].size <= _SMALL and len(dims[i]) == arrays[i].ndim and layouts.is_known(arrays[i])
        return jax.typeof(arrays[i]) if stacks else i

    found: dict[int, Sums] = {}
    for at in groups.alike(map(kind, range(len(arrays)))).values():
        if len(at) == 1:
            found[at[0]] = sums_of(arrays[at[0]], dims[at[0]])
        else:
            together = sums_of(jnp.stack([arrays[i] for i in at]), tuple(range(1, 1 + arrays[at[0]].ndim)))
            found |= zip(at, zip(*map(groups.unstacked, together), strict=True), strict=True)
    return [found[i] for i in range(len(arrays))]


class _Form(NamedTuple):
    """A way to calculate norms.

    Attributes:
      sums: `(x, dims, ord) -> arrays`, reduces an array.
      root: `(*sums, ord) -> norm`, elementwise.
    """

    sums: Callable[..., Sums]
    root: Callable[..., jax.Array]


def _form(platform: str, x: jax.Array, dims: Dims, ord: float) -> _Form:
    if ord == math.inf:
        return _LARGEST
    fits = (jnp.finfo(jnp.float32).maxexp + 10) * ord < jnp.finfo(jnp.float64).maxexp
    if platform == "tpu" or not fits or dtypes.accumulator(x.dtype) != jnp.float32:
        return _AT_THREE_SCALES if ord == 2 else _BY_SHARES
    if ord == 2 and x.size > _SMALL and x.ndim - 1 not in dims:
        if platform == "cpu":
            return _COLUMNS_ON_CPU
        columns = x.size // math.prod(x.shape[dim] for dim in dims)
        if x.dtype.itemsize == 2 and columns <= _SMALL and layouts.is_whole(x):
            return _NARROW_COLUMNS
    return _IN_FLOAT64


def _powers(x: jax.Array, ord: float) -> jax.Array:
    """Returns the moduli of the entries to the power `ord`."""
    if jnp.iscomplexobj(x):
        squares = jnp.square(x.real) + jnp.square(x.imag)
        return squares if ord == 2 else squares ** (ord / 2)
    # An integer power is a few products; a float power is a logarithm and an exponential.
    return jnp.square(x) if ord == 2 else jnp.abs(x) ** (int(ord) if ord == int(ord) else ord)


def _root(total: jax.Array, ord: float) -> jax.Array:
    if ord == 1:
        return total
    return jnp.sqrt(total) if ord == 2 else total ** (1 / ord)


def _normal(norm: jax.Array) -> jax.Array:
    return jnp.where(norm < float(jnp.finfo(norm.dtype).tiny), jnp.zeros_like(norm), norm)


# In float64.


def _sums_in_float64(x: jax.Array, dims: Dims, ord: float) -> Sums:
    dtype = jnp.complex128 if jnp.iscomplexobj(x) else jnp.float64
    # Converted to float32 first: XLA for CPUs (jax 0.10 and 0.12) takes 5 to 15 times as long from float16 and float8
    # straight to float64. This can go when it does not.
    x = x.astype(dtypes.wide(x.dtype)).astype(dtype)
    return (jnp.sum(_powers(x, ord), axis=dims),)


def _root_in_float64(total: jax.Array, ord: float) -> jax.Array:
    norm, highest = _root(total, ord), float(jnp.finfo(jnp.float32).max)
    return _normal(jnp.where(jnp.isfinite(total), jnp.minimum(norm, highest), total).astype(jnp.float32))


def _sums_of_narrow_columns(x: jax.Array, dims: Dims, ord: float) -> Sums:
    """Sums in two steps. In one, XLA for GPUs (jax 0.10) writes the float64 squares of 16-bit floats to memory."""
    blocks = math.gcd(x.shape[dims[0]], 8)
    x = x.reshape(*x.shape[: dims[0]], blocks, -1, *x.shape[dims[0] + 1 :])
    (sums,) = _sums_in_float64(x, tuple(dim + 1 for dim in dims), ord)
    return (jnp.sum(jax.lax.optimization_barrier(sums), axis=dims[0]),)


def _sums_of_columns_on_cpu(x: jax.Array, dims: Dims, ord: float) -> Sums:
    """Sums in float32 if nothing overflows or underflows, else in float64.

    XLA for CPUs (jax 0.10 and 0.12) is twice as fast in float32 here.
    """

    def powers(x: jax.Array) -> jax.Array:
        return _powers(x.astype(dtypes.wide(x.dtype)), ord)

    narrow = rows.sum_of(powers, x) if dims == (0,) else jnp.sum(powers(x), axis=dims)
    info = jnp.finfo(narrow.dtype)
    lowest = math.prod(x.shape[dim] for dim in dims) * float(info.tiny) / float(info.eps)
    return jax.lax.cond(
        jnp.all((narrow > lowest) & (narrow <= info.max)),
        lambda x: (narrow.astype(jnp.float64),),
        lambda x: _sums_in_float64(x, dims, ord),
        x,
    )


_IN_FLOAT64 = _Form(_sums_in_float64, _root_in_float64)
_NARROW_COLUMNS = _Form(_sums_of_narrow_columns, _root_in_float64)
_COLUMNS_ON_CPU = _Form(_sums_of_columns_on_cpu, _root_in_float64)


# At three scales.


@functools.partial(jax.jit, static_argnums=(1, 2))  # traced once for all leaves of one shape and dtype
def _sums_at_three_scales(x: jax.Array, dims: Dims, ord: float) -> Sums:
    del ord
    x, real = x.astype(dtypes.wide(x.dtype)), dtypes.accumulator(x.dtype)
    parts = [jnp.abs(part) for part in ((x.real, x.imag) if jnp.iscomplexobj(x) else (x,))]
    squares = functools.reduce(_added, map(squares_at_three_scales, parts))
    if len(dims) < x.ndim:
        # In one reduction, XLA (jax 0.8 to 0.12) would gather the pieces of all devices instead of adding them up.
        return tuple(jnp.sum(each, axis=dims) for each in squares)
    # In one reduction: for three, XLA for TPUs (jax 0.10) would write their operands to memory.
    return tuple(jax.lax.reduce(squares, (np.zeros((), real),) * 3, _added, dims))


def _added(one: Sums, other: Sums) -> Sums:
    return tuple(map(jnp.add, one, other))


def squares_at_three_scales(x: jax.Array) -> Sums:
    """Returns the scaled squares of the large, ordinary and small ones among positive numbers, with 0 elsewhere."""
    large, small, down, up = _scales(x.dtype)
    is_large, is_small, none = x > large, x < small, jnp.zeros_like(x)
    return (
        jnp.square(jnp.where(is_large, x * down, none)),
        jnp.square(jnp.where(is_large | is_small, none, x)),
        jnp.square(jnp.where(is_small, x * up, none)),
    )


def root_of_three_scales(large: jax.Array, ordinary: jax.Array, small: jax.Array, ord: float = 2) -> jax.Array:
    """Returns the norm of numbers from their squares at three scales, or from sums of these."""
    del ord
    _, _, down, up = _scales(large.dtype)
    most_large = arithmetic.at_most_largest(jnp.sqrt(large) / down, jnp.isfinite(large))
    parts = (most_large, jnp.sqrt(ordinary), jnp.sqrt(small) / up)
    size = functools.reduce(jnp.maximum, parts)
    # By quotients: XLA (jax 0.8 and 0.10) would fold a product of powers of two into one that is 0 or inf.
    total = functools.reduce(jnp.add, [jnp.square(part / arithmetic.or_one(size)) for part in parts])
    norm = arithmetic.at_most_largest(jnp.sqrt(total) * arithmetic.or_one(size), jnp.isfinite(size))
    return _normal(jnp.where(jnp.isfinite(size), norm, size))


def _scales(dtype: Any) -> tuple[float, float, float, float]:
    """Returns above which size an entry is large, below which it is small, and the factors for both before squaring."""
    times = int(jnp.finfo(dtype).maxexp) // 128
    return 2.0 ** (40 * times), 2.0 ** (-50 * times), 2.0 ** (-84 * times), 2.0 ** (90 * times)


_AT_THREE_SCALES = _Form(_sums_at_three_scales, root_of_three_scales)


# By the largest entry.


def _norm_by_shares(x: jax.Array, dims: Dims, ord: float) -> Sums:
    size = arithmetic.or_one(jnp.max(arithmetic.modulus(x), axis=dims, initial=0))
    shares = arithmetic.quotient(x.astype(dtypes.wide(x.dtype)), jnp.expand_dims(size, dims))
    total = _root(jnp.sum(_powers(shares, ord), axis=dims), ord)
    return (arithmetic.at_most_largest(total * size, jnp.isfinite(total)),)


def _largest(x: jax.Array, dims: Dims, ord: float) -> Sums:
    del ord
    return (arithmetic.largest(x, dims),)


def _as_it_is(norm: jax.Array, ord: float) -> jax.Array:
    del ord
    return _normal(norm)


_BY_SHARES = _Form(_norm_by_shares, _as_it_is)
_LARGEST = _Form(_largest, _as_it_is)
