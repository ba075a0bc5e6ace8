"""Reductions over the leading dimensions of arrays of many columns.

XLA's reduction for CPUs falls from 20 GB/s to 0.6 where it leaves more than 2^14 columns: for the layers of a stacked
kernel, the gradients of single examples, or an output layer of a large vocabulary. Taking the rows together, block by
block, keeps the 20. That is for jax 0.8 to 0.10. On jax 0.12 it pays only where rows are few (8 of 10^6: 8 and 1.5 ms;
64 of 300,000: 92 and 91 ms, where jax 0.10 took 469 and 89), so this module can go with jax 0.10.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from optaxclip import layouts

_MANY = 1 << 14
_BLOCK = 16  # rows that are taken together at once: a loop over single ones is slower, and rounds more often

Map = Callable[[jax.Array], jax.Array]


def sum_of(f: Map, x: jax.Array, dims: tuple[int, ...]) -> jax.Array:
    """`jnp.sum(f(x), axis=dims)` of an `f` that acts on every entry."""
    return _reduced(f, x, dims, jnp.sum, jnp.add)


def max_of(f: Map, x: jax.Array, dims: tuple[int, ...]) -> jax.Array:
    """`jnp.max(f(x), axis=dims, initial=0)`, likewise."""
    return _reduced(f, x, dims, functools.partial(jnp.max, initial=0), jnp.maximum)


def _reduced(
    f: Map, x: jax.Array, dims: tuple[int, ...], reduction: Callable[..., jax.Array], pair: Callable[..., jax.Array]
) -> jax.Array:
    def at_once(x: jax.Array) -> jax.Array:
        return reduction(f(x), axis=dims)

    columns = math.prod(x.shape[len(dims) :])
    # Rows of what is split over devices would have to be gathered.
    is_leading = dims == tuple(range(len(dims)))
    if not is_leading or columns <= _MANY or x.size <= columns or not layouts.is_whole(x):
        return at_once(x)
    return jax.lax.platform_dependent(x, cpu=functools.partial(_by_rows, f, pair, len(dims)), default=at_once)


def _by_rows(f: Map, pair: Callable[..., jax.Array], leading: int, x: jax.Array) -> jax.Array:
    rows, row = math.prod(x.shape[:leading]), x.shape[leading:]
    x = x.reshape(rows, *[1] * (leading - 1), *row)  # of the same rank, for an `f` with other arrays in it
    length = min(rows, _BLOCK)

    def block(start: jax.Array | int, length: int) -> jax.Array:
        # One slice per row: a slice of them all XLA (jax 0.10) writes to memory first.
        each = [f(jax.lax.dynamic_index_in_dim(x, start + i)) for i in range(length)]
        return functools.reduce(pair, each)

    total = jax.lax.fori_loop(
        1, rows // length, lambda i, total: pair(total, block(i * length, length)), block(0, length)
    )
    if rows % length:
        total = pair(total, block(rows - rows % length, rows % length))
    return total.reshape(row)
