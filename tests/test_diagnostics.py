"""What recorded norms say: summaries and advice on histories with known answers, CSV files, plots, the command."""

import dataclasses
import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from matplotlib.figure import Figure

import optaxclip
from optaxclip import diagnostics
from optaxclip.demo import command, corpus, csv_files
from optaxclip.demo.table import Line
from optaxclip.demo.training import History, Result
from tests import commands
from tests.benchmarks import advice as benchmark

ROOT = Path(__file__).parents[1]


def pareto(rng, index, steps=1000):
    """Norms of which a share x**-index exceeds x."""
    return (1 - rng.random(steps)) ** (-1 / index)


def lognormal(rng, steps=1000, spread=0.4):
    return rng.lognormal(sigma=spread, size=steps)


def with_spikes(rng, steps=1000, share=0.01, size=(20, 50)):
    """Lognormal norms of median 1, and the steps, counted from 1, that were made spikes."""
    norms = lognormal(rng, steps)
    at = np.sort(rng.choice(steps, int(share * steps), replace=False))
    norms[at] = rng.uniform(*size, size=len(at))
    return norms, at + 1


# The summary.


def test_counts_and_percentiles():
    norms = np.concatenate([np.arange(1.0, 102.0), [0.0, 0.0, np.nan, np.inf, -np.nan]])
    found = diagnostics.summary(list(norms))
    assert (found.steps, found.nonfinite, found.zeros) == (106, 3, 2)
    assert dict(found.percentiles) == {1: 2.0, 10: 11.0, 50: 51.0, 90: 91.0, 99: 100.0, 100: 101.0}


@pytest.mark.parametrize("index", [1.1, 1.5, 3.0])
def test_the_interval_has_the_tail_index_of_a_pareto_law(rng, index):
    found = [diagnostics.summary(pareto(rng, index, 500)) for _ in range(60)]
    assert {each.tail_count for each in found} == {44}  # 2 sqrt(500)
    covered = np.mean([low < index < high for low, high in (each.tail_interval for each in found)])
    assert covered >= 0.85  # 95 % are meant; 9 or more misses of 60 have a chance of 0.2 %
    assert np.median([each.tail_index for each in found]) == pytest.approx(index, rel=0.1)
    for each in found:
        low, high = each.tail_interval
        assert (high - low) / 2 == pytest.approx(1.96 * each.tail_index / math.sqrt(44))


def test_the_tail_index_by_hand():
    # The largest 10 of 25 are e, the 11th is 1: the mean of their logarithms is 1.
    found = diagnostics.summary([1.0] * 15 + [math.e] * 10)
    assert (found.tail_count, found.tail_index) == (10, pytest.approx(1.0))
    assert math.isinf(diagnostics.summary([2.0] * 25).tail_index)
    assert math.isnan(diagnostics.summary([2.0] * 24).tail_index)


def test_spikes_are_found_and_nothing_else(rng):
    norms, at = with_spikes(rng, 4000)
    assert set(diagnostics.summary(norms).spikes) >= set(at)
    false = np.mean([len(diagnostics.summary(lognormal(rng)).spikes) for _ in range(20)])
    assert false < 2  # of 1,000 steps


def test_a_spike_among_the_first_steps_is_found(rng):
    norms = lognormal(rng, 100, spread=0.1)
    norms[1] = 1e25
    assert diagnostics.summary(norms).spikes == (2,)
    assert diagnostics.summary(norms[:16]).spikes == (2,)
    assert diagnostics.summary(norms[:15]).spikes == ()  # too few to compare with


def test_constant_norms_have_spikes_from_twice_their_value_on():
    norms = np.ones(200)
    norms[[120, 150]] = 1.99, 2.01
    assert diagnostics.summary(norms).spikes == (151,)


def test_spikes_count_all_steps(rng):
    norms = np.concatenate([[np.nan, 0.0], lognormal(rng, 100, spread=0.1), [50.0]])
    assert diagnostics.summary(norms).spikes == (103,)


def test_steady_growth_is_no_spike():
    assert diagnostics.summary(1.1 ** np.arange(1000)).spikes == ()


@pytest.mark.parametrize("factor", [0.1, 1.0, 10.0])
def test_drift(rng, factor):
    norms = lognormal(rng, 400) * np.repeat([1.0, factor], 200)
    assert diagnostics.summary(norms).drift == pytest.approx(factor, rel=0.2)


def test_clipped_share_counts_finite_norms_above_the_bound():
    found = diagnostics.summary([0.0, 1.0, 2.0, 4.0, np.inf])
    assert found.clipped_share(1.0) == 2 / 5  # a norm at the bound is not clipped, nor is one that is infinite
    np.testing.assert_array_equal(found.clipped_share(np.array([[0.5, 3.0]])), [[3 / 5, 1 / 5]])
    assert isinstance(found.clipped_share(1), float)
    assert math.isnan(diagnostics.summary([]).clipped_share(1.0))


def test_clipped_share_is_what_a_clipper_does(rng):
    state = recorded(lognormal(rng, 50), optaxclip.clip_by_global_norm(1.5, record=50))
    found = diagnostics.summary(diagnostics.from_state(state))
    assert found.clipped_share(1.5) == pytest.approx(optaxclip.clip_stats(state)["clipped_share"])


def test_long_histories_are_judged_in_parts(rng, monkeypatch):
    norms, _ = with_spikes(rng, 500)
    whole = diagnostics.summary(norms).spikes
    monkeypatch.setattr("optaxclip.diagnostics.summaries._AT_ONCE", 100)
    assert diagnostics.summary(norms).spikes == whole


def test_results_are_frozen():
    for each in (diagnostics.summary([1.0]), diagnostics.advise([1.0])):
        with pytest.raises(dataclasses.FrozenInstanceError):
            each.steps = 2
    with pytest.raises(TypeError):
        diagnostics.summary([1.0]).percentiles[50] = 2.0


@pytest.mark.parametrize("norms", [np.arange(3, dtype=ml_dtypes.bfloat16), jnp.arange(3), range(3), (0.0, 1.0, 2.0)])
def test_every_kind_of_vector_is_a_history(norms):
    np.testing.assert_array_equal(diagnostics.summary(norms).norms, [0.0, 1.0, 2.0])


@pytest.mark.parametrize(
    ("norms", "complaint"),
    [
        (1.0, r"shape \(\)"),
        ([[1.0]], r"shape \(1, 1\)"),
        (["a"], "of <U1"),
        ([1j], "of complex128"),
        ([True], "of bool"),
        ([1.0, -2.0], "at least 0, got -2 in step 2"),
    ],
)
@pytest.mark.parametrize("function", [diagnostics.summary, diagnostics.advise])
def test_what_is_no_history_is_refused(function, norms, complaint):
    with pytest.raises(ValueError, match=complaint):
        function(norms)


# The advice. Each history has an answer that is known.


def clipper(advice):
    """The clipper that is recommended, built from the text."""
    return eval(advice.method, vars(optaxclip))


def checked(advice):
    """The advice, after a look at whether it can be followed."""
    assert isinstance(clipper(advice), optax.GradientTransformation)
    assert all(re.fullmatch(r"[A-Z0-9].*\.", reason) for reason in advice.reasons)
    assert advice.tells == ("does not tell" not in advice.reasons[-1])
    return advice


def test_a_light_tail_wants_a_safety_net(rng):
    norms = lognormal(rng)
    advice = checked(diagnostics.advise(norms))
    assert advice.tells
    assert advice.bound == pytest.approx(np.percentile(norms, 99), rel=0.05)
    assert "safety net" in advice.reasons[-1]


@pytest.mark.parametrize("share", [0.003, 0.01, 0.1])
def test_spikes_want_a_bound_between_them_and_the_rest(rng, share):
    norms, _ = with_spikes(rng, share=share)
    advice = checked(diagnostics.advise(norms))
    assert advice.tells
    assert 1.5 < advice.bound < 5  # the median is 1, the 99th percentile without spikes 2.5
    assert diagnostics.summary(norms).clipped_share(advice.bound) == pytest.approx(share + 0.01, abs=0.01)


def test_a_wide_level_below_spikes_is_capped_for_adam(rng):
    norms = lognormal(rng, 4000, spread=1.8)
    norms[::100] = 1e6
    advice = checked(diagnostics.advise(norms))
    assert advice.bound == pytest.approx(20, rel=0.2)
    assert "20 times" in " ".join(advice.reasons)


@pytest.mark.parametrize("index", [1.1, 1.5])
def test_a_heavy_tail_wants_a_low_bound_and_does_not_tell_how_low(rng, index):
    advice = [checked(diagnostics.advise(pareto(rng, index, 4000))) for _ in range(10)]
    low = [each for each in advice if each.bound == pytest.approx(2 ** (1 / index), rel=0.1)]  # the median
    assert len(low) >= 9
    assert not any(each.tells for each in low)


@pytest.mark.parametrize("factor", [1, 100, 500])
@pytest.mark.parametrize("freedom", [1.5, 1.7])
def test_noise_without_a_variance_never_tells_spikes_or_not(rng, freedom, factor):
    for _ in range(10):
        norms = np.abs(rng.standard_t(freedom, 1000)) + 0.3
        norms[::100] *= factor
        assert not checked(diagnostics.advise(norms)).tells


def test_spikes_on_a_tail_with_a_variance_tell(rng):
    for _ in range(10):
        norms = np.abs(rng.standard_t(6, 1000)) + 0.3
        norms[::100] = 100.0
        assert checked(diagnostics.advise(norms)).tells


def test_a_tail_without_a_mean_does_not_tell(rng):
    advice = checked(diagnostics.advise(pareto(rng, 0.4)))
    assert not advice.tells
    assert advice.bound > 1
    assert "mean is infinite" in advice.reasons[0]


def test_a_wild_start_is_no_drift(rng):
    # As in the first 100 steps of the main job.
    norms = np.concatenate([[0.2, 1e25, 4e8, 100.0], lognormal(rng, 24) * 4, lognormal(rng, 72) * 0.4])
    found, advice = diagnostics.summary(norms), checked(diagnostics.advise(norms))
    assert found.drift < 1 / 5
    assert ("mean is infinite" in advice.reasons[0], advice.tells) == (True, False)


@pytest.mark.parametrize("factor", [0.05, 20.0])
def test_drift_wants_a_bound_that_follows(rng, factor):
    advice = checked(diagnostics.advise(lognormal(rng) * np.geomspace(1, factor, 1000)))
    assert (advice.method.startswith("zclip(max_norm="), advice.bound, advice.tells) == (True, None, True)


def test_an_explosion_after_the_first_step_wants_a_bound_near_that_and_another_record():
    advice = checked(diagnostics.advise(np.concatenate([[0.25], np.geomspace(1e25, 1e26, 399)])))
    assert (advice.method, advice.bound, advice.tells) == ("clip_by_global_norm(0.25)", 0.25, False)


@pytest.mark.parametrize("end", [[1e9] * 20, [np.nan] * 20, [np.inf] * 300])
def test_what_follows_an_explosion_is_left_out(rng, end):
    norms, _ = with_spikes(rng, 500)
    plain, advice = diagnostics.advise(norms), checked(diagnostics.advise(np.concatenate([norms, end])))
    assert advice == dataclasses.replace(plain, reasons=(advice.reasons[0], *plain.reasons))
    assert advice.reasons[0].startswith("From step 501 on")


def test_growth_from_the_start_wants_a_bound_near_the_first_norms():
    advice = checked(diagnostics.advise(1.05 ** np.arange(400)))
    assert advice.tells
    assert advice.bound == pytest.approx(1.05**3.5, abs=0.05)
    fast = checked(diagnostics.advise(1.5 ** np.arange(100)))
    assert (fast.bound, fast.tells) == (pytest.approx(1.5**3.5, abs=0.1), False)


def test_drift_goes_before_spikes(rng):
    norms = lognormal(rng) * np.geomspace(1, 20, 1000)
    norms[99::100] *= 30
    assert checked(diagnostics.advise(norms)).method.startswith("zclip")


def test_a_level_shift_by_less_than_a_thousand_is_no_explosion(rng):
    advice = diagnostics.advise(lognormal(rng) * np.repeat([1.0, 50.0], 500))
    assert advice.method.startswith("zclip")


def test_steps_that_are_not_finite_want_to_be_skipped(rng):
    norms = lognormal(rng)
    norms[::50] = np.nan
    advice = checked(diagnostics.advise(norms))
    assert advice.tells
    assert advice.reasons[0].startswith("20 of 1000 steps are not finite")
    assert "skip_nonfinite" in advice.reasons[0]


@pytest.mark.parametrize(
    ("norms", "why"),
    [
        ([], "of 0 steps"),
        (np.linspace(1, 2, 63), "63 others are fewer than 64"),
        (np.full(500, 2.0), "100% of the norms are the largest one, 2"),
        (np.minimum(np.linspace(0.5, 1.5, 500), 1.0), "50% of the norms are the largest one, 1"),
        (np.full(500, np.nan), "500 are not finite"),
        (np.tile([1.0, np.nan, 2.0, np.nan, np.nan], 100), "fewer than half"),
        (np.zeros(500), "500 are 0"),
    ],
    ids=["empty", "short", "constant", "clipped", "nan", "mostly-nan", "zero"],
)
def test_a_history_that_does_not_tell(norms, why):
    advice = checked(diagnostics.advise(norms))
    assert (advice.bound, advice.tells) == (None, False)
    assert why in advice.reasons[-1]


@pytest.mark.parametrize("scale", [1e-25, 1e-6, 1e6, 1e25])
def test_the_advice_has_the_scale_of_the_norms(rng, scale):
    norms, _ = with_spikes(rng)
    assert diagnostics.advise(scale * norms).bound == pytest.approx(
        scale * diagnostics.advise(norms).bound, rel=1e-6, abs=0
    )


# Where histories come from.


def recorded(norms, tx):
    """The state after gradients of these norms."""
    update, state = jax.jit(tx.update), tx.init({"w": jnp.zeros(1)})
    for norm in norms:
        _, state = update({"w": jnp.array([norm], jnp.float32)}, state)
    return state


def test_from_state_has_the_last_steps_before_the_clip():
    tx = optax.chain(optaxclip.clip_by_global_norm(1.0, record=3), optax.adam(1e-3))
    np.testing.assert_array_equal(diagnostics.from_state(recorded([1, 2, np.inf, 4], tx)), [2, np.inf, 4])
    np.testing.assert_array_equal(diagnostics.from_state(recorded([5], tx)), [5])


def test_from_state_wants_to_know_which_of_several_records():
    each = optaxclip.clip_by_global_norm(1.0, record=3)
    state = recorded([2, 3], optax.chain(each, optaxclip.clip_by_leaf_norm(0.5, record=3)))
    np.testing.assert_allclose(diagnostics.from_state(state, place="1"), [1, 1])
    for place in ("", "2"):
        with pytest.raises(ValueError, match="place must be one of '0', '1'"):
            diagnostics.from_state(state, place=place)


def test_from_state_wants_to_know_which_of_several_groups():
    tx = optaxclip.clip_by_leaf_norm(1.0, record=3)
    _, state = tx.update({"a": np.float32([3, 4]), "b": np.float32([2])}, tx.init({"a": np.zeros(2), "b": np.zeros(1)}))
    np.testing.assert_allclose(diagnostics.from_state(state, group="b"), [2])
    for group in ("", "c"):
        with pytest.raises(ValueError, match=r"group must be one of 'a', 'b', or record the global norm"):
            diagnostics.from_state(state, group=group)


@pytest.mark.parametrize("norms", [{"clip_norm": 1.0}, [np.ones(2), np.ones(3)], optaxclip.clip_by_global_norm])
def test_what_is_no_vector_is_told_where_to_go(norms):
    with pytest.raises(ValueError, match=r"vector of real numbers.*from_state\(opt_state\)"):
        diagnostics.advise(norms)


def test_from_state_without_a_record():
    with pytest.raises(ValueError, match=r"record=k"):
        diagnostics.from_state(recorded([1], optaxclip.clip_by_global_norm(1.0)))


def written(tmp_path, content):
    path = tmp_path / "norms.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    "content",
    [
        "norm\n0.5\ninf\nnan\n2\n",
        "anything\r\n0.5\r\ninf\r\nnan\r\n2",
        '\ufeff"step", grad_norm ,loss\n1,0.5,\n2, inf ,x\n\n3,nan,3\n4,2e0,3\n',
        "row,norm,global_norm\n1,0.5,0\n2,inf,0\n3,nan,0\n4,2,0\n",  # numbers of lines, not names of clippers
    ],
)
def test_read_csv(tmp_path, content):
    np.testing.assert_array_equal(diagnostics.read_csv(written(tmp_path, content)), [0.5, np.inf, np.nan, 2.0])


def main_job(tmp_path):
    """A steps.csv of two clippers, as the main job writes it."""
    path = tmp_path / "steps.csv"
    lines = [
        Line(name, f"{name}()", Result(2.0, 0, None, History(norms, norms, None, None, None)), None)
        for name, norms in {"none": np.array([0.1, 1e30]), "zclip": np.array([3.0, np.nan, 5.0])}.items()
    ]
    csv_files.write_steps(path, lines)
    return path


def test_read_csv_of_the_main_job(tmp_path):
    path = main_job(tmp_path)
    np.testing.assert_allclose(diagnostics.read_csv(path, clipper="none"), [0.1, 1e30])
    np.testing.assert_array_equal(diagnostics.read_csv(str(path), clipper="zclip"), [3.0, np.nan, 5.0])
    with pytest.raises(ValueError, match=r"steps of 2 clippers; choose one: 'none', 'zclip'"):
        diagnostics.read_csv(path)
    with pytest.raises(ValueError, match=r"column 'row': no 'clip'; there is 'none', 'zclip'"):
        diagnostics.read_csv(path, clipper="clip")


BAD = {
    "missing": (None, "cannot read '{path}': No such file or directory"),
    "latin": (b"norm\n1\n\xff\n", "'{path}', line 3: not UTF-8: invalid start byte at byte 7"),
    "empty": ("", "'{path}' is empty"),
    "blank": ("\n\n", "'{path}' is empty"),
    "header-only": ("norm\n", "'{path}' has no line below its header, line 1"),
    "no-header": ("0.5\n0.6\n", "'{path}', line 1: the header is missing, the file begins with '0.5'"),
    "no-column": (
        "a,b\n1,2\n",
        "'{path}', line 1: no column of norms; one must be called 'norm', 'clip_norm', 'grad_norm', 'global_norm'",
    ),
    "underscore": ("step,norm\n1,1_0\n", "'{path}', line 2, column 'norm': '1_0' is not a number"),
    "digits": ("step,norm\n1,\u0661\n", "'{path}', line 2, column 'norm': '\u0661' is not a number"),
    "word": ("step,norm\n1,1\n\n2,one\n", "'{path}', line 4, column 'norm': 'one' is not a number"),
    "no-value": ("step,norm\n1,\n", "'{path}', line 2, column 'norm': '' is not a number"),
    "break": ('step,norm\n1,"a\nb"\n', "'{path}', line 3, column 'norm': 'a\\nb' is not a number"),
    "negative": ("norm\n1\n-1\n", "'{path}', line 3, column 'norm': a norm is at least 0, got '-1'"),
    "short": ("step,norm\n1\n", "'{path}', line 2, column 'norm': the line has 1 cells and the header 2"),
    "long": ("step,norm\n1,2,3\n", "'{path}', line 2, column 'norm': the line has 3 cells and the header 2"),
    "rows": ('row,step,norm\n"a\nb",1,2\nc,2,2\n', "'{path}' has steps of 2 clippers; choose one: 'a\\nb', 'c'"),
    "quote": ('norm\n"1"x\n', "'{path}', line 2: "),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_by_function_and_command_in_one_line(capsys, tmp_path, case):
    content, complaint = BAD[case]
    path = tmp_path / "norms.csv" if content is None else written(tmp_path, content)
    complaint = complaint.format(path=path)
    with pytest.raises(ValueError, match=re.escape(complaint)):
        diagnostics.read_csv(path)
    refused(capsys, complaint, path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_clipper_is_refused_where_the_file_names_none(tmp_path):
    with pytest.raises(ValueError, match=r"line 1: no columns 'row' and 'step' in which to look for 'zclip'"):
        diagnostics.read_csv(written(tmp_path, "norm\n1\n"), clipper="zclip")


# The command.


def run(capsys, *arguments):
    return commands.run(capsys, "advise", *arguments)


def refused(capsys, complaint, *arguments):
    commands.assert_refused(capsys, complaint, "advise", *arguments)


def as_csv(tmp_path, norms):
    return written(tmp_path, "norm\n" + "".join(f"{norm!r}\n" for norm in map(float, norms)))


def test_the_command_prints_summary_candidates_and_advice(capsys, tmp_path, rng):
    norms, at = with_spikes(rng)
    code, out, err = run(capsys, as_csv(tmp_path, norms))
    assert (code, err) == (0, "")
    found, advice = diagnostics.summary(norms), diagnostics.advise(norms)
    summary, candidates, said = out.strip().split("\n\n")
    assert "1000, of which 0 not finite, 0 zero" in summary
    assert f"{len(found.spikes)} (" in summary
    assert str(at[0]) in summary
    lines = [line.split() for line in candidates.splitlines()[2:]]
    assert len({line[0] for line in lines}) == len(lines) >= 4
    assert all(share == f"{found.clipped_share(float(bound)):.1%}" for bound, share, *_ in lines)
    assert [line[0] for line in lines if line[-1] == "<"] == [f"{advice.bound:g}"]
    assert said.splitlines() == [f"Advice: {advice.method}", *(f"- {reason}" for reason in advice.reasons)]


@pytest.mark.parametrize("norms", [[np.nan] * 5, [0.0], [1.0], [1e-30, 1e30] * 50, np.geomspace(1, 9, 99)])
def test_the_command_prints_something_for_every_history(capsys, tmp_path, norms):
    code, out, _ = run(capsys, as_csv(tmp_path, norms))
    assert code == 0
    assert diagnostics.advise(norms).method in out
    assert len(out.splitlines()) < 40


def test_the_command_chooses_a_clipper_of_the_main_job(capsys, tmp_path):
    code, out, _ = run(capsys, main_job(tmp_path), "--clipper", "zclip")
    assert (code, "3, of which 1 not finite" in out) == (0, True)
    refused(capsys, "choose one: 'none', 'zclip'", main_job(tmp_path))


def test_the_command_writes_a_figure(capsys, tmp_path, rng):
    path = as_csv(tmp_path, lognormal(rng))
    code, out, _ = run(capsys, path, "--out", tmp_path / "new" / "out")
    assert (code, out.splitlines()[-1]) == (0, f"Figure: advice.png in '{tmp_path}/new/out'")
    assert [each.name for each in (tmp_path / "new" / "out").iterdir()] == ["advice.png"]
    refused(capsys, "norms.csv': it is not a folder", path, "--out", path)
    refused(capsys, "no finite, positive norm to draw", as_csv(tmp_path, [0.0]), "--out", tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("arguments", [(), ("--out", "a"), ("a.csv", "b.csv"), ("a.csv", "--speed"), ("",)])
def test_a_bad_command_line_gives_one_line(capsys, arguments):
    refused(capsys, "", *arguments)


def test_without_matplotlib_the_extra_is_named(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = as_csv(tmp_path, np.geomspace(1, 9, 99))
    assert run(capsys, path)[0] == 0
    refused(capsys, "pip install 'optaxclip[demo]'", path, "--out", tmp_path / "out")
    with pytest.raises(ImportError, match=r"optaxclip\[demo\]"):
        diagnostics.plot([1.0], tmp_path / "a.png")
    assert [each.name for each in tmp_path.iterdir()] == ["norms.csv"]


def test_as_a_process_without_starting_jax(tmp_path):
    path = as_csv(tmp_path, np.geomspace(1, 9, 99))
    program = (
        "import sys; import optaxclip; from optaxclip.demo.command import main; from jax._src import xla_bridge\n"
        "main(); assert not xla_bridge.backends_are_initialized(); assert 'matplotlib' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "advise", str(path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "Advice: " in done.stdout


def test_the_main_job_mentions_it(capsys):
    with pytest.raises(SystemExit, match="0"):
        command.main(["--help"])
    assert "python -m optaxclip advise" in capsys.readouterr().out


# The figure.


def drawn(monkeypatch, tmp_path, norms, bound=None):
    """The figure that was saved."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: figures.append(self) or save(self, *args, **kwargs)
    )
    diagnostics.plot(norms, tmp_path / "plot.png", bound=bound)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    return figures[0]


def test_the_figure_shows_bound_spikes_and_lost_steps(monkeypatch, tmp_path, rng):
    norms, at = with_spikes(rng, 400)
    norms[100:110] = np.nan
    figure = drawn(monkeypatch, tmp_path, norms, bound=3.0)
    history, histogram, share = figure.axes
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in figure.axes)
    legend = {text.get_text() for text in history.get_legend().get_texts()}
    assert legend == {"norm", "spike", "not finite", "bound 3"}
    spikes = next(line for line in history.lines if line.get_label() == "spike")
    assert set(spikes.get_xdata()) == set(diagnostics.summary(norms).spikes) >= set(at) - set(range(101, 111))
    assert sum(bar.get_height() for bar in histogram.patches) == 390
    assert any(np.allclose(line.get_xdata(), math.log10(3)) for line in histogram.lines)
    curve = share.lines[0]
    place = np.searchsorted(curve.get_xdata(), 3.0, side="right") - 1
    assert curve.get_ydata()[place] == pytest.approx(100 * diagnostics.summary(norms).clipped_share(3.0))


def test_norms_far_beyond_the_others_do_not_squeeze_the_axes(monkeypatch, tmp_path, rng):
    norms = lognormal(rng, 300)
    norms[2] = 1e25
    history = drawn(monkeypatch, tmp_path, norms).axes[0]
    assert history.get_ylim()[1] < 1e5
    assert "beyond the axis, up to 1.0e+25" in {text.get_text() for text in history.get_legend().get_texts()}


@pytest.mark.parametrize(
    ("norms", "bound"),
    [([1.0], 2.0), ([0.0, np.nan, 2.0, np.inf], 0.0), (np.full(100, 2.0), math.inf), ([1e-40, 3e38], None)],
    ids=["one", "gaps", "constant", "wide"],
)
def test_every_history_with_a_norm_can_be_drawn(monkeypatch, tmp_path, norms, bound):
    drawn(monkeypatch, tmp_path, norms, bound)


# The main job.


@pytest.mark.slow
def test_the_advice_holds_on_the_main_job():
    outcome = benchmark.measure(corpus.language_reference(), seed=0, steps=100)
    assert all(benchmark.is_met(outcome, name) for name in benchmark.RECORDED_UNDER)
    assert all(asked.loss < 1.2 * np.median(outcome.sweep) for asked in outcome.asked.values())  # as a start it will do
