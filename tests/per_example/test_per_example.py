"""Per-example clipping: both forms against one example after the other, in NumPy's float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip as oc
from optaxclip import norms, per_example, thresholds
from optaxclip._jaxprs import outer
from optaxclip.per_example import two_pass
from tests.reference.examples import f64, norm_of, one_by_one, row
from tests.reference.trees import stack
from tests.support.marks import slow_but

B = 7
SIZES = (6, 16, 3)
BOUND = 2.5  # about the middle of the norms of `loss`


@functools.cache
def one_pass(bound=BOUND):
    """A clip in a chain: what it is made of is not known any more."""
    return optax.chain(oc.clip_by_global_norm(bound))


@functools.cache
def two_pass_clip(bound=BOUND):
    return oc.clip_by_global_norm(bound)


@functools.cache
def step_of(fun, tx, **options):
    """The jitted step: one for all tests that ask for the same."""
    return jax.jit(per_example.clipped_value_and_grad(fun, tx, **options))


FORMS = {"one pass": one_pass, "two passes": two_pass_clip}


def traced(form, bound):
    """A clip whose bound is an argument of the program, and so no key of a cache."""
    return FORMS[form].__wrapped__(bound)


both_forms = pytest.mark.parametrize("form", FORMS)
two_passes = pytest.mark.parametrize("form", slow_but(FORMS, "two passes"))


def floats(array, dtype="float32"):
    return np.asarray(array).astype(jnp.dtype(dtype))


def mlp_params(rng, dtype="float32", sizes=SIZES):
    return [
        {"w": floats(rng.normal(size=pair) / 2, dtype), "b": floats(rng.normal(size=pair[1:]), dtype)}
        for pair in itertools.pairwise(sizes)
    ]


def layer_params(rng, dtype="float32"):
    """One layer, which is enough where depth is not what is tested."""
    return mlp_params(rng, dtype, SIZES[:2])


def logits(params, x):
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def squares(out, label):
    """Of the distance from the label; cheaper to compile than a softmax, which is nothing to this library."""
    return jnp.sum(jnp.square(out.astype(jnp.float32) - (np.arange(len(out)) == label))) / 16


def loss(params, example):
    x, label = example
    return squares(logits(params, x), label)


def examples(rng, number=B, dtype="float32"):
    scale = np.logspace(-2, 1, number)[:, None]
    return floats(scale * rng.normal(size=(number, SIZES[0])), dtype), np.int32(rng.integers(0, 3, number))


def by_hand(fun, params, batch, bound=BOUND):
    return one_by_one(fun, params, batch, bound)


def assert_close(ours, expected, rtol=2e-6, atol=None):
    """Within `rtol` of the largest entry of all."""
    leaves, others = jax.tree.leaves(f64(ours)), jax.tree.leaves(f64(expected))
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    size = max((np.max(np.abs(leaf), initial=0) for leaf in others), default=0)
    for leaf, other in zip(leaves, others, strict=True):
        np.testing.assert_allclose(leaf, other, rtol=0, atol=rtol * size if atol is None else atol)


def fallback_fails(monkeypatch):
    """The way out of the two passes for extreme factors must not be needed. `step_of` must not have the step yet."""

    def broken(*args, **kwargs):
        total, seen = in_microbatches(*args, **kwargs)
        return jax.tree.map(lambda leaf: leaf * jnp.nan, total), seen

    in_microbatches = two_pass.batches.in_microbatches
    monkeypatch.setattr(two_pass, "batches", type("Broken", (), {"in_microbatches": staticmethod(broken)}))


# Equality.


@pytest.mark.parametrize(("form", "reduce"), [("one pass", "mean"), ("two passes", "sum")])
def test_one_after_the_other(rng, form, reduce, monkeypatch):
    fallback_fails(monkeypatch)
    params, batch = mlp_params(rng), examples(rng)
    step = step_of(loss, FORMS[form](), reduce=reduce, return_norms=True)
    value, grads, sizes = step(params, batch)
    total, expected, by_size = by_hand(loss, params, batch)
    count = B if reduce == "mean" else 1
    assert min(by_size) < BOUND < max(by_size)
    np.testing.assert_allclose(value, total / count, rtol=2e-6)
    assert_close(grads, jax.tree.map(lambda leaf: leaf / count, expected))
    np.testing.assert_allclose(sizes, by_size, rtol=2e-6)


SCALAR = {
    "a number": oc.clip_by_global_norm(1.0),
    "an array": oc.clip_by_global_norm(np.float32(1.0), ord=2.0),
    "smooth": oc.smooth_clip_by_global_norm(1.0),
    "range": oc.clip_by_norm_range(0.5, 1.0),
    "relative": oc.clip_by(norms.global_norm(), thresholds.relative_to_params(0.01)),
    "two": oc.clip_by(norms.global_norm(), thresholds.chain(thresholds.constant(2), thresholds.exactly(1))),
}
OTHER = {
    "another order": oc.clip_by_global_norm(1.0, ord=1),
    "some leaves": oc.clip_by(norms.global_norm(include=lambda path: "w" in path), thresholds.constant(1.0)),
    "leaves": oc.clip_by_leaf_norm(1.0),
    "changed": oc.clip_by_global_norm(1.0)._replace(init=lambda params: ()),
    "optax": optax.clip_by_global_norm(1.0),
}


@pytest.mark.parametrize("name", slow_but([*SCALAR, *OTHER], "relative", "some leaves"))
def test_the_form_and_that_both_agree(rng, name):
    tx, expected_form = (SCALAR | OTHER)[name], "two_pass" if name in SCALAR else "one_pass"
    params, batch = layer_params(rng), examples(rng)
    step = step_of(loss, tx)
    assert per_example.form_of(step, params, batch) == expected_form
    if expected_form == "two_pass":
        assert_close(step(params, batch), step_of(loss, tx, form="one_pass")(params, batch), 1e-6)


class Case:
    """`fun(*args)` with rows at `batch_argnums`, and the same as a function of (params, example)."""

    def __init__(self, fun, args, argnums=0, batch_argnums=1, has_aux=False):
        self.fun, self.args = fun, args
        self.options = {"argnums": argnums, "batch_argnums": batch_argnums, "has_aux": has_aux}

    def expected(self, bound=BOUND):
        number, batch = self.options["argnums"], self.options["batch_argnums"]
        numbers, places = [each if isinstance(each, tuple) else (each,) for each in (number, batch)]

        def fun(params, example):
            given = list(self.args)
            for at, param in zip(numbers, params, strict=True):
                given[at] = param
            for at, rows in zip(places, example, strict=True):
                given[at] = rows
            found = self.fun(*given)
            return found[0] if self.options["has_aux"] else found

        params, rows = tuple(self.args[at] for at in numbers), tuple(self.args[at] for at in places)
        value, grads, _ = by_hand(fun, params, rows, bound)
        return value, grads if isinstance(number, tuple) else grads[0]


def with_aux(params, example):
    out = logits(params, example[0])
    return loss(params, example), {"logits": out, "label": example[1]}


def with_dropout(params, x, label, key):
    keep = jax.random.bernoulli(key, 0.5, x.shape)
    return loss(params, (jnp.where(keep, x, jnp.zeros_like(x)), label))


def two_towers(left, scale, batch, right):
    out = logits(left, batch["x"]) * jnp.tanh(scale) + logits(right, batch["more"]["x"])
    return squares(out, batch["more"]["label"])


def cases(rng):
    params, (x, label) = layer_params(rng), examples(rng)
    tree = {"x": x, "more": {"x": x[::-1], "label": label, "none": None}}
    keys = jax.random.split(jax.random.key(0), B)
    old = np.asarray(jax.random.key_data(keys))
    return {
        "aux": Case(with_aux, (params, (x, label)), has_aux=True),
        "several, keys": Case(with_dropout, (params, x, label, keys), batch_argnums=(1, 2, 3)),
        "old keys": Case(with_dropout, (params, x, label, old), batch_argnums=(1, 2, 3)),
        "tuple": Case(two_towers, (params, np.float32(0.3), tree, layer_params(rng)), (0, 1, 3), 2),
        "tuple of one": Case(loss, (params, (x, label)), (0,), (1,)),
        "second": Case(lambda batch, w: loss(w, batch), ((x, label), params), 1, 0),
    }


KINDS = ["aux", "several, keys", "old keys", "tuple", "tuple of one", "second"]


@pytest.mark.parametrize("name", slow_but(KINDS, "aux", "several, keys", "tuple"))
@pytest.mark.parametrize(
    ("form", "microbatch_size"),
    [
        ("two passes", None),
        pytest.param("two passes", 3, marks=pytest.mark.slow),
        pytest.param("one pass", 3, marks=pytest.mark.slow),
    ],
)
def test_arguments_of_all_kinds(rng, form, name, microbatch_size, monkeypatch):
    fallback_fails(monkeypatch)
    case = cases(rng)[name]
    options = case.options | {"microbatch_size": microbatch_size, "reduce": "sum"}
    value, grads = step_of(case.fun, FORMS[form](), **options)(*case.args)
    if case.options["has_aux"]:
        value, aux = value
        expected_aux = jax.jit(jax.vmap(lambda example: case.fun(case.args[0], example)[1]))(case.args[1])
        assert_close(aux["logits"], expected_aux["logits"])
        np.testing.assert_array_equal(aux["label"], case.args[1][1])
    expected_value, expected = case.expected()
    np.testing.assert_allclose(value, expected_value, rtol=2e-6)
    assert_close(grads, expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {np.dtype(np.float32)}


@two_passes
def test_keyword_arguments_and_other_arguments_are_for_all_examples(rng, form):
    def fun(w, x, table, *, scale):
        return scale * jnp.vdot(jnp.tanh(w @ x), table)

    w, x = floats(rng.normal(size=(4, 4))), floats(rng.normal(size=(B, 4)))
    table = np.arange(4, dtype=np.float32)
    _, grads = step_of(fun, FORMS[form](), reduce="sum")(w, x, table, scale=2.0)
    assert_close(grads, by_hand(lambda w, x: fun(w, x, table, scale=2.0), w, x)[1])


@both_forms
@pytest.mark.parametrize("dtype", slow_but(["bfloat16", "float16"], "bfloat16"))
def test_narrow_parameters(rng, form, dtype):
    params, batch = layer_params(rng, dtype), examples(rng, dtype=dtype)
    value, grads, sizes = step_of(loss, FORMS[form](), reduce="sum", return_norms=True)(params, batch)
    total, expected, by_size = by_hand(loss, params, batch)
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(value, total, rtol=1e-5)
    np.testing.assert_allclose(sizes, by_size, rtol=eps)
    assert_close(grads, expected, 2 * eps)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(dtype)}


def test_a_float16_sum_beyond_the_largest_number_is_that():
    rows = np.full((4, 2), 30000.0, np.float16)
    _, grads = step_of(linear, one_pass(1e9), reduce="sum")(np.ones(2, np.float16), rows)
    np.testing.assert_array_equal(grads, np.full(2, 65504.0))


@two_passes
def test_float16_inside_keeps_what_clipped_examples_have(rng, form):
    """Every norm is 1e6 times the bound: in float16 the weighted derivatives would vanish if they were not scaled."""

    def fun(w, x):
        half = jnp.tanh(w.astype(jnp.float16) @ x.astype(jnp.float16))
        return 1e3 * jnp.sum(half.astype(jnp.float32) * 1e-1)

    w, x = floats(rng.normal(size=(8, 8))), floats(rng.normal(size=(B, 8)))
    _, grads = step_of(fun, FORMS[form](1e-6), reduce="sum")(w, x)
    assert_close(grads, by_hand(fun, w, x, 1e-6)[1], 5e-3)


@two_passes
@pytest.mark.parametrize("microbatch_size", slow_but([1, 3, B, 100], 3))
def test_microbatches(rng, form, microbatch_size):
    params, batch = layer_params(rng), examples(rng)
    options = {"has_aux": True, "return_norms": True, "microbatch_size": microbatch_size}
    (value, aux), grads, sizes = step_of(with_aux, FORMS[form](), **options)(params, batch)
    total, expected, by_size = by_hand(loss, params, batch)
    np.testing.assert_allclose(value, total / B, rtol=2e-6)
    assert_close(grads, jax.tree.map(lambda leaf: leaf / B, expected))
    np.testing.assert_allclose(sizes, by_size, rtol=2e-6)
    assert_close(aux["logits"], batch[0] @ params[0]["w"] + params[0]["b"])
    np.testing.assert_array_equal(aux["label"], batch[1])


# Other transformations.


def linear(w, x):
    return jnp.vdot(w, x)  # the gradient is x


ANY = {
    "clip": oc.clip(0.5),
    "leaf_norm": oc.clip_by_leaf_norm(0.5),
    "agc": oc.adaptive_grad_clip(0.1),
    "chain": optax.chain(oc.clip_by_leaf_norm(0.5), optax.scale(-2.0)),
    "decay": optax.chain(oc.clip_by_global_norm(0.5), optax.add_decayed_weights(0.1)),
}


@pytest.mark.parametrize("name", slow_but(ANY, "agc", "chain"))
@pytest.mark.parametrize("microbatch_size", slow_but([None, 3], None))
def test_any_transformation_without_state(rng, name, microbatch_size):
    tx = ANY[name]
    params, batch = layer_params(rng), examples(rng)
    one = jax.jit(lambda example: tx.update(jax.grad(loss)(params, example), tx.init(params), params)[0])
    each = [one(row(batch, i)) for i in range(B)]
    expected = jax.tree.map(lambda *rows: sum(map(f64, rows)), *each)
    step = step_of(loss, tx, reduce="sum", microbatch_size=microbatch_size)
    assert_close(step(params, batch)[1], expected)


def test_what_is_not_finite_after_the_transformation_is_what_counts():
    rows = np.float32([[np.nan, 1.0], [3.0, 4.0]])
    tx = optax.chain(oc.zero_nonfinite(), oc.clip_by_global_norm(1.0))
    step = step_of(linear, tx, reduce="sum", return_norms=True)
    value, grads, sizes = step(np.ones(2, np.float32), rows)
    np.testing.assert_allclose(grads, [0.6, 1.8], rtol=1e-6)
    np.testing.assert_allclose(value, 7.0)  # the other value is NaN
    np.testing.assert_allclose(sizes, [np.nan, 5.0])


# Examples that are out of the ordinary.

WIDE = 3  # rows of a matrix, so that its gradient is an outer product
W = np.ones((WIDE, 5), np.float32)


def linear_in_a_matrix(w, example):
    return jnp.vdot(w @ example["x"], example["d"])  # the gradient is the outer product of d and x


def matrix_examples(rng, number=6):
    shape = (number, 5), (number, WIDE)
    return {name: floats(rng.normal(size=size)) for name, size in zip("xd", shape, strict=True)}


def without(batch, at):
    return jax.tree.map(lambda leaf: np.delete(leaf, at, axis=0), batch)


BAD = {
    "nan": (np.nan, 0),
    "inf": (np.inf, 0),
    "minus inf": (-np.inf, 3),
    "nan, last": (np.nan, 5),
    "inf, last": (np.inf, 5),
}


@both_forms
@pytest.mark.parametrize("bad", slow_but(BAD, "nan", "inf, last"))
def test_a_bad_example_changes_nothing_but_itself(rng, form, bad, monkeypatch):
    number, at = BAD[bad]
    fallback_fails(monkeypatch)
    batch = matrix_examples(rng)
    batch["x"][at, 1] = number
    step = step_of(linear_in_a_matrix, FORMS[form](), reduce="sum", return_norms=True)
    value, grads, sizes = step(W, batch)
    total, expected, others = by_hand(linear_in_a_matrix, W, without(batch, at))
    np.testing.assert_allclose(value, total, rtol=1e-5, atol=1e-6)
    assert_close(grads, expected)
    assert not np.isfinite(sizes[at])
    np.testing.assert_allclose(np.delete(sizes, at), others, rtol=2e-6)


def test_the_mean_divides_by_all():
    rows = np.float32([[3.0, 4.0], [np.nan, 0.0]])
    for tx in (one_pass(1.0), oc.clip_by_global_norm(1.0)):
        value, grads = step_of(linear, tx)(np.ones(2, np.float32), rows)
        np.testing.assert_allclose(value, 3.5)
        np.testing.assert_allclose(grads, [0.3, 0.4], rtol=1e-6)


@both_forms
@pytest.mark.parametrize("size", slow_but([1e20, 1e25, 1e-25, 0.0], 1e25, 0.0))
@pytest.mark.parametrize("microbatch_size", slow_but([None, 2], None))
def test_a_large_example_is_clipped_and_a_tiny_one_is_not(rng, form, size, microbatch_size, monkeypatch):
    fallback_fails(monkeypatch)
    batch = matrix_examples(rng)
    batch["x"][2] = np.multiply([3.0, 4.0, 0, 0, 0], size)
    batch["d"][2] = [1.0, 0, 0]
    step = step_of(linear_in_a_matrix, FORMS[form](), reduce="sum", return_norms=True, microbatch_size=microbatch_size)
    _, grads, sizes = step(W, batch)
    _, expected, by_size = by_hand(linear_in_a_matrix, W, batch)
    np.testing.assert_allclose(sizes, by_size, rtol=2e-6)
    np.testing.assert_allclose(sizes[2], 5 * size, rtol=2e-6)
    assert_close(grads, expected)


@both_forms
@pytest.mark.parametrize("bound", slow_but([1e-3, 1.0], 1e-3))
def test_a_factor_beyond_the_normal_range(rng, form, bound):
    batch = matrix_examples(rng)
    batch["x"][2] = [3e36, 4e36, 0, 0, 0]
    batch["d"][2] = [1.0, 0, 0]
    batch["x"][4] = np.nan
    step = step_of(linear_in_a_matrix, FORMS[form](bound), reduce="sum")
    assert_close(step(W, batch)[1], by_hand(linear_in_a_matrix, W, without(batch, 4), bound)[1])
    batch["x"][[0, 1, 3, 5]] = np.nan  # so that it is the only one that counts
    np.testing.assert_allclose(step(W, batch)[1][0, :2], [0.6 * bound, 0.8 * bound], rtol=1e-5)


def test_a_factor_beyond_the_largest_number():
    tx = oc.clip_by(norms.global_norm(), thresholds.exactly(1e4))
    tiny = {"x": np.float32([[3e-37, 4e-37, 0, 0, 0]]), "d": np.float32([[1.0, 0, 0]])}
    _, grads = step_of(linear_in_a_matrix, tx, form="two_pass")(W, tiny)
    np.testing.assert_allclose(grads[0, :2], [6e3, 8e3], rtol=1e-5)


@two_passes
def test_no_example_counts(form):
    rows = {"x": np.full((3, 5), np.nan, np.float32), "d": np.ones((3, WIDE), np.float32)}
    value, grads = step_of(linear_in_a_matrix, FORMS[form]())(W, rows)
    assert value == 0
    np.testing.assert_array_equal(grads, np.zeros((WIDE, 5)))


@two_passes
def test_a_function_without_a_derivative_at_zero_inputs(rng, form):
    """Neither a weight of 0 nor zeros for the inputs would leave a bad example out."""

    def fun(w, example):
        return jnp.vdot(w @ (example["x"] / jnp.linalg.norm(example["x"])), example["d"])

    batch = matrix_examples(rng)
    batch["x"][1] = 0.0
    _, grads = step_of(fun, FORMS[form](), reduce="sum")(W, batch)
    assert_close(grads, by_hand(fun, W, without(batch, 1))[1])


@two_passes
def test_a_traced_bound_of_any_size(rng, form):
    params, batch = layer_params(rng), examples(rng)
    step = jax.jit(lambda bound: per_example.clipped_value_and_grad(loss, traced(form, bound))(params, batch))
    _, none = step(np.float32(0.0))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(jax.device_get(none)))
    for bound in (0.3, np.inf):
        _, grads = step(np.float32(bound))
        assert_close(grads, jax.tree.map(lambda leaf: leaf / B, by_hand(loss, params, batch, bound)[1]))


@two_passes
def test_one_example_removed_changes_the_sum_by_at_most_the_bound(rng, form):
    batch = matrix_examples(rng)
    step = step_of(linear_in_a_matrix, FORMS[form](), reduce="sum", return_norms=True)
    _, whole, sizes = jax.device_get(step(W, batch))
    assert min(sizes) < BOUND < max(sizes)
    for i in range(len(sizes)):
        _, rest, _ = step(W, without(batch, i))
        assert norm_of(jax.tree.map(np.subtract, f64(whole), f64(rest))) <= BOUND * (1 + 1e-5)


# Under the transformations of jax.


@pytest.mark.parametrize(
    ("form", "microbatch_size"),
    [
        ("two passes", None),
        pytest.param("two passes", 3, marks=pytest.mark.slow),
        pytest.param("one pass", 3, marks=pytest.mark.slow),
    ],
)
def test_it_can_be_differentiated(rng, form, microbatch_size):
    """Through a training step, by the bound and by the parameters."""
    params, batch = layer_params(rng), examples(rng)

    def after(bound, params, step):
        _, grads = step(bound)(params, batch)
        return loss(jax.tree.map(lambda w, g: w - 0.1 * g, params, grads), row(batch, 0))

    def ours(bound):
        return per_example.clipped_value_and_grad(loss, traced(form, bound), microbatch_size=microbatch_size)

    def plain(bound):
        def clipped(params, example):
            value, grads = jax.value_and_grad(loss)(params, example)
            factor = jnp.minimum(1.0, bound / jnp.sqrt(sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(grads))))
            return value, jax.tree.map(lambda leaf: leaf * factor, grads)

        return lambda params, batch: jax.tree.map(
            lambda leaf: jnp.mean(leaf, 0), jax.vmap(clipped, (None, 0))(params, batch)
        )

    derivatives = jax.jit(lambda *args: [jax.grad(after, (0, 1))(*args, step) for step in (ours, plain)])
    assert_close(*derivatives(np.float32(BOUND), params), 1e-5)


@two_passes
def test_the_derivative_is_finite_at_a_zero_gradient(rng, form):
    batch = matrix_examples(rng)
    batch["x"][1] = 0.0

    def after(w):
        _, grads = per_example.clipped_value_and_grad(linear_in_a_matrix, FORMS[form]())(w, batch)
        return jnp.sum(jnp.square(w - grads))

    assert np.all(np.isfinite(jax.jit(jax.grad(after))(W)))


@two_passes
def test_in_a_scan_and_under_vmap(rng, form):
    params, batches = layer_params(rng), [examples(rng) for _ in range(3)]
    stacked = stack(batches)
    step = per_example.clipped_value_and_grad(loss, FORMS[form]())

    def moved(params, grads):
        return jax.tree.map(lambda w, g: w - np.float32(0.1) * g, params, grads)

    def train(params, batch):
        value, grads = step(params, batch)
        return moved(params, grads), value

    after, values = jax.jit(lambda params: jax.lax.scan(train, params, stacked))(params)
    at_once = jax.jit(jax.vmap(step, (None, 0)))(params, stacked)
    expected, one = params, step_of(loss, FORMS[form]())
    for i, batch in enumerate(batches):
        value, grads = jax.device_get(one(expected, batch))
        expected = moved(expected, grads)
        np.testing.assert_allclose(values[i], value, rtol=1e-5)
    assert_close(after, expected)
    assert_close(row(jax.device_get(at_once), 1), one(params, batches[1]))


# Memory.


def temporary_bytes(step, *args):
    return jax.jit(step).lower(*args).compile().memory_analysis().temp_size_in_bytes


def test_memory(rng):
    """At microbatch 8 under a tenth of all gradients at once, and with two passes less than a few gradients."""
    sizes, number = (64, 512), 128
    params = mlp_params(rng, sizes=sizes)
    batch = np.ones((number, sizes[0]), np.float32), np.zeros(number, np.int32)
    one = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    materialised = temporary_bytes(per_example.clipped_value_and_grad(loss, one_pass()), params, batch)
    assert materialised > number * one
    for form in FORMS.values():
        step = per_example.clipped_value_and_grad(loss, form(), microbatch_size=8)
        assert temporary_bytes(step, params, batch) < materialised / 10
    two = per_example.clipped_value_and_grad(loss, oc.clip_by_global_norm(1.0))
    assert temporary_bytes(two, params, batch) < 0.1 * materialised


# Outer products.


def einsum_loss(w, x):
    return jnp.sum(jnp.tanh(jnp.einsum("hij,hi->hj", w, x)))  # a product for every h


OUTER = {
    "dense": (lambda w, x: jnp.sum(jnp.tanh(x @ w)), (4, 3), (4,), True),
    "dense, from the right": (lambda w, x: jnp.sum(jnp.tanh(w @ x)), (3, 4), (4,), True),
    "a row": (lambda w, x: jnp.sum(jnp.tanh(x[None] @ w)), (4, 3), (4,), True),
    "jitted": (jax.jit(lambda w, x: jnp.sum(jnp.tanh(x @ w))), (4, 3), (4,), True),
    "reshaped": (lambda w, x: jnp.sum(jnp.tanh(x @ w.reshape(4, 6))), (4, 2, 3), (4,), True),
    "narrow inside": (
        lambda w, x: jnp.sum(jnp.tanh(x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32)),
        (4, 3),
        (4,),
        True,
    ),
    "several": (einsum_loss, (2, 4, 3), (2, 4), True),
    "twice": (lambda w, x: jnp.sum(jnp.tanh((x @ w) @ w)), (4, 4), (4,), False),
    "a sequence": (lambda w, x: jnp.sum(jnp.tanh(x @ w)), (4, 3), (5, 4), False),
    "scaled afterwards": (lambda w, x: jnp.sum(jnp.tanh(x @ (2 * w))), (4, 3), (4,), False),
    "remat": (jax.checkpoint(lambda w, x: jnp.sum(jnp.tanh(x @ w))), (4, 3), (4,), False),
    "cond": (lambda w, x: jax.lax.cond(x[0] > 0, lambda: jnp.sum(x @ w), lambda: jnp.sum(w)), (4, 3), (4,), False),
    "scanned": (
        lambda w, x: jnp.sum(jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0]),
        (2, 4, 4),
        (4,),
        False,
    ),
}


@functools.cache
def outer_products():
    """Of every case, by one program: which are found, and the gradient, what was evaluated instead, and its norm."""
    rng, are_outer = np.random.default_rng(0), {}
    given = {name: [floats(rng.normal(size=size)) for size in sizes] for name, (_, *sizes, _) in OUTER.items()}

    def evaluated(name, *args):
        grad = jax.grad(OUTER[name][0])
        found = outer.evaluate(grad, *args)
        are_outer[name] = isinstance(found, outer.Outer)
        return grad(*args), outer.as_array(found), found.norm() if are_outer[name] else None

    found = jax.jit(lambda given: {name: evaluated(name, *args) for name, args in given.items()})(given)
    return are_outer, found


@pytest.mark.parametrize("name", OUTER)
def test_outer_products_are_found_and_their_norms_are_right(name):
    are_outer, found = outer_products()
    grad, evaluated, norm = found[name]
    assert are_outer[name] == OUTER[name][-1]
    np.testing.assert_allclose(evaluated, grad, rtol=1e-6)
    if are_outer[name]:
        tolerance = 1e-2 if name == "narrow inside" else 1e-6
        np.testing.assert_allclose(norm, norm_of(grad), rtol=tolerance)


LARGEST = float(np.finfo(np.float32).max)
norm_of_product = jax.jit(lambda left, right: outer.Outer((left, right), 0, lambda: None).norm())


@pytest.mark.parametrize(
    ("left", "right", "norm"),
    [
        ((1e20, 0), (3e15, 4e15), 5e35),
        ((1e-20, 0), (3e-15, 4e-15), 5e-35),
        ((1e30, 0), (3e-30, 4e-30), 5.0),
        ((2e38, 2e38), (1, 1), LARGEST),  # entries that are finite, and a norm that is not
        ((0, 0), (3, 4), 0.0),
        ((1e20, 0), (1e20, 0), np.nan),  # entries that are not finite
        ((np.nan, 0), (3, 4), np.nan),
        ((0, 0), (np.inf, 0), np.nan),
    ],
)
def test_norms_of_outer_products_over_the_whole_range(left, right, norm):
    found = float(norm_of_product(np.float32(left), np.float32(right)))
    np.testing.assert_allclose(found if np.isfinite(found) else np.nan, norm, rtol=1e-6)


# Errors.


@pytest.mark.parametrize("tx", [oc.zclip(), oc.clip_by_global_norm(1.0, record=True), optax.adam(1e-3)])
def test_a_state_is_refused(rng, tx):
    with pytest.raises(ValueError, match=r"clipped_value_and_grad needs a transformation without state.*keeps \d+"):
        jax.eval_shape(per_example.clipped_value_and_grad(loss, tx), mlp_params(rng), examples(rng))


def test_a_schedule_is_a_state(rng):
    tx = oc.clip_by_global_norm(lambda step: 1.0 / (1 + step))
    with pytest.raises(ValueError, match="keeps 1 arrays"):
        jax.eval_shape(per_example.clipped_value_and_grad(loss, tx), mlp_params(rng), examples(rng))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fun": 3}, "fun must be a function, got 3"),
        ({"tx": 1.0}, "tx must be an optax transformation, got 1.0"),
        ({"tx": oc.clip_by_global_norm}, "call it first"),
        ({"argnums": -1}, "argnums .*at least 0, got -1"),
        ({"argnums": ()}, r"argnums must name an argument, got \(\)"),
        ({"argnums": True}, "argnums .*got True"),
        ({"batch_argnums": 1.5}, "batch_argnums .*got 1.5"),
        ({"batch_argnums": (0, 1)}, r"argnums=0 and batch_argnums=\(0, 1\) name argument 0 twice"),
        ({"batch_argnums": (1, 1)}, "name argument 1 twice"),
        ({"microbatch_size": 0}, "microbatch_size .*at least 1, or None, got 0"),
        ({"microbatch_size": 2.0}, "microbatch_size .*got 2.0"),
        ({"reduce": "max"}, "reduce must be one of 'mean', 'sum', got 'max'"),
        ({"form": "two"}, "form must be one of 'auto', 'one_pass', 'two_pass', got 'two'"),
        ({"form": None}, "form must be one of .*got None"),
        ({"form": jnp.zeros(2)}, "form must be one of .*got Array"),
    ],
)
def test_bad_arguments(options, words):
    given = {"fun": loss, "tx": oc.clip_by_global_norm(1.0)} | options
    with pytest.raises(ValueError, match=words):
        per_example.clipped_value_and_grad(given.pop("fun"), given.pop("tx"), **given)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ((np.ones((3, 6)), np.zeros(4, int)), r"numbers of examples differ: 3 in argument 1 at '0', 4 in argument 1"),
        ((np.ones((3, 6)), np.zeros((), int)), "argument 1 at '1' is a scalar"),
        ((np.ones((0, 6)), np.zeros(0, int)), "there are 0 examples"),
        ((), "no array"),
    ],
)
def test_bad_batches(rng, batch, words):
    with pytest.raises(ValueError, match=words):
        per_example.clipped_value_and_grad(loss, one_pass())(mlp_params(rng), batch)


def test_too_few_arguments(rng):
    with pytest.raises(ValueError, match=r"batch_argnums=\(1,\) name more than the 1 positional"):
        per_example.clipped_value_and_grad(loss, one_pass())(mlp_params(rng))


def test_it_has_the_name_of_the_function():
    assert per_example.clipped_value_and_grad(loss, one_pass()).__name__ == "loss"
    assert callable(per_example.clipped_value_and_grad(functools.partial(loss), one_pass()))
