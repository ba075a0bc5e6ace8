"""Which form of a sum of per-example gradients is taken, why, and how often the user's function runs for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip as oc
from optaxclip import per_example
from optaxclip.per_example import forms
from tests.support.marks import slow_but
from tests.support.meshes import AUTO, P

B, SIZE, BOUND = 6, 8, 1.0
ONES = np.ones((SIZE, SIZE), np.float32)
CLIP = oc.clip_by_global_norm(BOUND)


def dense(w, x):
    """Its gradient is an outer product."""
    return jnp.sum(jnp.tanh(w @ x))


def arrays(rng, *shape, dtype=np.float32):
    """A matrix, and examples of this shape, of sizes from 0.01 to 1."""
    scale = np.logspace(-2, 0, B).reshape(B, *(1 for _ in shape))
    rows = scale * rng.normal(size=(B, *shape))
    return rng.normal(size=(SIZE, SIZE)).astype(dtype), rows.astype(dtype)


def choose(fun, tx, *args, form="auto"):
    return per_example.form_of(per_example.clipped_value_and_grad(fun, tx, form=form), *args)


# Two passes where one is faster.


def scanned(w, x):
    return jnp.sum(jax.lax.scan(lambda h, _: (jnp.tanh(w @ h), None), x, None, length=3)[0])


def convolved(w, x):
    return jnp.sum(jnp.tanh(jnp.convolve(x, w[0], mode="same")) ** 2)


SLOWER = {
    "a sequence": (dense, (SIZE, 5)),
    "scanned": (scanned, (SIZE,)),
    "remat": (jax.checkpoint(dense), (SIZE,)),
    "twice": (lambda w, x: jnp.sum(jnp.tanh(w @ jnp.tanh(w @ x))), (SIZE,)),
    "a convolution": (convolved, (SIZE,)),
    "a branch": (lambda w, x: jax.lax.cond(x[0] > 0, lambda: dense(w, x), lambda: jnp.sum(w * w)), (SIZE,)),
    "a vector": (lambda w, x: jnp.vdot(w[0], x) ** 2, (SIZE,)),
}


@functools.cache
def two_passes_of_slower():
    """By name: what was given, what it gave with a bound in the middle of the norms, and value and gradient of each."""
    given = {name: arrays(np.random.default_rng(0), *shape) for name, (_, shape) in SLOWER.items()}

    @jax.jit
    def run(given):
        results = {}
        for name, args in given.items():
            fun = SLOWER[name][0]
            values, grads = jax.vmap(jax.value_and_grad(fun), (None, 0))(*args)
            squares = jnp.sum(grads**2, (1, 2))
            bound = (jnp.min(squares) * jnp.max(squares)) ** 0.25
            tx = oc.clip_by_global_norm(bound)
            step = per_example.clipped_value_and_grad(fun, tx, form="two_pass", reduce="sum", return_norms=True)
            results[name] = args, step(*args), (values, grads, bound)
        return results

    return jax.device_get(run(given))


@pytest.mark.parametrize("name", SLOWER)
def test_two_passes_are_right_where_they_are_slower(name):
    args, (value, grads, sizes), (values, each, bound) = two_passes_of_slower()[name]
    assert choose(SLOWER[name][0], CLIP, *args) == "one_pass"
    expected_sizes = np.linalg.norm(np.float64(each), axis=(1, 2))
    assert min(expected_sizes) < bound < max(expected_sizes)
    expected = np.sum(each * np.minimum(1, bound / expected_sizes)[:, None, None], axis=0)
    np.testing.assert_allclose(value, np.sum(np.float64(values)), rtol=1e-5)
    np.testing.assert_allclose(sizes, expected_sizes, rtol=1e-5)
    np.testing.assert_allclose(grads, expected, rtol=1e-5, atol=1e-5 * np.max(np.abs(expected)))


@pytest.mark.parametrize("form", forms.NAMES)
def test_the_form_that_is_told_is_the_one_that_runs(rng, form, monkeypatch):
    ran = []

    def recorded(name, summed):
        return lambda *given: (ran.append(name), summed(*given))[1]

    for name, summed in list(forms.SUMMED.items()):
        monkeypatch.setitem(forms.SUMMED, name, recorded(name, summed))
    for fun in (dense, scanned):
        step = per_example.clipped_value_and_grad(fun, CLIP, form=form)
        args = arrays(rng, SIZE)
        told = per_example.form_of(step, *args)
        assert ran == []
        jax.eval_shape(step, *args)
        assert ran == [told]
        assert told == form or (form == "auto" and told == ("two_pass" if fun is dense else "one_pass"))
        ran.clear()


# Why two passes are not possible.


@jax.custom_vjp
def signed(x):
    return x


signed.defvjp(lambda x: (x, None), lambda _, cotangent: (jnp.sign(cotangent),))


def told_to_the_host(w, x):
    jax.experimental.io_callback(lambda x: None, None, jax.lax.stop_gradient(x))
    return dense(w, x)


def in_dtype(dtype):
    return lambda w, x: jnp.sum(jnp.tanh(w.astype(dtype) @ x.astype(dtype)).astype(jnp.float32))


REFUSED = {
    "a chain": (dense, optax.chain(CLIP), "tx is a chain, wrapped, or not made by clip_by"),
    "wrapped": (dense, optax.masked(CLIP, True), "tx is a chain, wrapped, or not made by clip_by"),
    "optax": (dense, optax.clip_by_global_norm(1.0), "tx is a chain, wrapped, or not made by clip_by"),
    "a changed clip": (dense, CLIP._replace(init=lambda params: ()), "tx is a chain, wrapped"),
    "leaf norms": (dense, oc.clip_by_leaf_norm(1.0), "tx does not clip by the global 2-norm"),
    "another order": (dense, oc.clip_by_global_norm(1.0, ord=1), "tx does not clip by the global 2-norm"),
    "a state": (dense, oc.zclip(), r"needs a transformation without state.*keeps \d+ arrays"),
    "a record": (dense, oc.clip_by_global_norm(1.0, record=True), "needs a transformation without state"),
    "a narrow value": (lambda w, x: dense(w, x).astype(jnp.bfloat16), CLIP, "the value of the function is bfloat16"),
    "float16 inside": (in_dtype(jnp.float16), CLIP, "calculates in float16, in which the gradient"),
    "float8 inside": (in_dtype(jnp.float8_e5m2), CLIP, "calculates in float8_e5m2, in which"),
    "a custom backward pass": (lambda w, x: dense(w, signed(x)), CLIP, r"uses jax\.custom_vjp"),
    "clip_cotangents": (lambda w, x: jnp.sum(oc.clip_cotangents(w @ x, CLIP)), CLIP, r"uses jax\.custom_vjp"),
    "a callback": (told_to_the_host, CLIP, "uses io_callback"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_two_passes_that_would_not_be_right_are_refused(rng, name):
    fun, tx, words = REFUSED[name]
    args = arrays(rng, SIZE)
    for ask in (choose, lambda fun, tx, *args, form: per_example.clipped_value_and_grad(fun, tx, form=form)(*args)):
        with pytest.raises(ValueError, match=words):
            ask(fun, tx, *args, form="two_pass")


@pytest.mark.parametrize("name", [name for name in REFUSED if name not in ("a state", "a record")])
def test_auto_takes_one_pass_there(rng, name):
    fun, tx, _ = REFUSED[name]
    assert choose(fun, tx, *arrays(rng, SIZE)) == "one_pass"


def test_the_message_says_what_to_pass_instead(rng):
    with pytest.raises(
        ValueError, match=r"^form='two_pass' is not possible here: tx .*; pass form='auto' or 'one_pass'"
    ):
        choose(dense, optax.chain(CLIP), *arrays(rng, SIZE), form="two_pass")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_parameters(rng, dtype):
    args = arrays(rng, SIZE, dtype=dtype)

    def wide(w, x):
        return dense(w.astype(jnp.float32), x.astype(jnp.float32))

    if dtype == jnp.bfloat16:  # as much range as float32
        assert choose(wide, CLIP, *args, form="two_pass") == "two_pass"
    else:
        with pytest.raises(ValueError, match="calculates in float16"):
            choose(wide, CLIP, *args, form="two_pass")


# On meshes.


def in_shard_map(look, w_spec, rows_spec, **options):
    return jax.shard_map(look, mesh=AUTO, in_specs=(w_spec, rows_spec), out_specs=P(), **options)


def asked(fun, tx, form, found):
    """Asks inside of a program."""

    def look(w, rows):
        found.append(choose(fun, tx, w, rows, form=form))
        return jnp.zeros(())

    return look


ON_A_MESH = {
    "split parameters": (
        lambda w, x: jax.lax.psum(jnp.sum(jnp.tanh(w @ x)), "model"),
        (P("model"), P("data")),
        True,
        r"parameters are split over mesh axes \('model',\), so each device",
    ),
    "split examples": (
        lambda w, x: jnp.sum(jnp.tanh(jax.lax.psum(w[:, :4] @ x, "model"))),
        (P(), P("data", "model")),
        True,
        r"the function sums over mesh axes \('model',\), which",
    ),
    "without tracking": (
        lambda w, x: jax.lax.psum(dense(w, x), "model"),
        (P(), P("data")),
        False,
        r"exchanges data over mesh axes \('model',\), which",
    ),
}


@pytest.mark.parametrize("name", ON_A_MESH)
def test_two_passes_on_a_mesh_that_would_not_be_right_are_refused(name):
    fun, specs, is_tracked, words = ON_A_MESH[name]
    tx = CLIP if is_tracked else oc.clip_by_global_norm(BOUND, axes=None)
    args = ONES, ONES
    found = []
    jax.eval_shape(in_shard_map(asked(fun, tx, "auto", found), *specs, check_vma=is_tracked), *args)
    assert found == ["one_pass"]
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(in_shard_map(asked(fun, tx, "two_pass", found), *specs, check_vma=is_tracked), *args)


@pytest.mark.parametrize("is_tracked", [True, False])
def test_a_function_that_knows_its_place_on_the_mesh_exchanges_nothing(is_tracked):
    def fun(w, x):
        return dense(w, x * (1 + jax.lax.axis_index("data")))

    found, tx = [], CLIP if is_tracked else oc.clip_by_global_norm(BOUND, axes=None)
    look = in_shard_map(asked(fun, tx, "auto", found), P(), P("data"), check_vma=is_tracked)
    jax.eval_shape(look, ONES, ONES)
    assert found == ["two_pass"]


def test_an_exchange_that_all_devices_enter_is_no_reason(rng):
    """Under `jit` the branch is that of all devices."""

    def fun(w, x):
        summed = jax.shard_map(lambda x: jax.lax.psum(jnp.sum(x), "data"), mesh=AUTO, in_specs=P("data"), out_specs=P())
        return dense(w, x) + summed(x)

    args = arrays(rng, SIZE)
    step = per_example.clipped_value_and_grad(fun, CLIP, form="two_pass")
    found = jax.jit(step)(*args)
    expected = jax.jit(per_example.clipped_value_and_grad(fun, CLIP, form="one_pass"))(*args)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-5, atol=1e-6)


# Asking.


def test_it_can_be_asked_of_shapes(rng):
    step = jax.jit(per_example.clipped_value_and_grad(dense, CLIP))
    shapes = jax.eval_shape(lambda *args: args, *arrays(rng, SIZE))
    assert per_example.form_of(step, *shapes) == "two_pass"
    assert per_example.form_of(jax.jit(step), *shapes) == "two_pass"


def test_it_can_be_asked_with_arguments_of_all_kinds(rng):
    def fun(w, kind, x, *, scale):
        return {"dense": dense, "scanned": scanned}[kind](w, scale * x)

    w, rows = arrays(rng, SIZE)
    step = per_example.clipped_value_and_grad(fun, CLIP, batch_argnums=2)
    shape = jax.ShapeDtypeStruct(w.shape, w.dtype)
    assert per_example.form_of(step, shape, "dense", rows, scale=2.0) == "two_pass"
    assert per_example.form_of(step, shape, "scanned", rows, scale=jax.ShapeDtypeStruct((), w.dtype)) == "one_pass"


STEPS = {"number": 3, "function": dense, "jitted": jax.jit(dense), "partial": functools.partial(dense)}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_what_is_no_step_is_refused(step):
    with pytest.raises(ValueError, match=r"step must be what per_example\.clipped_value_and_grad returned, got"):
        per_example.form_of(step, ONES, ONES[:B])


def test_a_function_with_fields_of_the_same_names_keeps_its_own(rng):
    class Model:
        form, reduce, fun = "none", "none", None

        def __call__(self, w, x):
            return dense(w, x)

    model = Model()
    model.form = model.reduce = "another"
    step, same = (per_example.clipped_value_and_grad(fun, CLIP) for fun in (model, dense))
    args = arrays(rng, SIZE)
    assert str(jax.make_jaxpr(step)(*args)) == str(jax.make_jaxpr(same)(*args))


# How often the function runs.


def counting(fun):
    runs = []

    @functools.wraps(fun)
    def counted(*args):
        runs.append(1)
        return fun(*args)

    return counted, runs


TX = {"a clip": CLIP, "a chain": optax.chain(CLIP)}


FORMS = [("auto", "a clip"), ("auto", "a chain"), ("one_pass", "a clip"), ("two_pass", "a clip")]


@pytest.mark.parametrize("microbatch_size", [None, 4], ids=["whole", "with a rest"])
@pytest.mark.parametrize(("form", "tx"), FORMS)
def test_the_function_runs_once_where_it_is_traced(rng, form, tx, microbatch_size):
    fun, runs = counting(dense)
    step = jax.jit(per_example.clipped_value_and_grad(fun, TX[tx], form=form, microbatch_size=microbatch_size))
    for _ in range(2):  # the second time the program is there
        step.trace(*arrays(rng, SIZE))
        assert len(runs) == 1


@pytest.mark.parametrize("tx", ["a clip", "a chain"])
def test_the_function_runs_once_eagerly(rng, tx):
    fun, runs = counting(dense)
    step = per_example.clipped_value_and_grad(fun, TX[tx], form="auto", microbatch_size=3)
    step(*arrays(rng, SIZE))
    assert len(runs) == 1


@pytest.mark.parametrize("microbatch_size", [None, 2])
@pytest.mark.parametrize("form", forms.NAMES)
def test_in_shard_map_it_runs_twice(form, microbatch_size):
    """First as it is given, which tells the axes of the examples."""
    fun, runs = counting(dense)
    step = per_example.clipped_value_and_grad(fun, CLIP, form=form, microbatch_size=microbatch_size)
    step = jax.shard_map(step, mesh=AUTO, in_specs=(P(), P("data")), out_specs=P())
    jax.eval_shape(step, ONES, np.tile(ONES, (2, 1)))
    assert len(runs) == 2


def test_under_other_transformations_it_runs_once(rng):
    fun, runs = counting(dense)
    w, rows = arrays(rng, SIZE)
    step = per_example.clipped_value_and_grad(fun, CLIP)

    def after(w):
        return jnp.sum(step(w, rows)[1] ** 2)

    jax.eval_shape(jax.grad(after), w)
    assert len(runs) == 1
    jax.eval_shape(jax.vmap(step, (0, None)), np.stack([w, w]), rows)
    assert len(runs) == 2


@pytest.mark.parametrize("form", slow_but(["one_pass", "two_pass"], "two_pass"))
def test_what_the_function_closes_over_may_be_differentiated(rng, form):
    """Its Python code has run when the derivative is taken."""
    w, rows = arrays(rng, SIZE)
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)  # no gradient of 0, at which `plain` has no derivative

    def after(scale):
        step = per_example.clipped_value_and_grad(lambda w, x: dense(scale * w, x), CLIP, form=form)
        return jnp.sum(step(w, rows)[1] ** 2)

    def plain(scale):
        grads = jax.vmap(jax.grad(lambda w, x: dense(scale * w, x)), (None, 0))(w, rows)
        sizes = jnp.sqrt(jnp.sum(grads**2, (1, 2), keepdims=True))
        return jnp.sum(jnp.mean(grads * jnp.minimum(1.0, BOUND / sizes), 0) ** 2)

    with jax.checking_leaks():
        found = jax.jit(jax.grad(after))(np.float32(0.7))
    np.testing.assert_allclose(found, jax.jit(jax.grad(plain))(np.float32(0.7)), rtol=1e-4)
