"""Whose line a warning points at: the user's, whatever library lies between."""

import contextlib
import functools
import inspect
import os

import jax
import optax

# What calls us in the name of somebody else. A warning is shown once for each line of theirs.
_BETWEEN = (
    *(os.path.dirname(str(module.__file__)) + os.sep for module in (jax, optax)),
    os.path.dirname(os.path.dirname(__file__)) + os.sep,
    *(str(module.__file__) for module in (contextlib, functools)),
)


def steps_up() -> int:
    """The `stacklevel`, for a warning of the function that calls this, of the first function that is not `_BETWEEN`."""
    frame, steps = inspect.currentframe(), 0
    while frame and frame.f_code.co_filename.startswith(_BETWEEN):
        frame, steps = frame.f_back, steps + 1
    return max(steps, 1)
