"""What reads jaxprs, and the plain fallbacks for a jax that does not show them: the same numbers."""

import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip as oc
from optaxclip import per_example, thresholds
from optaxclip._jaxprs import holding, outer, reading, replaying

B, SIZE = 6, 8


@pytest.fixture
def unreadable(monkeypatch):
    """From when it is called on, jax shows no program."""
    return lambda: monkeypatch.setattr(reading, "IS_POSSIBLE", False)


def traced_again(function):
    """Jitted, with no trace of before."""

    def fresh(*args):
        return function(*args)

    return jax.jit(fresh)


def assert_same(ours, expected, **tolerance):
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for leaf, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert leaf.dtype == other.dtype
        np.testing.assert_allclose(leaf, other, **tolerance)


# The probe.


def test_this_jax_can_be_read():
    """Of every version that the library is tested with. Where this fails, all that reads jaxprs is slow."""
    assert reading.IS_POSSIBLE


@pytest.mark.parametrize("missing", ["jaxpr_as_fun", "Literal", "JaxprEqn"])
def test_a_jax_that_lacks_a_name_is_not_read(missing):
    names = {name: getattr(jax.extend.core, name) for name in reading._NEEDED if name != missing}
    assert not reading.has_all(types.SimpleNamespace(**names))
    whole = names | {missing: getattr(jax.extend.core, missing)}
    assert reading.has_all(types.SimpleNamespace(**whole))


def test_a_jax_that_lacks_an_attribute_or_the_module_is_not_read():
    names = {name: getattr(jax.extend.core, name) for name in reading._NEEDED}
    assert not reading.has_all(types.SimpleNamespace(**names | {"Jaxpr": object}))
    assert not reading.has_all(None)


# Holding a state back.


def update(updates, state):
    """A state with what is new, what is old, a constant, and one array in two places."""
    mean = 0.9 * state["mean"] + 0.1 * updates
    after = {"mean": mean, "again": mean, "old": state["old"], "one": jnp.ones(2), "steps": state["steps"] + 1}
    return updates - after["mean"], after


STATE = {name: np.full(2, i, np.float32) for i, name in enumerate(("mean", "again", "old", "one"), 3)}
STATE |= {"steps": np.int32(4)}


@pytest.mark.parametrize("hold", [False, True])
def test_a_state_is_held_back_the_same_way(hold, unreadable):
    def step(hold):
        return holding.update_or_hold(update, hold, jnp.float32([1.0, 2.0]), jax.tree.map(jnp.asarray, STATE))

    usual = traced_again(step)(hold)
    unreadable()
    plain = traced_again(step)(hold)
    assert_same(plain[1], usual[1], rtol=1e-7)
    if hold:
        assert_same(plain[1], jax.tree.map(jnp.asarray, STATE), rtol=0)
    else:
        assert_same(plain, usual, rtol=1e-7)


@pytest.mark.parametrize("is_possible", [True, False])
def test_a_state_of_another_size_is_refused(is_possible, monkeypatch):
    monkeypatch.setattr(reading, "IS_POSSIBLE", is_possible)
    with pytest.raises(ValueError, match="had 1 arrays before the update and 2 after it"):
        holding.update_or_hold(lambda u, s: (u, (s, s)), jnp.asarray(True), jnp.ones(2), jnp.ones(2))


def test_skips_take_the_same_steps(unreadable):
    tx = oc.skip_spikes(optax.adam(0.1), thresholds.growth(2.0), max_consecutive=2)
    params = np.zeros(3, np.float32)
    grads = np.float32([1.0, 1.5, 50.0, np.nan, 2.0, 50.0, 50.0, 50.0])[:, None] * np.float32([[1.0, -1.0, 0.5]])

    def train():
        def step(state, grad):
            updates, state = tx.update(grad, state, params)
            return state, updates

        return jax.jit(lambda grads: jax.lax.scan(step, tx.init(params), grads))(grads)

    usual = train()
    unreadable()
    plain = train()
    assert np.all(np.asarray(plain[1])[[2, 3, 5]] == 0)
    assert_same(plain, usual, rtol=1e-6)


# Norms of outer products, and sums of per-example gradients.


def dense(w, x):
    return jnp.sum(jnp.tanh(w @ x))


def test_an_outer_product_is_calculated(rng, unreadable):
    def evaluated(w, x):
        usual = outer.evaluate(jax.grad(dense), w, x)
        unreadable()
        plain = outer.evaluate(jax.grad(dense), w, x)
        assert isinstance(usual, outer.Outer)
        assert isinstance(plain, jax.Array)
        return outer.as_array(usual), usual.norm(), plain

    usual, norm, plain = jax.jit(evaluated)(*(np.float32(rng.normal(size=(SIZE, *more))) for more in ((SIZE,), ())))
    np.testing.assert_allclose(usual, plain, rtol=1e-6)
    np.testing.assert_allclose(norm, np.linalg.norm(plain), rtol=1e-6)


@pytest.mark.xla
@pytest.mark.parametrize("microbatch_size", [None, 4])
def test_gradients_of_examples_are_the_same(rng, unreadable, microbatch_size):
    w, rows = (np.float32(rng.normal(size=(number, SIZE))) for number in (SIZE, B))
    rows *= np.logspace(-1.5, 1.5, B, dtype=np.float32)[:, None]
    rows[1, 1] = np.nan
    options = {"microbatch_size": microbatch_size, "return_norms": True}
    step = per_example.clipped_value_and_grad(dense, oc.clip_by_global_norm(1.0), **options)
    assert per_example.form_of(step, w, rows) == "two_pass"
    *usual, usual_norms = traced_again(step)(w, rows)
    unreadable()
    assert per_example.form_of(step, w, rows) == "one_pass"
    *plain, norms = traced_again(step)(w, rows)
    assert_same(plain, usual, rtol=1e-5, atol=1e-6)
    # What is not finite is inf or NaN.
    assert not np.isfinite(norms[1])
    assert not np.isfinite(usual_norms[1])
    np.testing.assert_allclose(np.delete(norms, 1), np.delete(usual_norms, 1), rtol=1e-6)


def test_two_passes_are_refused_where_nothing_tells_whether_they_are_right(unreadable):
    step = per_example.clipped_value_and_grad(dense, oc.clip_by_global_norm(1.0), form="two_pass")
    unreadable()
    with pytest.raises(ValueError, match=r"jax \d.* does not show which operations the function has"):
        step(np.ones((SIZE, SIZE), np.float32), np.ones((B, SIZE), np.float32))


# A function that runs once.


def test_a_traced_function_runs_once_and_a_plain_one_at_every_call(unreadable):
    runs = []

    def function(tree, y):
        runs.append(1)
        return {"sum": tree["x"] + y, "none": None}

    args = {"x": jnp.ones(2)}, jnp.float32(3.0)
    traced = replaying.traced(function, *args)
    found = [traced(*args), jax.jit(traced)(*args), jax.vmap(traced, ({"x": None}, None), axis_size=1)(*args)]
    assert len(runs) == 1
    for each in found:
        np.testing.assert_array_equal(np.ravel(each["sum"])[:2], [4.0, 4.0])
    unreadable()
    plain = replaying.traced(function, *args)
    assert len(runs) == 1
    assert_same(plain(*args), found[0], rtol=0)
    assert len(runs) == 2


# Reading.


@jax.custom_jvp
def with_a_rule(x):
    return jnp.sin(x)


with_a_rule.defjvp(lambda primals, tangents: (with_a_rule(*primals), tangents[0]))

INSIDE = {
    "at the top": jnp.sin,
    "jit": jax.jit(jnp.sin),
    "scan": lambda x: jax.lax.scan(lambda x, _: (jnp.sin(x), None), x, None, length=2)[0],
    "while": lambda x: jax.lax.while_loop(lambda x: x > 2, jnp.sin, x),
    "the condition of a while": lambda x: jax.lax.while_loop(lambda x: jnp.sin(x) > 2, lambda x: x, x),
    "cond": lambda x: jax.lax.cond(x > 0, jnp.sin, lambda x: x, x),
    "checkpoint": jax.checkpoint(jnp.sin),
    "custom_jvp": with_a_rule,
}


@pytest.mark.parametrize("name", INSIDE)
def test_operations_inside_others_are_found(name, unreadable):
    names = {equation.primitive.name for equation in reading.equations(INSIDE[name], jnp.float32(1.0))}
    assert "sin" in names
    unreadable()
    assert reading.equations(INSIDE[name], jnp.float32(1.0)) is None


# A closure's arrays in the backward pass.


def test_a_bound_that_a_scan_traced_reaches_the_backward_pass(unreadable):
    def loss(x, bounds):
        def step(x, bound):
            return 3 * oc.clip_cotangents(x, oc.clip_by_global_norm(bound)), None

        return jnp.sum(jax.lax.scan(step, x, bounds)[0])

    x, bounds = np.float32([3.0, 4.0]), np.float32([0.5, 1.0, 2.0])
    expected = traced_again(jax.grad(loss))(x, bounds)
    unreadable()
    assert_same(traced_again(jax.grad(loss))(x, bounds), expected, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(expected), 0.5, rtol=1e-6)


def test_the_library_is_imported_where_jax_has_no_such_module():
    code = (
        "import sys; sys.modules['jax.extend.core'] = None; import optaxclip._jaxprs.reading as r; print(r.IS_POSSIBLE)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
