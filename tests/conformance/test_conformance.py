"""Every row of the table against every way in which a transformation is used."""

import functools
import operator

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optaxclip.core import RecordedState
from optaxclip.wrappers.skips import SkipState
from tests.reference import fixed
from tests.reference.trees import assert_same_bits
from tests.support import compiling
from tests.table import NARROW, REFUSED, ROWS, by_path, numbers, params, tree

MASK = {"dense": True, "scale": False}


def rows(*, where=lambda row: True):
    return pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS if where(row)])


def rows_and_dtypes(*, where=lambda row: True):
    cases = [(row, dtype) for row in ROWS if where(row) for dtype in row.dtypes]
    return pytest.mark.parametrize(
        ("row", "dtype"), [pytest.param(row, dtype, id=f"{row.name}-{dtype}") for row, dtype in cases]
    )


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


def abstract(tree):
    """Shapes and dtypes alone: what tracing needs, at none of the cost of compiling."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


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


# One step.


@rows_and_dtypes()
def test_structure_shapes_and_dtypes_are_kept(row, dtype):
    updates, weights = tree(0, dtype), params(dtype)
    state = transformation(row).init(weights)
    new_updates, new_state = first_step(row, updates, weights)
    chex.assert_trees_all_equal_structs(new_updates, updates)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_updates, updates)
    chex.assert_trees_all_equal_structs(new_state, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
    assert_finite(new_updates)


def parameters_dtype(row, dtype):
    """A dtype for the parameters that is not that of the gradients, unless those are complex and an average is kept."""
    return dtype if row.param_state and dtype == "complex64" else "float32"


@rows_and_dtypes()
def test_the_parameters_dtype_does_not_decide_the_updates(row, dtype):
    updates, weights = abstract(tree(0, dtype)), abstract(params(parameters_dtype(row, dtype)))
    new_updates, _ = jax.eval_shape(transformation(row).update, updates, transformation(row).init(weights), weights)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_updates, updates)


@rows()
def test_leaves_of_different_dtypes_keep_theirs(row):
    updates, weights = of_several_dtypes(), params("float32")
    new_updates, _ = first_step(row, updates, weights)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_updates, updates)
    assert_inside(row, new_updates, weights, rounding("bfloat16"))


@rows()
def test_float64_is_kept(row):
    with jax.enable_x64(True):
        weights = abstract(jax.tree.map(lambda x: np.asarray(x, np.float64), params("float32")))
        state = jax.eval_shape(transformation(row).init, weights)
        new_updates, new_state = jax.eval_shape(transformation(row).update, weights, state, weights)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_updates, weights)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)


def mixed(seed, fill=None):
    """One tree with a matrix of every float dtype of jax that is narrower than 16 bits."""
    if fill is None:
        matrices = {dtype: np.asarray(numbers(seed + i, (2, 3), "float32")) for i, dtype in enumerate(NARROW)}
    else:
        matrices = {dtype: np.resize(fill(jnp.finfo(dtype)), (2, 3)) for dtype in NARROW}
    dense = {str(dtype): jnp.asarray(np.asarray(x).astype(dtype)) for dtype, x in matrices.items()}
    return {"dense": dense, "scale": numbers(seed, (), "float32")}


def extremes(info):
    return np.array([float(x) for x in (info.max, info.min, info.smallest_subnormal, info.tiny, 0, 1)])


@functools.cache
def compiled_mixed(row):
    return jax.jit(transformation(row).update, compiler_options=compiling.AS_USERS_DO)


@pytest.mark.usefixtures("strict_promotion")
@rows()
def test_every_narrow_float_of_jax(row):
    updates, weights = mixed(0), mixed(100)
    state = transformation(row).init(weights)
    new_updates, new_state = compiled_mixed(row)(updates, state, weights)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_updates, updates)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
    assert_as_in_float64(row, updates, new_updates, weights)
    # Numbers from both ends of each range, in turn with zeros: nothing leaves it, in the state either.
    for fill in (extremes, lambda info: float(info.max), lambda info: 0.0, lambda info: float(info.smallest_subnormal)):
        new_updates, new_state = compiled_mixed(row)(mixed(0, fill), new_state, mixed(100, fill))
        assert_finite(new_updates)
        assert not any(np.any(np.isnan(leaf)) for leaf in by_path(new_state).values())


def assert_as_in_float64(row, before, after, weights):
    """Every group lies in its band, up to the rounding of its leaves; where it is only scaled, by the right factor."""
    assert_finite(after)

    def of_dtype(number):
        return row.split(jax.tree.map(lambda x: np.full(x.shape, float(number(jnp.finfo(x.dtype)))), before))

    eps, least = of_dtype(lambda info: info.eps), of_dtype(lambda info: info.smallest_subnormal)
    groups, parameters = row.split(before), row.split(weights)
    for name, (size, low, high) in row.measured(after, weights).items():
        first = row.measure(groups[name], parameters[name])
        if (row.direction_preserving or row.elementwise) and row.inside is not None:
            right = groups[name] * (np.clip(first, low, high) / first)
            off = np.abs(row.split(after)[name] - right)
            assert np.all(off <= (eps[name] / 2 + 1e-5) * np.abs(right) + least[name] / 2), (name, off, right)
        else:
            slack, rest = 4 * np.max(eps[name]), fixed.vector_norm(least[name])
            assert low - slack * abs(low) - rest <= size <= high * (1 + slack) + rest, (name, size, low, high)


@pytest.mark.parametrize("dtype", REFUSED, ids=str)
@rows()
def test_narrow_floats_that_hold_no_gradient_are_refused(row, dtype):
    updates, weights = abstract(tree(0, "float32")), abstract(params("float32"))
    state = transformation(row).init(params("float32"))
    updates["dense"]["bias"] = jax.ShapeDtypeStruct((3,), dtype)
    with pytest.raises(ValueError, match=rf"'dense/bias' is {dtype}, .*cast the gradients"):
        jax.eval_shape(transformation(row).update, updates, state, weights)


@rows_and_dtypes()
def test_eager_equals_jit(row, dtype):
    updates, weights = tree(0, dtype), params(dtype)
    tx = transformation(row)
    eager = tx.update(updates, tx.init(weights), weights)
    # The two may differ in the last place: XLA fuses a multiply and an add.
    last_place = 2 * float(jnp.finfo(dtype).eps)
    chex.assert_trees_all_close(eager, first_step(row, updates, weights), rtol=last_place, atol=0)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@rows_and_dtypes()
def test_the_bound_holds(row, dtype, scale):
    updates, weights = tree(0, dtype, scale), params(dtype)
    new_updates, _ = first_step(row, updates, weights)
    assert_inside(row, new_updates, weights, rounding(dtype))
    before, after = by_path(updates), by_path(new_updates)
    for path in row.untouched:
        np.testing.assert_array_equal(after[path], before[path])


@rows(where=lambda row: not (row.first_passes or row.bounds_weights))
def test_the_bound_of_the_table_is_one_that_can_fail(row):
    weights = params("float32")
    with pytest.raises(AssertionError, match="is not within"):
        assert_inside(row, tree(0, "float32", 1e3), weights, rounding("float32"))


@rows_and_dtypes(where=lambda row: row.direction_preserving)
def test_direction_is_kept(row, dtype):
    updates, weights = tree(0, dtype), params(dtype)
    after = row.split(first_step(row, updates, weights)[0])
    for name, before in row.split(updates).items():
        factors = np.ravel(after[name] / before)
        assert np.all(np.real(factors) > 0), name
        np.testing.assert_allclose(factors, factors[0], rtol=2 * rounding(dtype))


@rows_and_dtypes(where=lambda row: row.inside is not None)
def test_inside_the_band_every_bit_is_kept(row, dtype):
    updates = tree(0, dtype, row.inside)
    # A subnormal number shows a multiplication by 1, which would flush it.
    bias = updates["dense"]["bias"]
    subnormal = jnp.asarray(np.asarray(float(jnp.finfo(dtype).smallest_subnormal) * 3).astype(bias.dtype))
    updates["dense"]["bias"] = jnp.stack([subnormal, -jnp.zeros_like(subnormal), bias[2]])
    new_updates, _ = first_step(row, updates, params(dtype))
    assert_same_bits(new_updates, updates)


@rows(where=lambda row: row.idempotent)
def test_a_second_application_changes_nothing_more(row):
    weights = params("float32")
    once, state = first_step(row, tree(0, "float32", 10.0), weights)
    twice, _ = compiled(row)(once, state, weights)
    chex.assert_trees_all_close(twice, once, rtol=1e-5)


@rows_and_dtypes(where=lambda row: not row.bounds_weights)
def test_zero_gradients_stay_zero(row, dtype):
    zeros = jax.tree.map(jnp.zeros_like, tree(0, dtype))
    new_updates, _ = first_step(row, zeros, params(dtype))
    chex.assert_trees_all_equal(new_updates, zeros)


@rows()
def test_zero_gradients_and_parameters_stay_zero(row):
    zeros = jax.tree.map(jnp.zeros_like, tree(0, "float32"))
    new_updates, _ = first_step(row, zeros, zeros)
    chex.assert_trees_all_equal(new_updates, zeros)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@rows_and_dtypes(where=lambda row: not (row.elementwise or row.zeroes))
def test_a_group_that_is_not_finite_passes_and_stops_no_other(row, dtype, value):
    updates, weights = tree(0, dtype), params(dtype)
    bad = poisoned(updates, value)
    clean = row.split(first_step(row, updates, weights)[0])
    before, after = row.split(bad), row.split(first_step(row, bad, weights)[0])
    sick = {name for name, group in before.items() if not np.all(np.isfinite(group))}
    assert sick
    for name, group in after.items():
        if name in sick:
            np.testing.assert_array_equal(group, before[name], err_msg=name)
        else:
            np.testing.assert_allclose(group, clean[name], rtol=2 * float(jnp.finfo(dtype).eps), err_msg=name)


@rows_and_dtypes(where=lambda row: row.elementwise and not row.zeroes)
def test_where_values_are_clipped_nan_passes_and_inf_does_not(row, dtype):
    updates, weights = tree(0, dtype), params(dtype)
    clean = by_path(first_step(row, updates, weights)[0])["dense/kernel"]
    for value, passes in ((np.nan, True), (np.inf, False), (-np.inf, False)):
        after = first_step(row, poisoned(updates, value), weights)[0]
        kernel = by_path(after)["dense/kernel"]
        np.testing.assert_array_equal(np.delete(kernel, 0), np.delete(clean, 0))
        assert np.isnan(kernel[0, 0]) == passes
        if not passes:
            assert_inside(row, after, weights, rounding(dtype))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@rows_and_dtypes(where=lambda row: row.zeroes)
def test_what_is_not_finite_comes_out_as_zero(row, dtype, value):
    updates, weights = tree(0, dtype), params(dtype)
    after, _ = first_step(row, poisoned(updates, value), weights)
    expected = {"step": jax.tree.map(jnp.zeros_like, updates), "coordinate": poisoned(updates, 0.0)}[row.zeroes]
    assert_same_bits(after, expected)


def without_record(state):
    """The state but for the record and the counters, which are there to show such steps."""
    if isinstance(state, SkipState):
        return state._replace(skip_stats=None)
    return state.threshold_state if isinstance(state, RecordedState) else state


@pytest.mark.parametrize("value", [np.nan, np.inf])
@rows(where=lambda row: not row.takes_zero)
def test_a_step_that_is_not_finite_leaves_the_state_of_a_zero_step(row, value):
    updates, weights = tree(0, "float32"), params("float32")
    _, after_bad = first_step(row, jax.tree.map(lambda leaf: jnp.full_like(leaf, value), updates), weights)
    _, after_zero = first_step(row, jax.tree.map(jnp.zeros_like, updates), weights)
    chex.assert_trees_all_equal(without_record(after_bad), without_record(after_zero))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@rows(where=lambda row: row.takes_zero)
def test_a_step_that_is_not_finite_leaves_the_state_as_it_was(row, value):
    weights = params("float32")
    _, after_bad = first_step(row, jax.tree.map(lambda leaf: jnp.full_like(leaf, value), tree(0, "float32")), weights)
    chex.assert_trees_all_equal(without_record(after_bad), without_record(transformation(row).init(weights)))


# Several steps.


@rows_and_dtypes()
def test_one_trace_over_three_calls(row, dtype):
    tx, weights = transformation(row), params(dtype)
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(tx.update, n=1))
    updates, state = tree(0, dtype), tx.init(weights)
    for _ in range(3):
        # Not run, since tracing is what counts: once more if dtypes or weak types had changed.
        updates, state = jax.eval_shape(step, updates, state, weights)


@rows_and_dtypes()
def test_the_state_can_be_carried_by_scan(row, dtype):
    tx, weights = transformation(row), params(dtype)

    def step(carry, _):
        updates, state = carry
        return tx.update(updates, state, weights), None

    carry = (tree(0, dtype), tx.init(weights))
    jax.eval_shape(lambda: jax.lax.scan(step, carry, length=3))


@rows_and_dtypes()
def test_a_step_can_be_a_branch_of_cond(row, dtype):
    tx, updates, weights = transformation(row), tree(0, dtype), params(dtype)
    state = tx.init(weights)
    jax.eval_shape(
        lambda go: jax.lax.cond(go, lambda: tx.update(updates, state, weights), lambda: (updates, state)), True
    )


@rows()
def test_a_scan_with_everything_donated_twice_equals_a_loop(row):
    tx = transformation(row)
    batches = [[tree(seed, "float32"), tree(seed + 10, "float32")] for seed in (0, 50)]
    expected, loop_state = [], tx.init(params("float32"))
    for updates in (*batches[0], *batches[1]):
        out, loop_state = compiled(row)(updates, loop_state, params("float32"))
        expected.append(out)

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def run(stacked, state, weights):
        def body(state, updates):
            return tx.update(updates, state, weights)[::-1]

        state, outs = jax.lax.scan(body, state, stacked)
        return outs, state, weights

    # The parameters are donated as well: no state may share a buffer with them.
    weights = params("float32")
    state = tx.init(weights)
    for i, batch in enumerate(batches):
        outs, state, weights = run(stack(batch), state, weights)
        # Gradients are of order 1, and a carry added to one may cancel most of it.
        chex.assert_trees_all_close(outs, stack(expected[2 * i : 2 * i + 2]), rtol=1e-6, atol=1e-7)
    # Norms are of order 1, and a standard deviation is a difference of them.
    chex.assert_trees_all_close(state, loop_state, rtol=1e-6, atol=1e-6)


@rows()
def test_a_state_is_strongly_typed_and_has_no_count(row):
    state = transformation(row).init(params("float32"))
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))
    # optax.tree.get(state, "count") has to find the optimizer's.
    assert optax.tree.get(state, "count") is None


@rows(where=lambda row: row.stateless)
def test_a_stateless_transformation_takes_and_returns_any_state(row):
    tx, updates, weights = transformation(row), tree(0, "float32"), params("float32")
    assert tx.init(weights) == optax.EmptyState()
    expected, _ = first_step(row, updates, weights)
    new_updates, new_state = tx.update(updates, None, weights)
    assert new_state is None or new_state == optax.EmptyState()
    chex.assert_trees_all_close(new_updates, expected, rtol=1e-6)


@rows()
def test_a_checkpoint_continues_bit_for_bit(row):
    tx, weights = transformation(row), params("float32")
    _, state = first_step(row, tree(0, "float32"), weights)
    saved = [np.asarray(leaf).copy() for leaf in jax.tree.leaves(state)]
    restored = jax.tree.unflatten(jax.tree.structure(tx.init(weights)), [jnp.asarray(leaf) for leaf in saved])
    later = tree(10, "float32")
    assert_same_bits(compiled(row)(later, restored, weights), compiled(row)(later, state, weights))


# In the company of other transformations.


def compositions(row, dtype="float32"):
    """Every way in which optax puts a transformation to work, around a fresh one."""
    tx = row.make()
    # Left to itself, inject_hyperparams gives a hyperparameter the parameters' dtype, and no bound is complex.
    bounds_dtype = jnp.float32 if dtype == "complex64" else None
    inject = optax.inject_hyperparams(row.factory, row.static_args, hyperparam_dtype=bounds_dtype)
    return {
        "chain": optax.chain(tx, optax.trace(0.9)),
        "masked": optax.masked(tx, MASK),
        "partition": optax.partition({True: tx, False: optax.set_to_zero()}, MASK),
        "MultiSteps": optax.MultiSteps(
            tx, 2, accumulator_dtype=jnp.promote_types(dtype, "float32")
        ).gradient_transformation(),
        "inject_hyperparams": inject(*row.args, **row.kwargs),
    }


@pytest.mark.slow  # what each way does is tested below in float32
@pytest.mark.parametrize("way", ["chain", "masked", "partition", "MultiSteps", "inject_hyperparams"])
@rows_and_dtypes()
def test_dtypes_survive_composition(row, dtype, way):
    tx, updates, weights = compositions(row, dtype)[way], tree(0, dtype), params(dtype)
    state = tx.init(weights)
    new_updates, new_state = jax.eval_shape(tx.update, updates, state, weights)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_updates, updates)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)


@rows()
def test_chain_applies_one_after_the_other(row):
    updates, weights = tree(0, "float32"), params("float32")
    tx = optax.chain(transformation(row), optax.adam(1e-3))
    chained, _ = tx.update(updates, tx.init(weights), weights)
    clipped, _ = first_step(row, updates, weights)
    adam = optax.adam(1e-3)
    expected, _ = adam.update(clipped, adam.init(weights), weights)
    chex.assert_trees_all_close(chained, expected, rtol=1e-5)


@pytest.mark.parametrize("way", ["masked", "partition"])
@rows(where=lambda row: not row.counts_entries)
def test_masked_leaves_count_for_nothing(row, way):
    tx, updates, weights = compositions(row)[way], tree(0, "float32"), params("float32")
    masked, _ = tx.update(updates, tx.init(weights), weights)
    alone, _ = transformation(row).update(updates | {"scale": None}, transformation(row).init(weights), weights)
    chex.assert_trees_all_close(masked["dense"], alone["dense"], rtol=1e-6)
    assert masked["scale"] == {"masked": updates["scale"], "partition": 0.0}[way]


@pytest.mark.slow
@rows()
def test_multi_steps_transforms_the_mean(row):
    weights = params("float32")
    one, two = tree(0, "float32"), tree(10, "float32")
    tx = optax.MultiSteps(transformation(row), every_k_schedule=2)
    # Its cond would be compiled for every row; that it can be traced is tested above.
    with jax.disable_jit():
        first, state = tx.update(one, tx.init(weights), weights)
        second, _ = tx.update(two, state, weights)
    expected, _ = first_step(row, jax.tree.map(lambda a, b: (a + b) / 2, one, two), weights)
    chex.assert_trees_all_equal(first, jax.tree.map(jnp.zeros_like, one))
    chex.assert_trees_all_close(second, expected, rtol=1e-5)


@rows()
def test_injected_hyperparameters_act_like_plain_ones(row):
    updates, weights = tree(0, "float32"), params("float32")
    tx = compositions(row)["inject_hyperparams"]
    state = tx.init(weights)
    plain_state = transformation(row).init(weights)
    for _ in range(2):
        injected, state = tx.update(updates, state, weights)
        plain, plain_state = compiled(row)(updates, plain_state, weights)
        chex.assert_trees_all_close(injected, plain, rtol=1e-6)


def raised(state, fields):
    """The state with 1 added to what some of its fields hold."""

    def one(path, leaf):
        return leaf + 1 if any(getattr(key, "name", None) in fields for key in path) else leaf

    return jax.tree_util.tree_map_with_path(one, state)


@rows()
def test_map_params_finds_the_way_through_the_state(row):
    tx = optax.chain(transformation(row), optax.trace(0.9))
    state = tx.init(params("float32"))
    mapped = optax.tree.map_params(tx, lambda x: x + 1, state)
    chex.assert_trees_all_equal(mapped[0], raised(state[0], row.param_state))
    chex.assert_trees_all_equal(mapped[1].trace, jax.tree.map(lambda x: x + 1, state[1].trace))


@rows()
def test_unknown_extra_arguments_are_ignored(row):
    updates, weights = tree(0, "float32"), params("float32")
    state = transformation(row).init(weights)
    with_extras, _ = transformation(row).update(updates, state, weights, value=1.0, something_else=jnp.zeros(2))
    chex.assert_trees_all_close(with_extras, first_step(row, updates, weights)[0], rtol=1e-6)


@rows(where=lambda row: not row.needs_params)
def test_parameters_are_optional_where_they_are_not_needed(row):
    updates, weights = tree(0, "float32"), params("float32")
    tx = transformation(row)
    without, _ = tx.update(updates, tx.init(weights))
    chex.assert_trees_all_close(without, first_step(row, updates, weights)[0], rtol=1e-6)


@pytest.mark.slow
@rows()
def test_vmap_equals_a_loop(row):
    weights = params("float32")
    state = transformation(row).init(weights)
    # One of the three far outside the band, one at zero: under vmap a cond runs both branches.
    examples = [tree(0, "float32"), tree(10, "float32", 1e25), jax.tree.map(jnp.zeros_like, weights)]
    batched = jax.jit(jax.vmap(lambda updates: transformation(row).update(updates, state, weights)[0]))(stack(examples))
    expected = [first_step(row, updates, weights)[0] for updates in examples]
    chex.assert_trees_all_close(batched, stack(expected), rtol=1e-6, atol=1e-6 if row.sums else 0)


# Leaves of every kind.


@pytest.mark.parametrize("missing", ["dense/bias", "dense", "scale"])
@rows()
def test_a_missing_gradient_stays_missing_and_counts_for_nothing(row, missing):
    updates, weights = tree(0, "float32"), params("float32")
    zeroed = jax.tree.map_with_path(
        lambda path, x: jnp.zeros_like(x) if keystr(path).startswith(missing) else x, updates
    )
    some = {"dense": dict(updates["dense"]), "scale": updates["scale"]}
    *above, last = missing.split("/")
    functools.reduce(operator.getitem, above, some)[last] = None
    state = transformation(row).init(weights)
    new_updates, new_state = transformation(row).update(some, state, weights)
    chex.assert_trees_all_equal_structs(new_updates, some)
    chex.assert_trees_all_equal_structs(new_state, state)
    # A zero counts for nothing either.
    expected = by_path(first_step(row, zeroed, weights)[0])
    for path, leaf in by_path(new_updates).items():
        np.testing.assert_allclose(leaf, expected[path], rtol=1e-6)


def keystr(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")


def odd_leaves():
    """What else is found in a tree of gradients; none of it can be clipped."""
    return {
        "steps": jnp.arange(3),
        "flag": jnp.asarray(True),
        "no_gradient": np.zeros((2,), jax.dtypes.float0),
        "key": jax.random.key(0),
        "empty": jnp.zeros((0, 3)),
    }


def assert_same_leaves(ours, given):
    for name, leaf in given.items():
        assert ours[name].dtype == leaf.dtype, name
        assert ours[name].shape == leaf.shape, name
    np.testing.assert_array_equal(ours["steps"], given["steps"])
    np.testing.assert_array_equal(ours["flag"], given["flag"])
    np.testing.assert_array_equal(jax.random.key_data(ours["key"]), jax.random.key_data(given["key"]))


@rows()
def test_leaves_that_are_not_numbers_pass_untouched_and_uncounted(row):
    updates, weights, odd = tree(0, "float32"), params("float32"), odd_leaves()
    tx = transformation(row)
    expected, _ = first_step(row, updates, weights)
    updates["dense"] |= odd
    weights["dense"] |= odd
    state = tx.init(weights)
    new_updates, new_state = tx.update(updates, state, weights)
    traced_updates, traced_state = jax.eval_shape(tx.update, updates, state, weights)
    chex.assert_trees_all_equal_structs(new_state, traced_state, state)
    chex.assert_trees_all_equal_structs(new_updates, traced_updates, updates)
    assert_same_leaves({name: new_updates["dense"].pop(name) for name in odd}, odd)
    chex.assert_trees_all_close(new_updates, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "updates",
    [{}, (), {"a": None}, np.float32(2.0), np.ones((0, 2), np.float32), {"a": np.arange(3)}],
    ids=["dict", "tuple", "none", "scalar", "empty", "integers"],
)
@rows(where=lambda row: row.any_tree)
def test_trees_with_little_in_them(row, updates):
    updates = jax.tree.map(jnp.asarray, updates)
    tx = transformation(row)
    state = tx.init(updates)
    new_updates, new_state = tx.update(updates, state, updates)
    chex.assert_trees_all_equal_structs((new_updates, new_state), (updates, state))
    chex.assert_trees_all_equal_shapes_and_dtypes(new_updates, updates)
    if jax.tree.leaves(updates):
        assert_finite(new_updates)


# Derivatives.


@functools.cache
def gradient(row):
    """Of a number made from the new updates, with respect to the updates and the parameters."""
    tx = transformation(row)

    def fun(updates, weights):
        out, _ = tx.update(updates, tx.init(weights), weights)
        return sum(jnp.vdot(jnp.cos(jnp.arange(x.size)), x) for x in jax.tree.leaves(out))

    return jax.jit(jax.grad(fun, argnums=(0, 1)))


@pytest.mark.slow
@rows()
def test_derivatives_at_zero_gradients_are_finite(row):
    weights = params("float32")
    zeros = jax.tree.map(jnp.zeros_like, weights)
    assert_finite(gradient(row)(zeros, weights))
    assert_finite(gradient(row)(tree(0, "float32") | {"dense": zeros["dense"]}, weights))


@rows(where=lambda row: row.needs_params)
def test_derivatives_at_zero_parameters_are_finite(row):
    zeros = jax.tree.map(jnp.zeros_like, params("float32"))
    assert_finite(gradient(row)(zeros, zeros))
    assert_finite(gradient(row)(tree(0, "float32"), zeros))


# Where the step runs.


@rows()
def test_exports_for_every_platform(row):
    weights = params("float32")
    state = transformation(row).init(weights)
    exported = jax.export.export(jax.jit(transformation(row).update), platforms=["cpu", "cuda", "tpu"])(
        tree(0, "float32"), state, weights
    )
    assert exported.platforms == ("cpu", "cuda", "tpu")


@rows()
def test_a_step_transfers_nothing(row):
    updates, weights = tree(0, "float32"), params("float32")
    state = transformation(row).init(weights)
    # The first call compiles.
    compiled(row)(updates, state, weights)
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(compiled(row)(updates, state, weights))
    assert "callback" not in str(jax.make_jaxpr(transformation(row).update)(updates, state, weights))


@pytest.mark.usefixtures("strict_promotion")
@rows_and_dtypes()
def test_no_dtype_is_promoted_in_passing(row, dtype):
    updates, weights = tree(0, dtype), params(parameters_dtype(row, dtype))
    tx = row.make()
    new_updates, _ = jax.eval_shape(tx.update, updates, tx.init(weights), weights)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_updates, updates)


@rows()
def test_shardings_survive_an_explicit_mesh(row):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
    specs = {"dense": {"kernel": P("x", None), "bias": P(None)}, "scale": P()}
    with jax.set_mesh(mesh):
        placed = jax.tree.map(
            lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
            params("float32"),
            specs,
        )
        state = jax.eval_shape(transformation(row).init, placed)
        new_updates, _ = jax.eval_shape(transformation(row).update, placed, state, placed)
    assert jax.tree.map(lambda x: x.sharding.spec, new_updates) == specs
