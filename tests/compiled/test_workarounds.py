"""What the library works around in jax and XLA: whether the newest jax still needs it.

Every comment in the library that names a version of jax has its place here. Where a few lines can show the defect, they
are a probe: plain jax, compiled as users compile. It fails with the first jax that has the defect no longer.
"""

import ast
import functools
import gc
import re
import tomllib
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.support import compiling
from tests.support.meshes import AUTO

ROOT = Path(__file__).parents[2]
MANY = 1 << 16  # entries, enough for XLA to loop over them
ROWS = 64
SMALLEST = np.float32(1e-40)  # subnormal


# How a probe looks at a program.


def compiled(f, *shapes):
    """The program for float32 arrays of these shapes; for other dtypes, of structs."""
    arrays = [shape if hasattr(shape, "dtype") else jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(f, compiler_options=compiling.AS_USERS_DO).lower(*arrays).compile()


def written(f, *shapes):
    """The temporary memory of a program, as a part of what its first array would take in float32.

    It must return little: an output of that size can hold what is written on the way.
    """
    first = shapes[0].shape if hasattr(shapes[0], "dtype") else shapes[0]
    return compiled(f, *shapes).memory_analysis().temp_size_in_bytes / (4 * np.prod(first))


def result(f, *arrays):
    """What a program makes of arrays, as NumPy's."""
    return jax.device_get(jax.jit(f, compiler_options=compiling.AS_USERS_DO)(*arrays))


def sixteen_bits(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


# The defects. Each function says whether it is there.


def division_by_a_constant_loses_the_quotient():
    return result(lambda x: x / 1e38, np.float32([2e38]))[0] == 0


def division_by_a_broadcast_number_loses_the_quotient():
    return result(jnp.divide, np.full(2, 2e38, np.float32), np.full(1, 1e38, np.float32))[0] == 0


def product_of_constants_overflows():
    return np.isinf(result(lambda x: x * 2.0**84 * 2.0**84, np.float32([2.0**-100])))[0]


def logarithm_of_a_subnormal_is_infinite():
    return np.isinf(result(jnp.log, SMALLEST))


def subnormal_is_no_more_than_zero():
    return not result(lambda x: x > 0, SMALLEST)


def choice_becomes_a_minimum_that_flushes():
    return result(lambda x, high: jnp.where(x > high, high, x), SMALLEST, np.float32(1)) == 0


def maximum_loses_nan():
    return not np.isnan(result(jnp.max, np.append(np.float32(np.nan), np.zeros(MANY, np.float32))))


def maximum_over_devices_loses_nan():
    largest = jax.shard_map(
        lambda x: jax.lax.pmax(x, "data"), mesh=AUTO, in_specs=PartitionSpec("data"), out_specs=PartitionSpec()
    )
    return not np.isnan(result(largest, np.float32([np.nan, 0, 0, 0])))[0]


def flags_are_written():
    return written(lambda x: jnp.any(~jnp.isfinite(x)), (MANY,)) > 0.1


def terms_of_a_sum_over_rows_are_written():
    return written(lambda x, weights: jnp.sum(jnp.clip(x * weights, -1, 1), axis=0), (ROWS, MANY), (ROWS, 1)) > 0.5


def slice_of_several_rows_is_written():
    length = ROWS // 4

    def total(x, weights):
        def block(i):
            several, by = (jax.lax.dynamic_slice_in_dim(each, i * length, length) for each in (x, weights))
            return functools.reduce(jnp.add, [jnp.clip(several[j] * by[j], -1, 1) for j in range(length)])

        return jax.lax.fori_loop(1, ROWS // length, lambda i, total: total + block(i), block(0))

    return written(total, (ROWS, MANY), (ROWS, 1)) > 0.1


def conversion_for_a_norm_is_written_for_the_scale():
    def scaled(x):
        factor = jax.lax.rsqrt(jnp.sum(jnp.square(x.astype(jnp.float32))))
        return (x.astype(jnp.float32) * factor).astype(x.dtype)

    return written(scaled, sixteen_bits(MANY)) > 0.5


def ratios_are_written():
    def worst(update, param, relative, absolute):
        ratio = update / (relative * param + absolute)
        return jnp.max(jnp.where(jnp.isfinite(update), ratio, jnp.inf))

    return written(worst, (MANY,), (MANY,), (1,), (1,)) > 0.5


def sixteen_bits_are_converted_before_a_loop_over_blocks():
    length = MANY // 16

    def largest(x):
        def block(i):
            return jnp.max(jnp.abs(jax.lax.dynamic_slice_in_dim(x, i * length, length).astype(jnp.float32)))

        return jax.lax.fori_loop(1, 16, lambda i, largest: jnp.maximum(largest, block(i)), block(0))

    return written(largest, sixteen_bits(MANY)) > 0.5


def moduli_are_written():
    def measured(x, high):
        return jnp.max(jnp.abs(x)), jnp.sum(jnp.abs(x) > high)

    def compared(x, high):
        return jnp.max(jnp.abs(x)), jnp.sum((x > high) | (x < -high))

    return written(measured, (MANY,), (1,)) > written(compared, (MANY,), (1,)) + 0.5


def state_is_copied_to_hold_it_back():
    def held(hold, moment, update):
        new = 0.9 * moment + update
        return -new / (jnp.abs(new) + 1), jnp.where(hold, moment, new)

    array = jax.ShapeDtypeStruct((MANY,), jnp.float32)
    step = jax.jit(held, donate_argnums=(1, 2), compiler_options=compiling.AS_USERS_DO)
    program = step.lower(jax.ShapeDtypeStruct((), bool), array, array).compile()
    return program.memory_analysis().temp_size_in_bytes > 0.5 * 4 * MANY


def factor_is_calculated_for_every_coordinate():
    def scaled(x):
        size = jnp.sum(jnp.square(x))
        return x * jnp.where(size > 1, jax.lax.rsqrt(size), 1.0)

    computations = compiled(scaled, (MANY,)).as_text().split("\n\n")
    loops = [each for each in computations if re.search(rf"ROOT \S+ = f32\[{MANY}\]", each) and "ENTRY" not in each]
    return any(" select(" in loop for loop in loops)


def reduction_of_a_tuple_gathers():
    def sums(x):
        return jax.lax.reduce((x, jnp.square(x)), (np.float32(0),) * 2, lambda a, b: (a[0] + b[0], a[1] + b[1]), (0,))

    split = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=NamedSharding(AUTO, PartitionSpec("data")))
    return "all-gather(" in compiled(sums, split).as_text()


def six_bits_do_not_compile():
    six_bits = jax.ShapeDtypeStruct((4,), np.dtype(ml_dtypes.float6_e2m3fn))
    try:
        compiled(lambda x: x.astype(jnp.float32), six_bits)
    except jax.errors.JaxRuntimeError:
        return True
    return False


def kind_of_emitters_can_be_chosen():
    try:
        jax.jit(jnp.negative, compiler_options={"xla_cpu_use_fusion_emitters": False}).lower(1.0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def closure_convert_keeps_its_function():
    def convert():
        array = np.ones(1)
        jax.closure_convert(lambda x: x * array, 1.0)
        return weakref.ref(array)

    is_alive = convert()
    gc.collect()
    return is_alive() is not None


def types_have_no_manual_axes():
    return not hasattr(jax.typeof(jnp.ones(1)), "manual_axis_type")


def there_is_no_pcast():
    return not hasattr(jax.lax, "pcast")


def specs_have_no_partitions():
    return not hasattr(PartitionSpec(), "partitions")


# The lists.


class Workaround(NamedTuple):
    """A place that works around a defect.

    Attributes:
      where: the module, and the function or class at its top level.
      is_there: the probe.
      until: the first jax known to be without the defect, None if there is none. The workaround is for older ones.
      everywhere: whether the probe, which runs on a CPU, says enough; else GPUs and TPUs may still need it.
    """

    where: str
    is_there: Callable[[], bool]
    until: tuple[int, ...] | None = None
    everywhere: bool = True


PROBED = [
    Workaround("optaxclip.contrib.elementwise._ratio", division_by_a_constant_loses_the_quotient, everywhere=False),
    Workaround(
        "optaxclip._numerics.arithmetic.quotient", division_by_a_broadcast_number_loses_the_quotient, everywhere=False
    ),
    Workaround(
        "optaxclip.thresholds.averages.ema_ratio", division_by_a_broadcast_number_loses_the_quotient, everywhere=False
    ),
    Workaround("optaxclip._numerics.array_norms.root_of_three_scales", product_of_constants_overflows, until=(0, 12)),
    Workaround("optaxclip.thresholds.rules.of_logarithms", logarithm_of_a_subnormal_is_infinite, everywhere=False),
    Workaround("optaxclip.clippers.elementwise._usable_end", subnormal_is_no_more_than_zero, everywhere=False),
    Workaround("optaxclip.clippers.elementwise._next", choice_becomes_a_minimum_that_flushes, everywhere=False),
    Workaround("optaxclip._numerics.arithmetic.has_nonfinite", maximum_loses_nan, everywhere=False),
    Workaround("optaxclip._numerics.arithmetic.has_nonfinite", flags_are_written, everywhere=False),
    Workaround("optaxclip._arrays.leaves.Leaf", maximum_over_devices_loses_nan, everywhere=False),
    Workaround("optaxclip._numerics.rows", terms_of_a_sum_over_rows_are_written),
    Workaround("optaxclip._numerics.rows._row_by_row", slice_of_several_rows_is_written),
    Workaround("optaxclip._numerics.scaling.factor", factor_is_calculated_for_every_coordinate),
    Workaround("optaxclip._numerics.scaling.rescale", conversion_for_a_norm_is_written_for_the_scale),
    Workaround("optaxclip._numerics.ratios._by_blocks", ratios_are_written),
    Workaround(
        "optaxclip._numerics.ratios.worst_ratio", sixteen_bits_are_converted_before_a_loop_over_blocks, until=(0, 12)
    ),
    Workaround("optaxclip.norms._is_beyond", moduli_are_written),
    Workaround("optaxclip._jaxprs.holding", state_is_copied_to_hold_it_back),
    Workaround("optaxclip._jaxprs.replaying.traced", closure_convert_keeps_its_function),
    Workaround("optaxclip._numerics.array_norms._sums_at_three_scales", reduction_of_a_tuple_gathers),
    Workaround("optaxclip._arrays.dtypes.what_is_wrong", six_bits_do_not_compile, everywhere=False),
    Workaround("optaxclip._arrays.layouts.varying", types_have_no_manual_axes, until=(0, 10)),
    Workaround("optaxclip._arrays.layouts.varying_over", there_is_no_pcast, until=(0, 8, 2)),
    Workaround("optaxclip._arrays.layouts.dims_of", specs_have_no_partitions, until=(0, 10, 2)),
    Workaround("tests.support.compiling", kind_of_emitters_can_be_chosen, until=(0, 12)),
]

# What else names a version of jax, and why there is no probe.
NOT_PROBED = {
    "optaxclip._jaxprs.reading": "no defect: it asks whether jax has the names when it is imported",
    "optaxclip._numerics.array_norms._sums_at_three_scales": "memory on a TPU; see tests/benchmarks/accelerators",
    "optaxclip._numerics.array_norms._sums_in_float64": "time: a conversion of float16 or float8 straight to float64",
    "optaxclip._numerics.array_norms._sums_of_columns_on_cpu": "time: sums over columns in float64",
    "optaxclip._numerics.array_norms._sums_of_narrow_columns": "memory on a GPU; see tests/benchmarks/accelerators",
    "optaxclip._numerics.matrices.iterations": "time to compile for a TPU",
    "optaxclip._numerics.matrices.iterations._product": "time to compile for a TPU",
    "optaxclip.clippers.spectral.clip_singular_values": "no workaround: the time to compile for a TPU",
    "optaxclip.per_example.gradients.clipped_value_and_grad": "no workaround: times, and what users call in older jax",
    "optaxclip.per_example.two_pass.summed": "time: convolutions in a branch",
    "optaxclip.thresholds.ordering.in_order": "time: sorting floats",
}


# The tests.


def version(numbers):
    return ".".join(map(str, numbers))


def oldest_supported():
    """The oldest jax that the package installs with."""
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (oldest,) = [found[1] for each in needed if (found := re.fullmatch(r"jax>=([\d.]+)", each))]
    return tuple(map(int, oldest.split(".")))


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="asks about the newest jax")
@pytest.mark.parametrize("workaround", PROBED, ids=lambda each: f"{each.where}: {each.is_there.__name__}")
def test_the_newest_jax_still_needs_it(workaround):
    where, is_there, until, everywhere = workaround
    what = is_there.__name__.replace("_", " ")
    if until:
        assert not is_there(), f"jax {jax.__version__} has this again: {what}. {where} is not for older ones only"
    else:
        other = "" if everywhere else " if GPUs and TPUs don't need it"
        assert is_there(), f"fixed in jax {jax.__version__}: {what}. {where} can lose its workaround{other}"


@pytest.mark.parametrize("workaround", [each for each in PROBED if each.until], ids=lambda each: each.where)
def test_an_older_jax_that_needs_it_is_supported(workaround):
    assert oldest_supported() < workaround.until, (
        f"jax {version(workaround.until)} is required now: {workaround.where} can lose its workaround"
    )


def places_that_name_a_version(path: Path) -> Iterator[str]:
    """Functions and classes at the top level of a module, and the module, where a comment or a docstring does."""
    text = path.read_text()
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    lines, start = text.splitlines(), 0
    for node in ast.parse(text).body:
        part = "\n".join(lines[start : node.end_lineno])  # with the comments in front
        start = node.end_lineno
        if re.search(r"\bjax[\s#<>=(]*0\.\d", part):
            yield f"{module}.{node.name}" if hasattr(node, "name") else module


def test_every_comment_that_names_a_version_is_in_a_list():
    files = [*(ROOT / "optaxclip").rglob("*.py"), ROOT / "tests" / "support" / "compiling.py"]
    found = {place for path in files for place in places_that_name_a_version(path)}
    assert found == {each.where for each in PROBED} | set(NOT_PROBED)
