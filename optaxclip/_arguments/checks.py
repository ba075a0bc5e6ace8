"""Checks of arguments at build time. Each error names the argument, its value, and what to pass.

Only concrete numbers are checked against their range. Arrays are checked by dtype and shape, schedules not at all,
because `optax.inject_hyperparams` may pass traced values.
"""

import math
import os
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from optaxclip._arrays import callers
from optaxclip._arrays.trees import is_function

_INT32_MAX = np.iinfo(np.int32).max


# Numbers.


def is_real(value: Any) -> bool:
    """Whether a value is a real number or an array of real numbers. Booleans, complex numbers and keys are not."""
    if isinstance(value, int | float):
        return not isinstance(value, bool)
    if not isinstance(value, jax.Array | np.ndarray | np.generic):
        return False
    return bool(jnp.issubdtype(value.dtype, jnp.integer) or jnp.issubdtype(value.dtype, jnp.floating))


def _is_concrete(value: Any) -> bool:
    return is_real(value) and not isinstance(value, jax.Array)


def _require_64_bits(name: str, value: Any) -> None:
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must fit into 64 bits, got {value!r}: pass a float")


def bound(
    name: str,
    value: Any,
    *,
    signed: bool = False,
    positive: bool = False,
    finite: bool = False,
    single: bool = False,
) -> None:
    """Checks a bound: a number, an array, a schedule, or a prefix pytree of these, in which None means no bound.

    Args:
      name: the name of the argument, for the message.
      value: what the user passed.
      signed: whether negative numbers are allowed.
      positive: whether 0 is refused.
      finite: whether inf is refused.
      single: whether there is only one group, so that the bound must be one number.

    Raises:
      ValueError: if `value` has no bound in it, or an entry that is no bound, is NaN, or is out of range.
    """
    kinds = "one number, scalar array or schedule" if single else "a number, an array, a schedule or a pytree of these"
    entries = [] if _is_built(value) else jax.tree.leaves(value, is_leaf=is_function)
    if not entries or (single and (entries[0] is not value or (is_real(value) and np.ndim(value) > 0))):
        if not (entries or single or value is None or _is_built(value)):
            raise ValueError(f"{name}={value!r} bounds no leaf: give at least one leaf a number")
        raise ValueError(f"{name} must be {kinds}, got {value!r}")
    for entry in entries:
        if is_function(entry):
            continue
        if not is_real(entry):
            raise ValueError(f"{name} must be {kinds}, got {entry!r}")
        if _is_concrete(entry):
            _require_in_range(name, entry, signed=signed, positive=positive, finite=finite)


def _is_built(value: Any) -> bool:
    """Whether a value is a Norm, a Threshold or a transformation: pytrees of functions that are not schedules."""
    return isinstance(value, tuple) and {"init", "measure"} & {*getattr(value, "_fields", ())} != set()


def _require_in_range(name: str, entry: Any, *, signed: bool, positive: bool, finite: bool) -> None:
    _require_64_bits(name, entry)
    numbers = np.asarray(entry, np.float64)
    if np.any(np.isnan(numbers)) or (not signed and np.any(numbers < 0)):
        raise ValueError(f"{name} must be {'a number' if signed else 'at least 0'}, got {entry!r}")
    if positive and np.any(numbers == 0):
        raise ValueError(f"{name} must be more than 0, got {entry!r}")
    if finite and np.any(np.isinf(numbers)):
        raise ValueError(f"{name} must be finite, got {entry!r}")


def number(
    name: str,
    value: Any,
    *,
    at_least: float = 0.0,
    at_most: float = math.inf,
    below: float | None = None,
    positive: bool = False,
) -> Any:
    """Checks a number or scalar array, and returns it in a wide dtype. Schedules are refused.

    Args:
      name: the name of the argument, for the message.
      value: what the user passed.
      at_least: the smallest number allowed.
      at_most: the largest number allowed.
      below: the number must be less than this, unless it is None.
      positive: whether 0 is refused.

    Returns:
      A Python number as a float, because jax has no integers beyond 32 bits. An array in float32 or wider:
      `optax.inject_hyperparams` casts to the dtype of the model, and in 16 bits sums and products would overflow.

    Raises:
      ValueError: if `value` is no real scalar, or a Python number out of range.
    """
    if is_function(value):
        raise ValueError(f"{name} must be a number, got {value!r}; for a schedule use optax.inject_hyperparams")
    if not is_real(value) or np.ndim(value) > 0:
        raise ValueError(f"{name} must be one number or scalar array, got {value!r}")
    if not _is_concrete(value):
        return _widened(value, below)
    _require_64_bits(name, value)
    fits = at_least <= value <= at_most and (below is None or value < below) and (value > 0 or not positive)
    if not fits:
        low = "more than 0" if positive else f"at least {at_least:g}"
        high = (
            ""
            if below is None and at_most == math.inf
            else f" and {f'below {below:g}' if below is not None else f'at most {at_most:g}'}"
        )
        raise ValueError(f"{name} must be {low}{high}, got {value!r}")
    return float(value)


def _widened(value: jax.Array, below: float | None) -> jax.Array:
    wide = value.astype(jnp.float64 if value.dtype.itemsize == 8 else jnp.float32)
    if below == 1 and jnp.issubdtype(value.dtype, jnp.floating):
        # In bfloat16 a decay of 0.999 is 1, and the average would never move. Use the largest number below 1 instead.
        return jnp.minimum(wide, 1 - float(jnp.finfo(value.dtype).eps) / 2)
    return wide


def percentile(name: str, value: Any) -> Any:
    """Checks a number from 0 to 100. Warns if it is between 0 and 1, because it may be meant as a fraction."""
    checked = number(name, value, at_most=100.0)
    if _is_concrete(value) and 0 < value < 1:
        warnings.warn(
            f"{name}={value!r} means {float(value):g} % of the norms, because {name} goes from 0 to 100; for the "
            f"quantile {float(value):g} pass {name}={100 * float(value):g}",
            UserWarning,
            stacklevel=callers.steps_up(),
        )
    return checked


def ordered(low_name: str, low: Any, high_name: str, high: Any) -> None:
    """Raises ValueError if two concrete numbers are in the wrong order, also in pytrees, entry by entry."""
    for one, other in _pairs(low, high):
        if _is_concrete(one) and _is_concrete(other) and np.ndim(one) == np.ndim(other) == 0 and one > other:
            raise ValueError(
                f"{low_name} must be at most {high_name}, got {low_name}={one!r} and {high_name}={other!r}"
            )


def _pairs(low: Any, high: Any) -> list[tuple[Any, Any]]:
    """Pairs the entries of two pytrees of one structure, or one value with each entry of a pytree."""
    (lows, low_tree), (highs, high_tree) = (
        jax.tree.flatten(value, is_leaf=lambda entry: entry is None or is_function(entry)) for value in (low, high)
    )
    if low_tree == high_tree:
        return list(zip(lows, highs, strict=True))
    if jax.tree_util.treedef_is_leaf(low_tree):
        return [(low, entry) for entry in highs]
    return [(entry, high) for entry in lows] if jax.tree_util.treedef_is_leaf(high_tree) else []


# Static arguments.


def static_together(**values: Any) -> None:
    """Raises ValueError if an argument that must be static is an array. The message lists all static arguments.

    Call it in the first line of each factory that has such arguments. `optax.inject_hyperparams` turns numbers into
    arrays, defaults too, and calls functions as schedules, unless `static_args` names them. The message ends with the
    complete `static_args`, ready to copy. It includes booleans: optax 0.2.8 leaves them as they are, but a number may
    later take the place of `record=False`.
    """

    def is_array(value: Any) -> bool:
        return any(isinstance(entry, jax.Array) for entry in jax.tree.leaves(value))

    arrays = {name: value for name, value in values.items() if is_array(value)}
    if arrays:
        needed = tuple(
            name
            for name, value in values.items()
            if name in arrays or isinstance(value, int | float | np.number) or callable(value)
        )
        got = ", ".join(f"{name}={value}" for name, value in arrays.items())
        raise ValueError(
            f"these arguments must be static but came as arrays: {got}; "
            f"with optax.inject_hyperparams, pass static_args={needed}"
        )


def is_whole(value: Any) -> bool:
    """Whether a value is a static integer. A boolean is not."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def whole(name: str, value: Any, *, at_least: int = 1, also: str = "") -> int:
    """Checks a static integer that fits into a 32-bit counter, and returns it as a Python int.

    A NumPy integer would promote the dtype of arrays that it is combined with.
    """
    if not (is_whole(value) and value >= at_least):
        raise ValueError(f"{name} must be a whole number of at least {at_least}{also}, got {value!r}")
    if value > _INT32_MAX:
        raise ValueError(f"{name} must be at most {_INT32_MAX}, the largest count of steps, got {value!r}")
    return int(value)


def whole_or_none(name: str, value: Any) -> int | None:
    """Checks a static integer of at least 1, or None."""
    return None if value is None else whole(name, value, also=", or None")


def order(name: str, value: Any) -> float:
    """Checks the order p of a norm: a static number of at least 1, or inf."""
    if isinstance(value, jax.Array) or not _is_concrete(value) or np.ndim(value) > 0 or not value >= 1:
        raise ValueError(f"{name} must be a Python number of at least 1, or inf, got {value!r}")
    _require_64_bits(name, value)
    return float(value)


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of the allowed strings."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def flag(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def record(value: Any) -> int:
    """Returns the number of recorded steps: 0 for False, 1 for True."""
    return (
        int(value) if isinstance(value, bool | np.bool_) else whole("record", value, at_least=0, also=", True or False")
    )


def axis(name: str, value: Any) -> None:
    """Checks an axis or a tuple of axes."""
    several = value if isinstance(value, tuple | list) else (value,)
    if not all(map(is_whole, several)):
        raise ValueError(f"{name} must be a whole number or a tuple of whole numbers, got {value!r}")


def state_dtype(value: Any) -> np.dtype[Any] | None:
    """Checks the dtype of a state per parameter. None means the dtype of each parameter.

    Raises:
      ValueError: if it is not a real float dtype of 16 bits or more. Complex dtypes are refused because the state of a
        complex parameter is complex anyway. Below 16 bits a moving average stands still: a step moves it by less than
        half the distance to the next float.
    """
    if value is None:
        return None
    try:
        # Arrays and NumPy scalars have a dtype, but are none.
        dtype = None if isinstance(value, jax.Array | np.generic) else np.dtype(value)
    except (TypeError, ValueError):
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits < 16:
        raise ValueError(
            f"state_dtype must be None or a real float dtype of at least 16 bits, such as jnp.float32, got {value!r}"
        )
    widest = 8 * jax.dtypes.canonicalize_dtype(np.float64).itemsize
    if jnp.finfo(dtype).bits > widest:
        advice = "" if widest == 64 else ": set jax_enable_x64, or pass jnp.float32"
        raise ValueError(f"state_dtype must have at most {widest} bits, as arrays have here, got {value!r}{advice}")
    return dtype


def axes(value: Any) -> None:
    """Checks mesh axes in the forms that `clip_by` takes."""
    if value is None or isinstance(value, str):
        return
    entries = jax.tree.leaves(value, is_leaf=is_function)
    is_names = isinstance(value, tuple | list) and all(isinstance(entry, str) for entry in value)
    if not entries or not (is_names or all(isinstance(entry, PartitionSpec) for entry in entries)):
        raise ValueError(
            f"axes must be 'auto', None, a name, a tuple of names, or a prefix pytree of PartitionSpec, got {value!r}"
        )


def per_leaf(name: str, value: Any, accept: Callable[[Any], bool], what: str, if_empty: str) -> None:
    """Checks an argument per leaf: a function of a path, or a prefix pytree of values, in which None means no value.

    Args:
      name: the name of the argument, for the message.
      value: what the user passed.
      accept: whether one value is allowed.
      what: describes an allowed value, for the message.
      if_empty: the rest of the message if the pytree has no value.

    Raises:
      ValueError: if a value is not allowed, or the pytree has none.
    """
    if is_function(value):
        return
    entries = jax.tree.leaves(value)
    for entry in entries:
        if not accept(entry):
            raise ValueError(f"{name} must be {what}, got {entry!r}")
    if not entries:
        raise ValueError(f"{name}={value!r} {if_empty}")


# Objects and files.


def transformation(name: str, value: Any) -> None:
    """Raises ValueError unless `value` has the two functions of an optax transformation."""
    if not (callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))):
        hint = "; call it first" if callable(value) else ""
        raise ValueError(f"{name} must be an optax transformation, got {value!r}{hint}")


def text(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is a string."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, got {value!r}")


def path(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is a file name."""
    if not (isinstance(value, str | os.PathLike) and os.fspath(value)):
        raise ValueError(f"{name} must be a path, a string or pathlib.Path, got {value!r}")


def instance(name: str, value: Any, kind: type, example: str) -> None:
    """Raises ValueError, with an example of what to pass, unless `value` is an instance of `kind`."""
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be a {kind.__name__}, such as {example}, got {value!r}")
