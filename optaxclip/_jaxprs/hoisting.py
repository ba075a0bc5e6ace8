"""A function with the arrays that it closes over as an argument."""

from collections.abc import Callable
from typing import Any

import jax

from optaxclip._jaxprs import reading


def hoist(
    function: Callable[[list[Any]], Any], example: list[Any]
) -> tuple[Callable[[list[Any], list[Any]], Any], list[Any]]:
    """`function` as a function of the arrays that it closes over and of its argument, and these arrays.

    `jax.closure_convert`, the fallback, leaves those in the closure that it takes to be without a derivative: integers,
    and under `vmap` what is mapped.
    """
    if not reading.IS_POSSIBLE:
        converted, consts = jax.closure_convert(function, example)
        return lambda closed_over, argument: converted(argument, *closed_over), list(consts)
    closed, out = jax.make_jaxpr(function, return_shape=True)(example)

    def hoisted(closed_over: list[Any], argument: list[Any]) -> Any:
        return jax.tree.unflatten(jax.tree.structure(out), reading.with_consts(closed, closed_over)(*argument))

    return hoisted, list(closed.consts)
