"""Runs the Python code of a function once, however often the function is called."""

from collections.abc import Callable
from typing import Any

import jax

from optaxclip._jaxprs import reading


def traced(function: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """Traces `function` for arguments with the structure and types of `args`.

    Its Python code runs now, and never again. `jax.closure_convert` does not do here: it keeps every function that it
    is given alive, with the arrays of its closure (jax 0.8 to 0.12). `jax.jit`, called eagerly, would compile each
    function anew.
    """
    if not reading.IS_POSSIBLE:
        return function
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
    flat, structure = reading.as_function(closed), jax.tree.structure(shape)
    return lambda *args: jax.tree.unflatten(structure, flat(*jax.tree.leaves(args)))
