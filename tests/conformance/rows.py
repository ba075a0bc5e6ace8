"""The rows of the table, and one compiled program for each."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.table import ROWS, by_path, numbers, params, tree

# The rows that also run without jit on every dtype and tree, one of each mechanism: values, a norm with a record, norms
# of units and of parameters, statistics of coordinates, and a skip. Eagerly, every operation is a program.
EAGER = (
    "clip_by_value",
    "clip_by_global_norm-recorded",
    "adaptive_grad_clip",
    "scale_by_stable_adam",
    "skip_spikes",
)


def is_of_its_own(row):
    return not row.combines


def is_run_eagerly(row):
    return row.name in EAGER


def rows(*, where=lambda row: True):
    return pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS if where(row)])


def rows_and_dtypes(*, where=lambda row: True):
    cases = [(row, dtype) for row in ROWS if where(row) for dtype in row.dtypes]
    return pytest.mark.parametrize(
        ("row", "dtype"), [pytest.param(row, dtype, id=f"{row.name}-{dtype}") for row, dtype in cases]
    )


def dtypes_apart(row):
    """The dtypes that the code tells apart: float16 takes the way of bfloat16."""
    return [dtype for dtype in row.dtypes if dtype != "float16"]


def takes_record(row):
    """Whether the factory of a row has an argument `record`."""
    return "record" in inspect.signature(row.factory).parameters


@functools.cache
def transformation(row):
    return row.make()


@functools.cache
def compiled(row):
    """The jitted update, at every dtype in one program: compiling takes longer than all the tests together."""
    tx = transformation(row)
    program = jax.jit(lambda steps: {dtype: tx.update(*step) for dtype, step in steps.items()})
    others = {dtype: (tree(0, dtype), tx.init(params(dtype)), params(dtype)) for dtype in row.dtypes}
    others["mixed"] = (of_several_dtypes(), tx.init(params("float32")), params("float32"))

    def update(updates, state, weights):
        kernel, scale = updates["dense"]["kernel"].dtype, updates["scale"].dtype
        dtype = str(scale) if kernel == scale else "mixed"
        return program(others | {dtype: (updates, state, weights)})[dtype]

    return update


def of_several_dtypes():
    updates = tree(0, "float32")
    updates["dense"] = {"kernel": numbers(1, (4, 3), "float16"), "bias": numbers(2, (3,), "bfloat16")}
    return updates


def first_step(row, updates, weights):
    """The jitted first step: the new updates and the new state."""
    return compiled(row)(updates, transformation(row).init(weights), weights)


def first_updates(row, updates, weights):
    """The new updates of the first step, as a function to trace."""
    tx = transformation(row)
    return tx.update(updates, tx.init(weights), weights)[0]


def abstract(tree):
    """Shapes and dtypes alone: what tracing needs, at none of the cost of compiling."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def poisoned(tree, value):
    kernel = tree["dense"]["kernel"]
    return tree | {"dense": tree["dense"] | {"kernel": kernel.at[0, 0].set(value)}}


def rounding(dtype):
    """How far a bound may be missed: 1e-5 in float32, four last places in 16 bits."""
    return 1e-5 if dtype in ("float32", "complex64") else 4 * float(jnp.finfo(dtype).eps)


def assert_inside(row, updates, weights, slack):
    for name, (size, low, high) in row.measured(updates, weights).items():
        assert low - slack * abs(low) <= size <= high * (1 + slack), f"{name}: {size} is not within [{low}, {high}]"


def assert_finite(tree):
    assert all(np.all(np.isfinite(leaf)) for leaf in by_path(tree).values())


def parameters_dtype(row, dtype):
    """A dtype for the parameters that is not that of the gradients, unless those are complex and an average is kept."""
    return dtype if row.param_state and dtype == "complex64" else "float32"
