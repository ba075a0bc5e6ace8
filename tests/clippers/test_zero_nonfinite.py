"""zero_nonfinite: what is not finite becomes 0, and nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip as oc
from tests.reference.trees import assert_same_bits

TX = oc.zero_nonfinite()


def zeroed(updates):
    return TX.update(updates, TX.init(None))[0]


DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_every_coordinate_by_itself(jitted):
    given = {}
    for dtype in DTYPES:
        info = jnp.finfo(dtype)
        finite = [1.0, -0.0, float(info.max), float(info.smallest_subnormal), -float(info.tiny)]
        given[dtype] = jnp.asarray(np.array([*finite, np.nan, np.inf, -np.inf]).astype(jnp.dtype(dtype)))
    for dtype, ours in (jax.jit(zeroed) if jitted else zeroed)(given).items():
        kept = np.asarray(given[dtype])
        wide, before = (np.asarray(leaf).astype(np.float32) for leaf in (ours, kept))
        np.testing.assert_array_equal(wide, np.where(np.isfinite(before), before, 0), err_msg=dtype)
        assert_same_bits(np.asarray(ours)[:5], kept[:5])
        assert not np.any(wide[5:]), dtype


def test_float64_and_complex128():
    with jax.enable_x64(True):
        given = {"a": np.array([1e300, np.nan]), "b": np.array([1e300 + 1j, complex(0, np.inf)])}
        ours = jax.jit(zeroed)(given)
        assert {name: str(leaf.dtype) for name, leaf in ours.items()} == {"a": "float64", "b": "complex128"}
        np.testing.assert_array_equal(ours["a"], [1e300, 0])
        np.testing.assert_array_equal(ours["b"], [1e300 + 1j, 0])


def test_a_complex_number_is_finite_if_both_its_parts_are():
    parts = [1.0, np.nan, np.inf, -np.inf]
    given = np.complex64([complex(re, im) for re in parts for im in parts])
    np.testing.assert_array_equal(jax.jit(zeroed)(given), [1 + 1j] + [0] * 15)


def test_leaves_of_other_kinds_stay():
    given = {
        "steps": np.arange(3), "flag": jnp.asarray(True), "none": None, "masked": optax.MaskedNode(),
        "no_gradient": np.zeros(2, jax.dtypes.float0), "key": jax.random.key(0), "w": jnp.asarray(np.float32([np.nan])),
    }  # fmt: skip
    ours = zeroed(given)
    assert jax.tree.structure(ours) == jax.tree.structure(given)
    assert (ours["key"], bool(ours["flag"]), ours["no_gradient"].dtype) == (given["key"], True, jax.dtypes.float0)
    np.testing.assert_array_equal(ours["steps"], [0, 1, 2])
    np.testing.assert_array_equal(ours["w"], [0.0])


def test_the_derivative_is_zero_where_it_zeroes():
    slope = jax.jit(jax.grad(lambda x: zeroed(x).sum()))(np.float32([1.0, np.nan, np.inf]))
    np.testing.assert_array_equal(slope, [1.0, 0.0, 0.0])
