"""Which leaves hold floats, and which floats can be clipped."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from optaxclip._arrays import trees
from optaxclip._arrays.trees import Tree

_ADVICE = "cast the gradients to bfloat16 or float32 before the update"


def of(leaf: Any) -> Any:
    """Returns the dtype of a leaf; None if it is neither array nor number, such as a function in an Equinox model."""
    if hasattr(leaf, "dtype"):
        return leaf.dtype
    return jnp.result_type(leaf) if isinstance(leaf, bool | int | float | complex) else None


def is_inexact(leaf: Any) -> bool:
    """Whether a leaf holds real or complex floats, not integers, booleans, float0 or keys."""
    dtype = of(leaf)
    return dtype is not None and bool(jnp.issubdtype(dtype, jnp.inexact))


def places_of_floats(flat: Sequence[Any]) -> list[int]:
    """Returns the indices of the leaves that hold real or complex floats."""
    kinds = list(map(of, flat))
    inexact = {kind for kind in set(kinds) if kind is not None and jnp.issubdtype(kind, jnp.inexact)}
    return [i for i, kind in enumerate(kinds) if kind in inexact]


def accumulator(dtype: Any) -> Any:
    """Returns the real dtype for norms of arrays of `dtype`: float64 for 64-bit floats, else float32."""
    return jnp.float64 if dtype in (jnp.float64, jnp.complex128) else jnp.float32


def wide(dtype: Any) -> Any:
    """Returns the dtype to calculate in: `accumulator`, or `dtype` itself if it is complex."""
    return dtype if jnp.issubdtype(dtype, jnp.complexfloating) else accumulator(dtype)


def require_usable(tree: Tree, flat: Sequence[Any]) -> None:
    """Raises ValueError if a leaf holds floats that can't be clipped. The message has path, dtype and advice."""
    kinds = list(map(of, flat))
    if not any(map(what_is_wrong, set(kinds))):
        return
    for i, kind in enumerate(kinds):
        if problem := what_is_wrong(kind):
            path = trees.paths(tree)[i]
            leaf = f"the leaf {path!r}" if path else "the gradient"
            raise ValueError(f"{leaf} is {kind}, {problem}: {_ADVICE}, or exclude this leaf with optax.masked")


def what_is_wrong(dtype: Any) -> str:
    """Says why floats of a dtype can't be clipped. Empty if they can, or if the dtype has no floats."""
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        return ""
    info = jnp.finfo(dtype)
    if float(info.min) >= 0:  # float8_e8m0fnu: powers of two
        return "which holds neither 0 nor negative numbers"
    if info.bits == 6:  # XLA for CPUs (jax 0.10 and 0.12) can't compile a conversion. This can go when it can.
        return "which XLA can't calculate with"
    return ""


def of_state(dtype: Any, min_bits: int = 16) -> Any:
    """Returns the default dtype of an average: float32 for fewer than `min_bits` bits, where it would not move."""
    return jnp.float32 if jnp.finfo(dtype).bits < min_bits else dtype
