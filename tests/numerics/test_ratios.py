"""The largest ratio of updates and their limits, which CPUs take block by block where leaves are large."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from optaxclip import contrib
from optaxclip._numerics import ratios
from tests.support.meshes import AUTO, EXPLICIT

SHAPE = (8, 10_000)  # two blocks and a half
ENDS = [0, 32_767, 32_768, 60_000, 79_999]  # the first and last entries of blocks, and one in two blocks


def leaves(rng):
    update = rng.uniform(-1, 1, size=SHAPE).astype(np.float32)
    return update, rng.uniform(0.5, 1, size=SHAPE).astype(np.float32)


def put(x, place, value):
    x = x.copy()
    x.reshape(-1)[place] = value
    return x


def worst(*args):
    return float(ratios.worst_ratio(*args))


@pytest.mark.parametrize("place", ENDS)
def test_no_entry_is_left_out(rng, place):
    update, param = leaves(rng)
    found = worst(put(update, place, -6.0), put(param, place, 0.5), 0.1, 0.01)
    np.testing.assert_allclose(found, 6 / 0.06, rtol=1e-6)
    assert worst(put(update, place, np.nan), param, 0.1, 0.01) == np.inf
    assert worst(update, put(param, place, -np.inf), 0.1, 0.01) == np.inf
    assert worst(update, put(param, place, 0.0), 0.1, 0.0) == np.finfo(np.float32).max
    assert worst(put(update, place, 0.0), put(param, place, 0.0), 0.1, 0.0) < 20


slopes = jax.jit(jax.grad(ratios.worst_ratio, (0, 1)))


@pytest.mark.parametrize("place", ENDS)
def test_the_derivative_is_that_of_the_worst_entry(rng, place):
    update, param = leaves(rng)
    update = put(update, place, -6.0)
    by_update, by_param = map(np.asarray, slopes(update, param, 0.1, 0.01))
    limit = 0.1 * param.reshape(-1)[place] + 0.01
    np.testing.assert_allclose(by_update.reshape(-1)[place], -1 / limit, rtol=1e-6)
    np.testing.assert_allclose(by_param.reshape(-1)[place], -0.1 * 6 / limit**2, rtol=1e-6)
    assert np.count_nonzero(by_update) == np.count_nonzero(by_param) == 1


@pytest.mark.parametrize("mesh", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize("spec", [PartitionSpec("data"), PartitionSpec(None, "data"), PartitionSpec()], ids=str)
def test_on_a_mesh(rng, mesh, spec):
    update, param = leaves(rng)
    expected = ratios.worst_ratio(update, param, 0.1, 0.01)
    with jax.set_mesh(mesh):
        split = jax.device_put((update, param), NamedSharding(mesh, spec))
        program = jax.jit(lambda *pair: ratios.worst_ratio(*pair, 0.1, 0.01)).lower(*split).compile()
    np.testing.assert_allclose(program(*split), expected, rtol=1e-6)
    assert "all-gather" not in program.as_text()


@pytest.mark.parametrize("spec", [PartitionSpec("data"), PartitionSpec()], ids=str)
def test_in_shard_map(rng, spec):
    update, param = (np.tile(x, (8, 1)) for x in leaves(rng))
    update[40, 7] = 9.0

    def clipped(update, param, **axes):
        tx = contrib.clippy(0.1, 0.01, **axes)
        return tx.update(update, tx.init(update), param)[0]

    mapped = jax.shard_map(functools.partial(clipped, axes=spec), mesh=AUTO, in_specs=(spec, spec), out_specs=spec)
    np.testing.assert_allclose(jax.jit(mapped)(update, param), jax.jit(clipped)(update, param), rtol=1e-6)
