"""Marks for parameters."""

import pytest


def slow_but(values, *kept):
    """Parameters of which all but a few are for slow tests."""
    return [value if value in kept else pytest.param(value, marks=pytest.mark.slow) for value in values]
