"""A function whose Python code runs once, however often it is called."""

from collections.abc import Callable
from typing import Any

import jax

from optaxclip._jaxprs import reading


def traced(function: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """`function` for arguments of the structure and types of `args`. Its Python code runs here, and never again.

    `jax.closure_convert` would do, but it keeps every function that it is given, with the arrays of its closure (jax
    0.8 to 0.12). `jax.jit` would compile each function anew where it is called eagerly.
    """
    if not reading.IS_POSSIBLE:
        return function
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
    flat, structure = reading.as_function(closed), jax.tree.structure(shape)
    return lambda *args: jax.tree.unflatten(structure, flat(*jax.tree.leaves(args)))
