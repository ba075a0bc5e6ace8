"""What a plain clip should give, in NumPy longdouble, whose range holds the square of every float64.

An oracle says between which two factors that of each coordinate must lie. There is more than one right factor where
the library leaves it open: a subnormal number may count as itself or as zero, and a norm past the largest float may
be the largest float.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

L = np.longdouble
ROUNDING = 1e-5  # what norms and factors may be off by


class Expected(NamedTuple):
    """What a leaf must be: between `low` and `high` times `base`, or bit for bit the same where `kept`.

    Attributes:
      base: None is what the leaf was.
    """

    low: Any
    high: Any
    kept: Any
    base: Any = None


def is_float(x: Any) -> bool:
    return x is not None and jax.dtypes.issubdtype(np.asarray(x).dtype if not is_key(x) else x.dtype, np.inexact)


def is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def wide(x: Any) -> np.ndarray:
    x = np.asarray(x)
    if x.dtype.kind == "c":
        return x.astype(np.clongdouble)
    return x.astype(np.float64).astype(L) if x.dtype.itemsize < 4 else x.astype(L)


def info(dtype: Any) -> Any:
    """Of the dtype that norms of a leaf have."""
    return np.finfo(np.float64 if str(dtype) in {"float64", "complex128"} else np.float32)


def flushed(x: np.ndarray, dtype: Any) -> np.ndarray:
    """With zeros in the place of subnormals."""
    if x.dtype.kind == "c":
        return flushed(x.real, dtype) + 1j * flushed(x.imag, dtype)
    return np.where(np.abs(x) < L(info(dtype).tiny), L(0), x)


def norm_of(x: np.ndarray, ord: float = 2, dims: tuple[int, ...] | None = None) -> np.ndarray:
    """The norm over `dims`, which keep a length of 1."""
    size = np.abs(x)
    dims = tuple(range(x.ndim)) if dims is None else dims
    with np.errstate(invalid="ignore", over="ignore"):
        if ord == np.inf:
            return np.max(size, axis=dims, keepdims=True, initial=0)
        # By the largest, since even a longdouble has no room for the cube of 1e-308 beside that of 1e308.
        top = np.max(size, axis=dims, keepdims=True, initial=0)
        top = np.where((top > 0) & np.isfinite(top), top, L(1))
        return top * np.sum(power(size / top, ord), axis=dims, keepdims=True) ** (1 / L(ord))


def power(x: np.ndarray, ord: float) -> np.ndarray:
    """`x ** ord`, which takes NumPy many times longer for a longdouble than products do."""
    return functools.reduce(np.multiply, [x] * ord) if isinstance(ord, int) else x ** L(ord)


def norms_of(leaf: Any, ord: float = 2, dims: tuple[int, ...] | None = None, divisor: Any = 1) -> list[np.ndarray]:
    """What the norm of a leaf may be: as it is, without subnormals, and no larger than the largest float."""
    x, dtype = wide(leaf), np.asarray(leaf).dtype
    without = flushed(x, dtype)
    exact = [norm_of(x, ord, dims)]
    exact.append(exact[0] if np.array_equal(x, without) else norm_of(without, ord, dims))  # few leaves have subnormals
    top = L(info(dtype).max)
    exact += [np.where(np.isfinite(n) & (n > top * L(1 - ROUNDING)), top, n) for n in exact]
    exact = [n / divisor for n in exact]
    return ends(exact + [flushed(n, dtype) for n in exact])


def ends(found: list[np.ndarray]) -> list[np.ndarray]:
    """Of many numbers that are right, as they are, the least and the most: what follows from them is monotone."""
    return [found[0], np.minimum.reduce(found), np.maximum.reduce(found)]


def together(leaves: Sequence[Any], ord: float = 2) -> list[np.ndarray]:
    """What the norm of all leaves may be."""
    widest = "float64" if any(info(np.asarray(leaf).dtype).bits == 64 for leaf in leaves) else "float32"
    found = [[n.reshape(()) for n in norms_of(leaf, ord)] for leaf in leaves]
    whole = [norm_of(np.array(row, L), ord).reshape(()) for row in zip(*found, strict=True)] or [np.array(L(0))]
    top = L(info(widest).max)
    whole += [np.where(np.isfinite(n) & (n > top * L(1 - ROUNDING)), top, n) for n in whole]
    return ends(whole + [flushed(n, widest) for n in whole])


def bounds_of(c: Any, dtype: Any) -> list[np.ndarray]:
    """What a bound in float32 may be: as it is, and without subnormals of either dtype."""
    c = np.asarray(c).astype(L)
    return [c, flushed(flushed(c, dtype), "float32")]


Factor = Callable[[np.ndarray, Any, Any], np.ndarray]


def into_band(n: np.ndarray, low: Any, high: Any) -> np.ndarray:
    goal = np.minimum(np.maximum(n, low), high)
    return np.where((n > 0) & (goal != n), goal / np.where(n > 0, n, 1), L(1))


def smooth(n: np.ndarray, low: Any, high: Any) -> np.ndarray:
    del low
    whole = n + high
    finite = np.where(whole > 0, high / np.where(whole > 0, whole, 1), L(1))
    return np.where(np.isinf(high) | (n == 0), L(1), finite)


def expected(norms: list[np.ndarray], lows: list[Any], highs: list[Any], factor: Factor = into_band) -> Expected:
    """Of a group with one of these norms, and one of these bands."""
    with np.errstate(all="ignore"):
        finite = np.isfinite(norms[0])
        each = [np.where(finite, factor(n, low, high), L(1)) for n in norms for low in lows for high in highs]
        least, most = np.minimum.reduce(each), np.maximum.reduce(each)
        is_inside = factor is into_band
        inside = [
            (n == 0) | ((n * L(1 + ROUNDING) <= high) & (n * L(1 - ROUNDING) >= low)) if is_inside else n == 0
            for n in norms
            for low in lows
            for high in highs
        ]
        # An upper end of inf permits every norm, whatever that is off by.
        kept = ~finite | np.logical_and.reduce(np.broadcast_arrays(*inside))
        return Expected(least, most, kept)


def problem(before: Any, after: Any, want: Expected) -> str:
    """What is wrong with a leaf; "" if nothing is."""
    before, after = np.asarray(before), np.asarray(after)
    if (before.dtype, before.shape) != (after.dtype, after.shape):
        return f"{before.dtype} of shape {before.shape} became {after.dtype} of shape {after.shape}"
    kept = np.broadcast_to(want.kept, before.shape)
    if not np.all(same(before, after) | ~kept):
        return "what must be kept bit for bit is not"
    low, high = (np.broadcast_to(each, before.shape) for each in (want.low, want.high))
    base = wide(before) if want.base is None else want.base
    for part in [np.real, np.imag] if before.dtype.kind == "c" else [np.asarray]:
        x, y = wide(part(before)), wide(part(after))
        if np.any(~np.isfinite(y) & np.isfinite(x) & ~kept):
            return "finite in, not finite out"
        with np.errstate(all="ignore"):
            least, most = _between(low, high, part(base), before.dtype)
            # A subnormal coordinate may count as 0, whatever it is scaled to.
            subnormal = np.abs(x) < L(info(before.dtype).tiny)
            least, most = (
                np.where(subnormal, np.minimum(least, 0), least),
                np.where(subnormal, np.maximum(most, 0), most),
            )
            room = tolerance(before.dtype) * np.maximum(np.abs(least), np.abs(most)) + smallest(before.dtype)
            wrong = ~kept & ~((y >= least - room) & (y <= most + room))
        if np.any(wrong):
            i = tuple(int(j) for j in np.argwhere(wrong)[0])
            return f"at {i} {float(x[i])!r} became {float(y[i])!r}, not {float(least[i])!r} to {float(most[i])!r}"
    return ""


def _between(low: np.ndarray, high: np.ndarray, x: np.ndarray, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    top = L(float(jnp.finfo(dtype).max))
    found = [np.clip(factor * x, -top, top) for factor in (low, high)]
    return np.minimum(*found), np.maximum(*found)


def same(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Whether numbers are the same bit for bit; of NaNs there is one."""
    if before.dtype.kind == "c":
        return same(before.real, after.real) & same(before.imag, after.imag)
    one, other = wide(before), wide(after)
    return ((one == other) & (np.signbit(one) == np.signbit(other))) | (np.isnan(one) & np.isnan(other))


def tolerance(dtype: Any) -> Any:
    dtype = np.dtype(dtype)
    eps = float(jnp.finfo(dtype).eps)
    if dtype in (np.float64, np.complex128):
        return L(1e-12)
    return L(ROUNDING) if eps < 1e-6 else L(0.51 * eps + ROUNDING)


def smallest(dtype: Any) -> Any:
    """By how much rounding to subnormals, or to zero where these are flushed, may change a number."""
    details = jnp.finfo(dtype)
    own = float(details.smallest_subnormal)
    tiny = float(info(dtype).tiny)
    # A factor below tiny^2 is lost, and with it numbers up to the largest times that.
    return L(4.1) * L(tiny) if own <= tiny else L(own) * L(0.51)
