"""Estimates a quantile, from the share of values at or below the estimate."""

from typing import Any

import jax
import jax.numpy as jnp


def moved(log_estimate: jax.Array, share: jax.Array, quantile: Any, learning_rate: Any) -> jax.Array:
    """Returns the logarithm of the estimate after one step.

    It falls if a share of more than `quantile` lies at or below the estimate. The estimate stays a normal float.
    """
    dtype, info = log_estimate.dtype, jnp.finfo(log_estimate.dtype)
    away = share - jnp.asarray(quantile, dtype)
    moved_on = log_estimate - jnp.asarray(learning_rate, dtype) * away
    return jnp.clip(moved_on, jnp.log(info.tiny), jnp.log(info.max))


def estimate(log_estimate: jax.Array) -> jax.Array:
    """Returns the estimate, given its logarithm as `moved` returns it."""
    info = jnp.finfo(log_estimate.dtype)
    return jnp.clip(jnp.exp(log_estimate), info.tiny, info.max)  # a rounded logarithm may give inf or a subnormal
