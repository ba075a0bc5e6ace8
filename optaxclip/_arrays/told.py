"""Numbers that a caller passes to `update`. They must be the same on all devices."""

import reprlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip._arrays import layouts


def scalar(name: str, value: Any, what: str) -> jax.Array:
    """Returns a real number as a scalar: float64 if it is one, else float32.

    Args:
      name: the name of the argument, for messages.
      value: what the user passed.
      what: a word for the number, such as "loss", for messages.

    Raises:
      ValueError: if it is no real scalar, or differs between the devices of a `shard_map`.
    """
    try:
        number = jnp.asarray(_in_range(value))
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} must be one {what}, a real scalar, got {reprlib.repr(value)}") from None
    if number.shape or not jnp.issubdtype(number.dtype, jnp.number) or jnp.iscomplexobj(number):
        raise ValueError(f"{name} must be one {what}, a real scalar, got {number.dtype} of shape {number.shape}")
    if over := layouts.varying(number):
        raise ValueError(
            f"{name} differs between the devices along mesh axes {tuple(sorted(over))}, so they could decide "
            f"differently: pass the same {what} on every device, reduced with jax.lax.psum or jax.lax.pmean"
        )
    return number if number.dtype == jnp.float64 else number.astype(jnp.float32)


def _in_range(value: Any) -> Any:
    """Limits a finite Python or NumPy number to the float32 range, as a measured norm would be."""
    is_number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not is_number or jax.config.read("jax_enable_x64"):
        return value
    number = float(value)
    largest = float(np.finfo(np.float32).max)
    return min(max(number, -largest), largest) if np.isfinite(number) else value
