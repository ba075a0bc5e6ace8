"""The quantile of a whole history in a fixed number of bytes: a histogram of the logarithms of norms."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip._arguments import bounds
from optaxclip.thresholds.ordering import interpolated, with_one_more
from optaxclip.thresholds.rules import Rule, no_steps

# Normal floats are the octaves from 2^-126 to 2^127. A bin is 1.7 % wide, so its middle is within 0.9 % of every norm
# in it.
_FIRST_OCTAVE = -126
_OCTAVES = 254
_BINS = 40  # per octave
_EXACT = 64  # norms; with the bins, just under 40 KiB
MAX_GROUPS = 1024  # with a history of this size


class HistogramState(NamedTuple):
    """State of `quantile` without a window, per group.

    Attributes:
      first_norms: the first 64 norms in ascending order; the largest float in empty places.
      histogram: int32 of shape (254, 40), the number of norms in each of the 40 parts of each octave.
      norms_seen: int32, the number of norms in the histogram.
    """

    first_norms: jax.Array
    histogram: jax.Array
    norms_seen: jax.Array


def rule_of_all(q: Any) -> Rule:
    """The quantile of all norms so far, the current one included: exact at first, then to 0.9 %."""

    def init(dtype: Any) -> HistogramState:
        first = jnp.full(_EXACT, bounds.highest(dtype), dtype)
        return HistogramState(first, jnp.zeros((_OCTAVES, _BINS), jnp.int32), no_steps())

    def limit(norm: jax.Array, state: HistogramState) -> tuple[Any, HistogramState]:
        first, histogram, seen = state
        is_early = seen < _EXACT
        first = jnp.where(is_early, with_one_more(first, norm), first)
        histogram = histogram.at[_bin_of(norm)].add(1)
        by_octave = jnp.sum(histogram, axis=1)
        seen = jnp.asarray(optax.safe_increment(seen))

        def value_at(rank: jax.Array) -> jax.Array:
            return jnp.where(is_early, first[rank], _value_at(histogram, by_octave, rank, norm.dtype))

        bound = interpolated(q, seen, value_at, norm.dtype)
        # The middle of the bin of the largest norm may be below that norm.
        bound = jnp.where(jnp.asarray(q) >= 1, bounds.highest(norm.dtype), bound)
        return (0.0, bound), HistogramState(first, histogram, seen)

    return Rule(init, limit)


@jax.jit
def _bin_of(norm: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The octave of a norm, and the part of it. float64 beyond the range of float32 goes to the outer bins."""
    flat = jnp.floor((jnp.log2(norm) - _FIRST_OCTAVE) * _BINS).astype(jnp.int32)
    return jnp.divmod(jnp.clip(flat, 0, _OCTAVES * _BINS - 1), _BINS)


@functools.partial(jax.jit, static_argnames="dtype")
def _value_at(histogram: jax.Array, by_octave: jax.Array, rank: jax.Array, dtype: Any) -> jax.Array:
    """The middle of the bin with the norm of this rank, counted from 0."""
    octave, rest = _place(by_octave, rank)
    part, _ = _place(histogram[octave], rest)
    middle = (octave * _BINS + part).astype(dtype) + 0.5
    return jnp.exp2(middle / _BINS + _FIRST_OCTAVE)


def _place(numbers: jax.Array, rank: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The bin that holds the entry of a rank, and the rank of the entry in that bin."""
    up_to = jnp.cumsum(numbers)
    place = jnp.sum(up_to <= rank)
    return place, rank - (up_to[place] - numbers[place])
