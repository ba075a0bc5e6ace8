"""Checks of static arguments: each error names the argument and the value.

Only concrete numbers are looked at. Arrays and schedules pass unseen, so that
`optax.inject_hyperparams` can hand in traced values.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def is_function(value: Any) -> bool:
    """Whether a value is to be called: a schedule, or a function of a path.

    A pytree whose own type is callable, such as an Equinox module, is a pytree.
    """
    is_leaf = jax.tree_util.all_leaves([value]) or isinstance(value, jax.tree_util.Partial)
    return callable(value) and is_leaf


def _is_concrete(value: Any) -> bool:
    return isinstance(value, int | float | np.number | np.ndarray) and not isinstance(value, bool)


def bound(name: str, value: Any, *, signed: bool = False, finite: bool = False, single: bool = False) -> None:
    """A bound: a number, an array, a schedule, or a prefix pytree of these.

    Args:
      name: the argument's name, for the message.
      value: what the user passed.
      signed: whether negative numbers are allowed.
      finite: whether inf is refused.
      single: whether there is one group only, so that the bound must be one number.

    Raises:
      ValueError: if a number in `value` is NaN, or negative where it may not be, or no bound at all.
    """
    leaves = jax.tree.leaves(value, is_leaf=lambda leaf: leaf is None)
    kinds = "one number, scalar array or schedule" if single else "a number, an array, a schedule or a pytree of these"
    if not leaves or (single and (leaves[0] is not value or np.ndim(value) > 0)):
        raise ValueError(f"{name} must be {kinds}, got {value!r}")
    for leaf in leaves:
        if isinstance(leaf, jax.Array) or callable(leaf) or (leaf is None and value is not None):
            continue
        if not _is_concrete(leaf):
            raise ValueError(f"{name} must be {kinds}, got {leaf!r}")
        if np.any(np.isnan(leaf)) or (not signed and np.any(np.asarray(leaf) < 0)):
            raise ValueError(f"{name} must be {'a number' if signed else 'at least 0'}, got {leaf!r}")
        if finite and np.any(np.isinf(leaf)):
            raise ValueError(f"{name} must be finite, got {leaf!r}")


def transformation(name: str, value: Any) -> None:
    """An optax transformation, or what is used like one."""
    if not (callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))):
        hint = "; call it first" if callable(value) else ""
        raise ValueError(f"{name} must be an optax transformation, got {value!r}{hint}")


def number(
    name: str,
    value: Any,
    *,
    at_least: float = 0.0,
    at_most: float = math.inf,
    below: float | None = None,
    positive: bool = False,
) -> None:
    """A number or scalar array, and no schedule: those are `optax.inject_hyperparams`'s. Plain ones have a range."""
    if callable(value):
        raise ValueError(f"{name} must be a number, got {value!r}; optax.inject_hyperparams takes schedules for it")
    if not (isinstance(value, jax.Array) or _is_concrete(value)) or np.ndim(value) > 0:
        raise ValueError(f"{name} must be one number or scalar array, got {value!r}")
    if not _is_concrete(value):
        return
    fits = at_least <= value <= at_most and (below is None or value < below) and (value > 0 or not positive)
    if not fits:
        low = "more than 0" if positive else f"at least {at_least:g}"
        high = (
            ""
            if below is None and at_most == math.inf
            else f" and {f'below {below:g}' if below is not None else f'at most {at_most:g}'}"
        )
        raise ValueError(f"{name} must be {low}{high}, got {value!r}")


def whole(name: str, value: Any, *, at_least: int = 1) -> None:
    """Raises ValueError unless `value` is a static whole number."""
    what = f"a whole number of at least {at_least}"
    static(name, value, lambda each: _is_whole(each) and each >= at_least, what)
    if not _is_whole(value):
        raise ValueError(f"{name} must be {what}, got {value!r}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def patience(value: Any) -> None:
    """A number of steps, or None."""
    if value is not None:
        whole("patience", value)


def ordered(low_name: str, low: Any, high_name: str, high: Any) -> None:
    """Raises ValueError where two plain numbers stand in the wrong order."""
    if _is_concrete(low) and _is_concrete(high) and np.any(np.asarray(low) > np.asarray(high)):
        raise ValueError(f"{low_name} must be at most {high_name}, got {low_name}={low!r} and {high_name}={high!r}")


def order(name: str, value: Any) -> float:
    """The order p of a norm: a number of at least 1, or inf. None is 2, as in `numpy.linalg.norm`."""
    if value is None:
        return 2
    static(name, value)
    if not _is_concrete(value) or math.isnan(value) or value < 1:
        raise ValueError(f"{name} must be a number of at least 1, or inf, got {value!r}")
    return float(value)


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of the words allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def record(value: Any) -> int:
    """How many steps a record has: 0 for none. True is 1."""
    if not isinstance(value, bool):
        whole("record", value, at_least=0)
    return int(value)


def instance(name: str, value: Any, kind: type, example: str) -> None:
    """Raises ValueError, with an example of what is meant, unless `value` is of a class."""
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be a {kind.__name__}, such as {example}, got {value!r}")


def static(name: str, value: Any, accept: Callable[[Any], bool] = lambda _: True, what: str = "") -> None:
    """A structural argument: it shapes the program, so it can't be an array.

    `optax.inject_hyperparams` turns integer arguments into arrays unless it is told not to.

    Args:
      name: the argument's name, for the message.
      value: what the user passed, a value or a pytree of values.
      accept: says of one value whether it is fine.
      what: what a fine value is, for the message.
    """
    for leaf in jax.tree.leaves(value):
        if isinstance(leaf, jax.Array):
            raise ValueError(
                f"{name} must be static, got the array {leaf}; "
                f"with optax.inject_hyperparams, pass static_args=({name!r},)"
            )
        if not accept(leaf):
            raise ValueError(f"{name} must be {what}, got {leaf!r}")
