"""Reads jaxprs: whether this jax allows it, which operations they have, and how to evaluate one of them.

`jax.extend.core` may change between versions of jax. jax 0.8.0, 0.10.2 and 0.12.0 have what this module needs.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

# The names in `jax.extend.core` that this module uses, with the attributes that it uses.
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
    """Whether a module has all these names and attributes."""
    return all(
        hasattr(module, name) and all(hasattr(getattr(module, name), attribute) for attribute in attributes)
        for name, attributes in _NEEDED.items()
    )


_core = _extend_core()
# Checked once, by name. Tracing a program at import could start a backend before the user has configured it.
IS_POSSIBLE = has_all(_core)


def value_of(variable: Any, values: dict[Any, Any]) -> Any:
    """Returns the value of a variable or of a literal."""
    return variable.val if is_literal(variable) else values[variable]


def is_literal(variable: Any) -> bool:
    """Whether a variable is a constant."""
    return isinstance(variable, _core.Literal)


def carry_out(jaxpr: Any, equation: Any, arrays: Sequence[Any]) -> list[Any]:
    """Evaluates one equation of a jaxpr on `arrays`, in the order of its inputs.

    It is evaluated as a jaxpr of its own, so that jax restores the context in which it was traced.
    """
    inputs = zip(equation.invars, arrays, strict=True)
    given = {variable: array for variable, array in inputs if not is_literal(variable)}
    alone = jaxpr.replace(constvars=[], invars=list(given), outvars=equation.outvars, eqns=[equation])
    return _core.jaxpr_as_fun(_core.ClosedJaxpr(alone, ()))(*given.values())


def as_function(closed: Any) -> Callable[..., list[Any]]:
    """Returns a jaxpr as a function of flat arguments."""
    return _core.jaxpr_as_fun(closed)


def with_consts(closed: Any, consts: Sequence[Any]) -> Callable[..., list[Any]]:
    """Returns a jaxpr with other constants, as a function of flat arguments."""
    return as_function(_core.ClosedJaxpr(closed.jaxpr, consts))


def equations(function: Callable[..., Any], *args: Any) -> list[Any] | None:
    """Lists all operations of `function(*args)`, also nested ones. None if jaxprs can't be read."""
    return list(_walk(jax.make_jaxpr(function)(*args).jaxpr)) if IS_POSSIBLE else None


def _walk(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from _walk(inner)
