"""Packages that a test needs and an environment may lack."""

import importlib
import warnings
from types import ModuleType

import pytest


def imported(name: str) -> ModuleType:
    """A module; the tests that ask for it are skipped where it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # with the oldest jax they name what is deprecated there
        pytest.importorskip(name)
        return importlib.import_module(name)
