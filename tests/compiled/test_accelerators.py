"""The reader of compiled programs for accelerators, on short programs whose counts are known."""

import re
import sys
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from tests import table
from tests.benchmarks.accelerators import bounds, machines, sharded, steps
from tests.benchmarks.accelerators.__main__ import main
from tests.benchmarks.accelerators.compiled import Figures
from tests.benchmarks.accelerators.counts import ordinary_run, worst_run
from tests.benchmarks.accelerators.hlo import parsed, replica_groups

KB = 1024  # f32[256]

CONDITIONAL = """
HloModule step

%cheap (a.0: f32[256]) -> f32[256] {
  ROOT %a.0 = f32[256]{0} parameter(0)
}

%costly (a.1: f32[256]) -> f32[256] {
  %a.1 = f32[256]{0} parameter(0)
  %square.0 = f32[256]{0} multiply(%a.1, %a.1)
  ROOT %sum.0 = f32[256]{0} add(%square.0, %a.1), metadata={op_name="jit(step)/add"}
}

ENTRY %main (x: f32[256], which: pred[]) -> f32[256] {
  %x = f32[256]{0} parameter(0)
  %which = pred[] parameter(1)
  %negated = f32[256]{0} negate(%x)
  ROOT %chosen = f32[256]{0} conditional(%which, %negated, %negated), BRANCHES
}
"""
# The two ways in which XLA writes them.
BRANCHES = ("true_computation=%costly, false_computation=%cheap", "branch_computations={%cheap, %costly}")


def entry(*lines, before=""):
    """A program of one computation."""
    body = "\n".join(f"  {line}" for line in lines)
    return parsed(f"HloModule step\n\n{before}\nENTRY %main (x: f32[256]) -> f32[256] {{\n{body}\n}}\n")


def run(*lines, platform="tpu", before=""):
    return ordinary_run(entry("%x = f32[256]{0} parameter(0)", *lines, before=before), platform)


@pytest.mark.parametrize("branches", BRANCHES)
def test_of_a_conditional_the_cheaper_branch_is_ordinary_and_the_more_expensive_the_worst_case(branches):
    module = parsed(CONDITIONAL.replace("BRANCHES", branches))
    ordinary, worst = ordinary_run(module, "tpu"), worst_run(module, "tpu")
    assert (ordinary.bytes, ordinary.kernels, ordinary.conditionals) == (2 * KB, 1, 1)
    # multiply reads its operand once; add reads two.
    assert (worst.bytes, worst.kernels, worst.conditionals) == (2 * KB + 2 * KB + 3 * KB, 3, 1)


def test_conditionals_inside_the_branch_that_runs_are_counted():
    inner = """
%nothing (a: f32[256]) -> f32[256] {
  ROOT %a = f32[256]{0} parameter(0)
}

%outer (b: f32[256]) -> f32[256] {
  %b = f32[256]{0} parameter(0)
  ROOT %c = f32[256]{0} conditional(%p, %b, %b), branch_computations={%nothing, %nothing}
}
"""
    last = "ROOT %y = f32[256]{0} conditional(%p, %x, %x), branch_computations={%outer, %outer}"
    assert run(last, before=inner).conditionals == 2


def test_arrays_on_the_chip_are_not_main_memory():
    found = run(
        "%near = f32[256]{0:T(256)S(1)} negate(%x)",
        "%pair = (f32[256]{0:T(256)S(1)}, /*index=1*/f32[256]{0:T(256)}) fusion(%near), kind=kLoop, calls=%f",
    )
    assert (found.bytes, found.kernels) == (2 * KB, 2)


def test_an_asynchronous_copy_counts_where_it_starts_and_by_what_lies_in_main_memory():
    to_chip = (
        "%start = (f32[256]{0:S(1)}, f32[256]{0}, u32[]{:S(2)}) copy-start(%x)",
        "ROOT %done = f32[256]{0:S(1)} copy-done(%start)",
    )
    assert (run(*to_chip).bytes, run(*to_chip).kernels) == (KB, 0)
    within = to_chip[0].replace("S(1)", "S(0)")
    assert run(within).bytes == 2 * KB


def test_an_asynchronous_slice_moves_what_it_results_in():
    start = "%start = ((f32[256]{0:T(256)}), f32[64]{0:T(256)S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:64]}"
    assert run(start).bytes == KB // 4


def test_what_a_call_and_an_asynchronous_computation_do_is_counted():
    called = """
%called (a: f32[256]) -> f32[256] {
  %a = f32[256]{0} parameter(0)
  ROOT %b = f32[256]{0} negate(%a)
}
"""
    found = run(
        "%y = f32[256]{0} call(%x), to_apply=%called",
        "%start = ((f32[256]{0}), f32[256]{0}, s32[]) async-start(%y), calls=%called",
        "ROOT %done = f32[256]{0} async-done(%start)",
        before=called,
    )
    assert (found.bytes, found.kernels) == (4 * KB, 2)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("pred[256]{0}", 256),
        ("bf16[256]{0}", 512),
        ("f64[2,128]{1,0}", 2048),
        ("c64[256]{0}", 2048),
        ("s4[256]{0}", 128),
        ("f8e4m3fn[256]{0}", 256),
        ("f32[]", 4),
        ("token[]", 0),
        ("(f32[2]{0}, (u8[3]{0}, s32[]))", 15),
    ],
)
def test_the_bytes_of_a_result(shape, size):
    assert run(f"ROOT %y = {shape} fusion(%nothing), kind=kLoop, calls=%f").bytes == size


def test_operands_may_be_written_without_percent_signs_and_with_shapes():
    assert run("ROOT y = f32[256]{0} negate(x)").bytes == 2 * KB
    assert run("ROOT %y = f32[256]{0} negate(f32[256]{0:T(8,128)(2,1)} %x), metadata={op_name='x'}").bytes == 2 * KB


LOOP = """
%body (t: (s32[], f32[256])) -> (s32[], f32[256]) {
  %t = (s32[], f32[256]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %v = f32[256]{0} get-tuple-element(%t), index=1
  %w = f32[256]{0} negate(%v)
  ROOT %u = (s32[], f32[256]{0}) tuple(%i, %w)
}
"""
WHILE = "ROOT %y = (s32[], f32[256]{0}) while(%x), condition=%until, body=%body"
KNOWN = WHILE + ', backend_config={"known_trip_count":{"n":"3"}}'


def test_the_body_of_a_loop_is_counted_once():
    found = run(KNOWN, before=LOOP)
    assert (found.bytes, found.kernels, found.loops) == (2 * KB, 1, 1)


@pytest.mark.parametrize(("loop", "on_gpu"), [(KNOWN, 0), (WHILE, 1)])
def test_only_the_host_of_a_gpu_decides_a_loop_and_only_of_unknown_length(loop, on_gpu):
    assert run(loop, platform="gpu", before=LOOP).host == on_gpu
    assert run(loop, platform="tpu", before=LOOP).host == 0


def test_only_the_host_of_a_gpu_decides_a_conditional():
    module = parsed(CONDITIONAL.replace("BRANCHES", BRANCHES[0]))
    assert ordinary_run(module, "gpu").host == 1
    assert ordinary_run(module, "tpu").host == 0


@pytest.mark.parametrize(
    "line",
    [
        "%s = (f32[256]{0:S(5)}, f32[256]{0}, u32[]) copy-start(%x)",
        "%y = f32[256]{0:S(5)} copy(%x)",
        "%s = (f32[256]{0}, u32[], token[]) send(%x, %token), channel_id=1, is_host_transfer=true",
        "%o = token[] outfeed(%x, %token)",
        '%y = f32[256]{0} custom-call(%x), custom_call_target="xla_ffi_python_gpu_callback"',
    ],
)
def test_transfers_to_the_host(line):
    assert run(line).host == 1
    assert run("%y = f32[256]{0} copy(%x)").host == 0


def test_collectives_by_kind_and_groups():
    found = run(
        "%a = f32[256]{0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add",
        "%s = f32[256]{0} all-reduce-start(%x), replica_groups={{0,1},{2,3}}, to_apply=%add",
        "%d = f32[256]{0} all-reduce-done(%s)",
        "%g = f32[1024]{0} all-gather(%x), replica_groups=[1,4]<=[4], dimensions={0}",
    )
    pairs, everyone = ((0, 1), (2, 3)), ((0, 1, 2, 3),)
    assert found.collectives == Counter({("all-reduce", *pairs): 2, ("all-gather", *everyone): 1})
    assert found.kernels == 3


@pytest.mark.parametrize(
    ("written", "axes"),
    [
        ("{{0,2},{1,3}}", "data"),
        ("[2,2]<=[2,2]T(1,0)", "data"),
        ("mesh['a'=2,'b'=1,'c'=2] {'a'}", "data"),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", "data"),
        ("{{0,1},{2,3}}", "model"),
        ("[2,2]<=[4]", "model"),
        ("[2,2]<=[2,2]", "model"),
        ("mesh['a'=2,'b'=2] {'b'}", "model"),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", "model"),
        ("{{0,1,2,3}}", "data and model"),
        ("[1,4]<=[4]", "data and model"),
        ("mesh['a'=2,'b'=2] {'a','b'}", "data and model"),
    ],
)
def test_the_mesh_axes_of_a_collective(written, axes):
    groups = replica_groups(f", channel_id=1, replica_groups={written}, use_global_device_ids=true")
    assert sorted(device for group in groups for device in group) == [0, 1, 2, 3]
    mesh = jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[:4])
    assert sharded.axes_of(groups[0], mesh) == axes


def test_groups_of_a_transposed_array_of_devices():
    groups = [(0, 1), (4, 5), (2, 3), (6, 7)]
    assert replica_groups("replica_groups=[4,2]<=[2,2,2]T(1,0,2), dimensions={0}") == groups
    assert replica_groups("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,2,2]T(1,0,2)) {'b'}") == groups


def test_a_program_that_jax_compiled():
    compiled = jax.jit(lambda x, y: jnp.sin(x) * y).lower(jnp.ones(1000), jnp.ones(1000)).compile()
    assert ordinary_run(parsed(compiled.as_text()), "cpu").bytes == 3 * 4000


# What is compiled, and what it is held to.


def test_every_public_transformation_is_in_the_table_and_in_the_check():
    def missing(known):
        return {row.public for row in table.ROWS} - {row.public for row in table.ROWS if row.name in known}

    assert missing(steps.rows(any_tree=False)) == set()
    assert missing(steps.steps()) == {"qk_clip"}  # it is told which leaves are queries and keys


def test_the_steps_can_be_built():
    shapes = jax.eval_shape(lambda: table.params("float32"))
    for make in (*steps.steps().values(), *(each.make for each in bounds.BOUNDED.values())):
        jax.eval_shape(make().init, shapes)


FINE = Figures(reads=1.0, worst_reads=1.0, kernels=1, conditionals=0, loops=0, host=0, collectives=Counter(),
               temporary=0.01, seconds=1.0)  # fmt: skip


@pytest.mark.parametrize(
    ("exceeding", "words"),
    [
        ({"worst_reads": 1.2}, r"reads the gradients 1.20 times .* at most 1.10, .* than optax.clip"),
        ({"temporary": 0.2}, r"takes 0.20 of the gradients .* at most 0.1$"),
        ({"conditionals": 2}, "has 2 conditionals; at most 0"),
        ({"host": 3}, "has 3 transfers between device and host; at most 0"),
    ],
)
def test_each_bound_is_reported(exceeding, words):
    assert list(bounds.violations(FINE, "optax.clip", FINE)) == []
    (line,) = bounds.violations(FINE._replace(**exceeding), "optax.clip", FINE)
    assert re.search(words, line)


@pytest.mark.parametrize("platform", machines.PLATFORMS)
def test_without_the_compilers_one_line_says_what_to_install(platform, monkeypatch):
    monkeypatch.setitem(machines.NEEDED, platform, ("no_such_module", "no_such_package.module"))
    monkeypatch.setattr(sys, "argv", ["accelerators", platform])
    with pytest.raises(SystemExit, match=rf"^no_such_module, no_such_package.module: .* '\.\[aot-{platform}\]'$"):
        main()
