"""Finds the line that a warning points at: the user's, even if another library calls us."""

import contextlib
import functools
import inspect
import os

import jax
import optax

# Libraries that call us on behalf of the user. A warning is shown once for each line of user code.
_BETWEEN = (
    *(os.path.dirname(str(module.__file__)) + os.sep for module in (jax, optax)),
    os.path.dirname(os.path.dirname(__file__)) + os.sep,
    *(str(module.__file__) for module in (contextlib, functools)),
)


def steps_up() -> int:
    """Returns the `stacklevel` of the first caller outside `_BETWEEN`, for a warning in the calling function."""
    frame, steps = inspect.currentframe(), 0
    while frame and frame.f_code.co_filename.startswith(_BETWEEN):
        frame, steps = frame.f_back, steps + 1
    return max(steps, 1)
