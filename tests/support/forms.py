"""The norm in the form of another platform, and how right it has to be there."""

import contextlib
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optaxclip._numerics import array_norms, tree_norms

TINY = float(jnp.finfo(jnp.float32).tiny)


@contextlib.contextmanager
def form_of(platform):
    """Norms traced in it take the branches of this platform: "default" is what a GPU runs.

    Trace nothing else in it: another function that is jitted in the library would keep the branch for later tests.
    """

    def chosen(*operands, **branches):
        return branches.get(platform, branches["default"])(*operands)

    def anew(jitted):
        """The same function, which has not been traced yet."""
        return jax.jit(functools.partial(jitted.__wrapped__), static_argnums=(1, 2))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(jax.lax, "platform_dependent", chosen)
        patched.setattr(array_norms, "_norms", anew(array_norms._norms))
        patched.setattr(tree_norms, "norm_of_norms", anew(tree_norms.norm_of_norms))
        yield


def places(form, ord=2, columns=False):
    """How many last places of float32 the norm of a few numbers may be off by: where the sum is float64, one."""
    is_narrow = form == "tpu" or ord > 7 or (form == "cpu" and columns)
    return 4 if is_narrow else 1


def norms(arrays, ord=2, dims=None):
    """What the library finds, over all dimensions unless `dims` says which."""
    arrays = list(map(jax.device_put, arrays))
    return array_norms.norms(arrays, [tuple(range(x.ndim)) if dims is None else dims for x in arrays], ord)


def right_norm(x, ord=2, dims=None):
    """By NumPy, in floats that are wider than those of x."""
    x = np.asarray(x)
    wider = np.longdouble if x.dtype in ("float64", "complex128") else np.float64
    wide = np.abs(x.astype(np.result_type(wider, np.complex64) if np.iscomplexobj(x) else wider))
    size = np.max(wide, axis=dims, keepdims=True, initial=0)
    if ord == math.inf:
        return size.squeeze(dims)
    shares = wide / np.where(size > 0, size, 1)
    return (size * np.sum(shares**ord, axis=dims, keepdims=True) ** (1 / wider(ord))).squeeze(dims)


def assert_right(found, x, within, ord=2, dims=None):
    """To so many last places; saturated above the largest number, and 0 below the smallest normal one."""
    info = jnp.finfo(found.dtype)
    right = right_norm(x, ord, dims)
    found = np.asarray(found, right.dtype)
    assert found.shape == right.shape
    most, tiny, within = float(info.max), float(info.tiny), within * float(info.eps)
    off = np.abs(found - np.minimum(right, most))
    is_right = (off <= within * right) | ((found == 0) & (right < tiny * (1 + within)))
    where = np.flatnonzero(~is_right)
    case = f"{x.dtype}{list(x.shape)}, dims {dims}, ord {ord}"
    assert not where.size, (case, where[:5], found.ravel()[where[:5]], right.ravel()[where[:5]])


def signed(rng, shape):
    """Numbers in +-[0.5, 1]."""
    return rng.choice([-1, 1], shape) * rng.uniform(0.5, 1, shape)


def without_subnormal(x):
    """Zero in place of entries that are subnormal in what is summed: machines differ in whether these count."""
    if np.iscomplexobj(x):
        return (without_subnormal(x.real) + 1j * without_subnormal(x.imag)).astype(x.dtype)
    tiny = float(np.finfo(x.dtype).tiny) if x.dtype == np.float64 else TINY
    return np.where(np.abs(x.astype(np.float64)) < tiny, 0, x.astype(np.float64)).astype(x.dtype)
