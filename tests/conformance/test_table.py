"""The table has a row for every public transformation, and its rows build every norm and every threshold."""

import inspect
import pkgutil
from importlib import import_module

import optax
import pytest

import optaxclip as oc
from tests.support.public import NAMES, public
from tests.support.recording import record_calls
from tests.table import NOT_TRANSFORMATIONS, ROWS

COVERED = {row.public for row in ROWS}


def public_callables():
    """Whatever a user can call. What it returns is not asked: an annotation can be missing, or wrong."""
    return {name for name in NAMES if callable(public(name))}


def builds_a_transformation(function):
    # Annotations may be strings, and may name types that are only imported for type checking.
    return "GradientTransformation" in str(inspect.signature(function).return_annotation)


def defined_in(module):
    """The module's own public functions."""
    members = inspect.getmembers(module, inspect.isfunction)
    return {name: f for name, f in members if f.__module__.startswith(module.__name__) and not name.startswith("_")}


def test_a_group_of_tests_stays_on_one_worker(request, worker_id):
    """Else every worker would compile every row, and nothing would show it but the time (pytest-xdist, issue 1386)."""
    assert worker_id == "master" or request.node.nodeid.endswith(f"@{request.path.stem}")


def test_every_public_callable_has_a_row_or_a_reason_to_have_none():
    assert public_callables() - COVERED - set(NOT_TRANSFORMATIONS) == set()


def test_no_row_stands_for_a_name_that_is_not_public():
    assert COVERED | set(NOT_TRANSFORMATIONS) <= public_callables()


@pytest.mark.parametrize("name", sorted(NOT_TRANSFORMATIONS))
def test_what_is_listed_as_no_transformation_is_none(name):
    found = public(name)
    assert inspect.isclass(found) or not builds_a_transformation(found)


def test_a_transformation_defined_anywhere_is_public():
    modules = [info.name for info in pkgutil.walk_packages(oc.__path__, "optaxclip.")]
    library = [name for name in modules if "demo" not in name and not name.endswith("__main__")]
    assert len(library) > 5
    built = {
        name: function
        for module in library
        for name, function in defined_in(import_module(module)).items()
        if builds_a_transformation(function)
    }
    assert {"clip", "clippy", "clip_by"} <= set(built)
    assert {name for name, function in built.items() if name not in NAMES or public(name) is not function} == set()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_builds_a_transformation_with_extra_args(row):
    assert isinstance(row.make(), optax.GradientTransformationExtraArgs)


def test_row_names_are_unique():
    assert len({row.name for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("module", [oc.norms, oc.thresholds], ids=lambda module: module.__name__)
def test_the_rows_build_every_norm_and_threshold(module, monkeypatch):
    functions = defined_in(module)
    built = record_calls(monkeypatch, module, functions)
    for row in ROWS:
        row.make()
    assert set(functions) - built == set()
