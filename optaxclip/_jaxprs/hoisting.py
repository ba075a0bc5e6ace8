"""Turns the arrays that a function closes over into an argument."""

from collections.abc import Callable
from typing import Any

import jax

from optaxclip._jaxprs import reading


def hoist(
    function: Callable[[list[Any]], Any], example: list[Any]
) -> tuple[Callable[[list[Any], list[Any]], Any], list[Any]]:
    """Splits a function into one without closure and the arrays that it closed over.

    The fallback, `jax.closure_convert`, leaves some arrays in the closure: integers, and those mapped by `vmap`.

    Args:
      function: takes a list of arrays.
      example: arguments of the right shapes and dtypes.

    Returns:
      `(hoisted, arrays)`, where `hoisted(arrays, argument)` is `function(argument)`.
    """
    if not reading.IS_POSSIBLE:
        converted, consts = jax.closure_convert(function, example)
        return lambda closed_over, argument: converted(argument, *closed_over), list(consts)
    closed, out = jax.make_jaxpr(function, return_shape=True)(example)

    def hoisted(closed_over: list[Any], argument: list[Any]) -> Any:
        return jax.tree.unflatten(jax.tree.structure(out), reading.with_consts(closed, closed_over)(*argument))

    return hoisted, list(closed.consts)
