"""Reading a jaxpr: whether this jax lets us, the operations in it, and one of them carried out.

`jax.extend.core` may change from one version of jax to the next. jax 0.8.0, 0.10.2 and 0.12.0 have what is needed here.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

# What is used, by the name in `jax.extend.core`, with the attributes that are used of it.
_NEEDED = {
    "ClosedJaxpr": ("jaxpr", "consts"),
    "Jaxpr": ("constvars", "invars", "outvars", "eqns", "replace"),
    "JaxprEqn": ("invars", "outvars", "params", "primitive"),
    "Literal": ("val",),
    "jaxpr_as_fun": (),
}


def _extend_core() -> Any:
    try:
        return importlib.import_module("jax.extend.core")
    except ImportError:
        return None


def has_all(module: Any) -> bool:
    """Whether a module has all that is needed."""
    return all(
        hasattr(module, name) and all(hasattr(getattr(module, name), attribute) for attribute in attributes)
        for name, attributes in _NEEDED.items()
    )


_core = _extend_core()
# Asked once, of the names alone: tracing a program at import might start a backend before the user has configured it.
IS_POSSIBLE = has_all(_core)


def value_of(variable: Any, values: dict[Any, Any]) -> Any:
    """The value of a variable, or that of a literal, which has its own."""
    return variable.val if is_literal(variable) else values[variable]


def is_literal(variable: Any) -> bool:
    """Whether what stands in the place of a variable is a constant."""
    return isinstance(variable, _core.Literal)


def carry_out(jaxpr: Any, equation: Any, arrays: Sequence[Any]) -> list[Any]:
    """What one equation of a jaxpr makes of `arrays`, in the order of its inputs.

    It is carried out as a jaxpr of its own, so that jax sees to the context in which it was traced.
    """
    inputs = zip(equation.invars, arrays, strict=True)
    given = {variable: array for variable, array in inputs if not is_literal(variable)}
    alone = jaxpr.replace(constvars=[], invars=list(given), outvars=equation.outvars, eqns=[equation])
    return _core.jaxpr_as_fun(_core.ClosedJaxpr(alone, ()))(*given.values())


def as_function(closed: Any) -> Callable[..., list[Any]]:
    """A jaxpr as a function of flat arguments."""
    return _core.jaxpr_as_fun(closed)


def with_consts(closed: Any, consts: Sequence[Any]) -> Callable[..., list[Any]]:
    """A jaxpr with other constants, as a function of flat arguments."""
    return as_function(_core.ClosedJaxpr(closed.jaxpr, consts))


def equations(function: Callable[..., Any], *args: Any) -> list[Any] | None:
    """All operations of `function(*args)`, also those inside others; None where jaxprs can't be read."""
    return list(_walk(jax.make_jaxpr(function)(*args).jaxpr)) if IS_POSSIBLE else None


def _walk(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from _walk(inner)
