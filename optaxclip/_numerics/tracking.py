"""An estimate of a quantile that moves by the share of what lies at or below it."""

from typing import Any

import jax
import jax.numpy as jnp


def moved(log_estimate: jax.Array, share: jax.Array, quantile: Any, learning_rate: Any) -> jax.Array:
    """The logarithm of the estimate one step on: down where more than a share of `quantile` lies at or below it.

    It stays that of a normal float.
    """
    dtype, info = log_estimate.dtype, jnp.finfo(log_estimate.dtype)
    away = share - jnp.asarray(quantile, dtype)
    moved_on = log_estimate - jnp.asarray(learning_rate, dtype) * away
    return jnp.clip(moved_on, jnp.log(info.tiny), jnp.log(info.max))


def estimate(log_estimate: jax.Array) -> jax.Array:
    """What `moved` has the logarithm of."""
    info = jnp.finfo(log_estimate.dtype)
    return jnp.clip(jnp.exp(log_estimate), info.tiny, info.max)  # rounded, a logarithm may be that of inf or subnormal
