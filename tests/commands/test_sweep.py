"""`python -m tests.benchmarks.sweep`, with few steps."""

import contextlib
import csv
import io
import itertools
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib.figure import Figure

import optaxclip
from tests.benchmarks.sweep import characters, digits, figures, job, methods, programs, report, scores, tables
from tests.benchmarks.sweep.command import FILES
from tests.benchmarks.sweep.methods import METHODS, PLACES
from tests.benchmarks.sweep.programs import Outcome
from tests.benchmarks.sweep.registry import TASKS
from tests.benchmarks.sweep.tasks import Measured, Spikes, Task
from tests.support.commands import SWEEP
from tests.support.recording import record_calls
from tests.table import NOT_TRANSFORMATIONS

ROOT = Path(__file__).parents[2]
PROGRAMS = {"regression-none.json", "regression-clip_by_global_norm.json"}
RATES = TASKS["regression"].rates
SHORT = ("--tasks", "regression", "--clippers", "none,clip_by_global_norm", "--steps", 4, "--seeds", 2)

# Transformations of the library that are in no row, each with the reason.
EXCEPTIONS = {"clip_by_value": "clip(1.0), which is in one, is clip_by_value(-1.0, 1.0)"}


def read(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def contents(folder):
    """What is in the files but the figures, which hold the version of matplotlib."""
    return {name: content for name, content in files(folder).items() if not name.endswith(".png")}


# A whole sweep.


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A sweep with two methods: its exit code, output, and folder."""
    out = tmp_path_factory.mktemp("sweep") / "new" / "folder"
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        code = SWEEP.main(*SHORT, "--out", out)
    return SimpleNamespace(code=code, out=stdout.getvalue(), err=stderr.getvalue(), folder=out)


def test_a_sweep_prints_a_table_and_writes_what_it_announces(finished):
    assert finished.code == 0
    assert set(files(finished.folder)) == {*FILES, *(f"programs/{name}" for name in PROGRAMS)}
    assert all(name in finished.out.splitlines()[-1] for name in FILES)
    assert re.fullmatch(
        r"\[1/2\] regression: no clipping in [\d.]+ s\n"
        r"\[2/2\] regression: clip_by_global_norm\(1\.0\) in [\d.]+ s\n",
        finished.err,
    )
    table = read(finished.folder / "table.csv")
    assert [(line["task"], line["row"], line["clipper"]) for line in table] == [
        ("regression", "none", "no clipping"),
        ("regression", "clip_by_global_norm", "clip_by_global_norm(1.0)"),
    ]
    for line in table:
        (printed,) = (each for each in finished.out.splitlines() if each.startswith(line["clipper"]))
        assert f"{float(line['best_loss']):.3f})" in printed
        assert f"{float(line['sensitivity']):.3f} (" in printed
    markdown = (finished.folder / "table.md").read_text(encoding="utf-8").splitlines()
    assert [line.split("|")[1].strip() for line in markdown[2:]] == ["no clipping", "`clip_by_global_norm(1.0)`"]


def test_every_rate_and_seed_is_in_the_file_of_a_program(finished):
    found = json.loads((finished.folder / "programs" / "regression-none.json").read_text(encoding="utf-8"))
    assert (found["rates"], found["seeds"], found["steps"]) == (list(RATES), 2, 4)
    assert found["unspiked"] is None
    losses = np.array(found["held_out"])
    assert losses.shape == (len(RATES), 2)
    assert len(np.unique(losses)) == losses.size  # each run is one of its own
    assert np.ptp(losses[0] / losses[1]) < 0.1  # the smallest rates hardly train
    np.testing.assert_allclose(found["initial"], np.broadcast_to(losses[0], losses.shape), rtol=0.01)
    assert found["spikes"] == np.zeros((len(RATES), 2)).tolist()  # in four steps there are none


def test_figures_are_pngs_of_a_readable_size(finished):
    for name in ("sensitivities.png", "ranges.png", "losses.png"):
        start = (finished.folder / name).read_bytes()[:24]
        assert start.startswith(b"\x89PNG\r\n\x1a\n")
        assert np.all(np.frombuffer(start[16:], ">u4") > 200)


@pytest.mark.usefixtures("undrawn")
def test_a_second_sweep_trains_nothing_and_prints_the_same(capsys, monkeypatch, finished):
    before = contents(finished.folder)
    for name in ("train", "prepare"):
        monkeypatch.setattr(job, name, lambda *_args, **_kwargs: pytest.fail("all of it was finished"))
    code, out, err = SWEEP.run(capsys, *SHORT, "--out", finished.folder)
    assert (code, err) == (0, "")
    assert out == finished.out.replace("0 of 2 programs finished", "2 of 2 programs finished")
    assert contents(finished.folder) == before


@pytest.mark.parametrize("changed", [("--steps", 5), ("--seeds", 1)])
def test_other_settings_are_refused_and_nothing_is_changed(capsys, monkeypatch, finished, changed):
    before = files(finished.folder)
    monkeypatch.setattr(job, "train", lambda *_args: pytest.fail("the settings are others, and still it trains"))
    name = changed[0].removeprefix("--")
    complaint = f"regression-none.json' has other settings ({name} "
    SWEEP.assert_refused(capsys, complaint, *SHORT, *changed, "--out", finished.folder)
    assert files(finished.folder) == before


# Resumed. What trains is replaced, so that these compile nothing.


@pytest.fixture
def trained(monkeypatch, undrawn):
    """The names of the methods that were trained, in order; the losses depend on the method's name."""
    names = []

    def train(prepared, method):
        names.append(method.name)
        rng = np.random.default_rng(list(method.name.encode()))
        shape = (len(prepared.task.rates), len(prepared.seen.bad))
        held_out = np.where(rng.random(shape) < 0.2, np.nan, rng.uniform(1, 2, shape))
        return program(held_out, train=rng.uniform(1, 2, shape))

    monkeypatch.setattr(job, "train", train)
    return names


def test_cut_off_and_resumed_gives_what_an_uncut_sweep_gives(capsys, monkeypatch, trained, ctrl_c, tmp_path):
    asked = ("--tasks", "regression", "--clippers", "none,clip,zclip,adagc", "--steps", 3)
    code, uncut, _ = SWEEP.run(capsys, *asked, "--out", tmp_path / "uncut")
    assert (code, trained) == (0, ["none", "clip", "zclip", "adagc"])
    trained.clear()

    train = job.train
    with monkeypatch.context() as patch:

        def interrupted(prepared, method):
            if method.name == "clip":
                ctrl_c()
            return train(prepared, method)

        patch.setattr(job, "train", interrupted)
        code, out, err = SWEEP.run(capsys, *asked, "--out", tmp_path / "cut")
    assert (code, trained) == (130, ["none", "clip"])  # the program under way is finished, and kept
    assert err.splitlines()[-1] == "interrupted; 2 of 4 programs finished; the same command goes on from there"
    assert "sensitivity" not in out
    assert set(files(tmp_path / "cut")) == {"programs/regression-none.json", "programs/regression-clip.json"}

    code, resumed, _ = SWEEP.run(capsys, *asked, "--out", tmp_path / "cut")
    assert (code, trained) == (0, ["none", "clip", "zclip", "adagc"])
    assert contents(tmp_path / "cut") == contents(tmp_path / "uncut")
    assert resumed.replace("2 of 4", "0 of 4").replace("/cut", "/uncut") == uncut


def test_more_methods_and_tasks_can_be_added(capsys, trained, tmp_path):
    asked = ("--steps", 3, "--out", tmp_path)
    SWEEP.run(capsys, "--tasks", "regression", "--clippers", "none", *asked)
    code, out, _ = SWEEP.run(capsys, "--tasks", "characters,regression", "--clippers", "clip,none", *asked)
    assert (code, trained) == (0, ["none", "clip", "none", "clip"])
    assert "1 of 4 programs finished before" in out
    table = read(tmp_path / "table.csv")
    assert [(line["task"], line["row"]) for line in table] == [
        ("characters", "clip"),
        ("characters", "none"),
        ("regression", "clip"),
        ("regression", "none"),
    ]


def test_interrupted_at_once_leaves_no_folder(capsys, monkeypatch, tmp_path):
    def interrupted(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "train", interrupted)
    code, _, err = SWEEP.run(capsys, *SHORT, "--out", tmp_path / "new" / "out")
    assert (code, list(tmp_path.iterdir())) == (130, [])
    assert "0 of 2 programs finished" in err


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"task": "regression"}', "half a fi", "[" * 200_000], ids=lambda each: each[:9]
)
def test_a_file_of_something_else_is_refused(capsys, trained, tmp_path, content):
    path = tmp_path / "programs" / "regression-none.json"
    path.parent.mkdir()
    path.write_text(content, encoding="utf-8")
    SWEEP.assert_refused(capsys, "regression-none.json' is no result of a sweep", *SHORT, "--out", tmp_path)
    assert (trained, path.read_text(encoding="utf-8")) == ([], content)


def test_a_method_that_has_other_arguments_now_is_refused(capsys, monkeypatch, trained, tmp_path):
    SWEEP.run(capsys, *SHORT, "--out", tmp_path)
    trained.clear()
    monkeypatch.setitem(METHODS, "none", METHODS["none"]._replace(shown="no clipping at all"))
    SWEEP.assert_refused(capsys, "regression-none.json' has other settings (no clipping)", *SHORT, "--out", tmp_path)
    assert trained == []


def with_rows_missing(found):
    return found | {"held_out": found["held_out"][:3]}


def with_a_number_beyond_floats(found):
    return found | {"held_out": [[10**400] * 2, *found["held_out"][1:]]}


@pytest.mark.parametrize("spoilt", [with_rows_missing, with_a_number_beyond_floats])
def test_a_file_with_other_numbers_is_refused(capsys, trained, tmp_path, spoilt):
    SWEEP.run(capsys, *SHORT, "--out", tmp_path)
    path = tmp_path / "programs" / "regression-none.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(spoilt(content)), encoding="utf-8")
    trained.clear()
    SWEEP.assert_refused(capsys, "regression-none.json' is no result of a sweep", *SHORT, "--out", tmp_path)
    assert trained == []


def test_another_precision_is_refused(capsys, trained, tmp_path):
    SWEEP.run(capsys, *SHORT, "--out", tmp_path)
    trained.clear()
    with jax.enable_x64(True):
        SWEEP.assert_refused(capsys, "now optaxclip", *SHORT, "--out", tmp_path)
    assert trained == []


# Bad input: one line, code 2, and no training.


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(job, "train", lambda *_args: pytest.fail("the input is bad, and still it trains"))


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--steps 0", "--steps: must be at least 1"),
        ("--steps many", "--steps: must be a whole number, got 'many'"),
        ("--seeds 0", "--seeds: must be at least 1"),
        ("--seeds 4294967296", "--seeds: must be at least 1 and less than 2**31"),
        ("--tasks digit", "no task is called 'digit' (did you mean digits?)"),
        ("--clippers clipy", "no clipper is called 'clipy' (did you mean clippy?)"),
        ("--clippers none,", "no clipper is called ''"),
        ("--out=", "--out: must not be empty"),
        ("--rates 3", "unrecognized arguments"),
    ],
)
def test_a_bad_command_line_gives_one_line(capsys, monkeypatch, tmp_path, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    SWEEP.assert_refused(capsys, complaint, *arguments.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("module", "complaint"),
    [
        ("tqdm", "tqdm: pip install 'optaxclip[demo]'"),
        ("matplotlib", "matplotlib: pip install 'optaxclip[demo]'"),
        ("sklearn.datasets", "the digits need scikit-learn: pip install -e '.[notebooks]'"),
        ("pydoc_data.topics", "this Python has no pydoc_data.topics"),
    ],
)
def test_a_missing_module_gives_one_line(capsys, monkeypatch, tmp_path, module, complaint):
    for each in (module, module.partition(".")[0]) if module.startswith("sklearn") else (module,):
        monkeypatch.setitem(sys.modules, each, None)
    task = {"pydoc_data.topics": "characters"}.get(module, "spikes" if "sklearn" in module else "regression")
    SWEEP.assert_refused(capsys, complaint, "--tasks", task, "--out", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_task_without_digits_needs_no_scikit_learn(capsys, monkeypatch, trained, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert SWEEP.run(capsys, *SHORT, "--out", tmp_path)[0] == 0
    assert trained == ["none", "clip_by_global_norm"]


def test_an_out_that_is_a_file_gives_one_line(capsys, tmp_path):
    (tmp_path / "file").write_text("untouched", encoding="utf-8")
    SWEEP.assert_refused(capsys, "file': it is not a folder", *SHORT, "--out", tmp_path / "file")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "untouched"


@pytest.mark.slow
def test_as_a_process_with_warnings_as_errors(tmp_path):
    command_line = [sys.executable, "-W", "error", "-m", "tests.benchmarks.sweep", *map(str, SHORT)]
    done = subprocess.run(
        command_line, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "sweep").iterdir()} == {*FILES, "programs"}  # the default folder


def test_list_names_every_task_and_method(capsys):
    code, out, err = SWEEP.run(capsys, "--list")
    assert (code, err) == (0, "")
    named = [line.split()[0] for line in out.splitlines() if line]
    assert named == ["Tasks", *TASKS, "Clippers", *METHODS]


# Scores, by hand.

RATE = np.array([0.01, 0.1, 1.0, 10.0])


def program(held_out, train=None, initial=9.0, spikes=0.0, unspiked=None):
    """What came of a program, by hand; an array of another shape is broadcast."""
    held_out = np.array(held_out, float)
    others = (held_out if train is None else train, initial, spikes, unspiked)
    train, initial, spikes, unspiked = (
        None if each is None else np.broadcast_to(np.array(each, float), held_out.shape) for each in others
    )
    return Outcome(train, held_out, initial, spikes, unspiked)


def test_a_range_ends_where_the_line_between_two_rates_crosses_the_limit():
    low, high, open_ended = scores.good_range(np.array([3.0, 1.0, 1.0, 1.4]), RATE, 1.2)
    assert low == pytest.approx(0.1 * 10**-0.1)  # a tenth of the way from 1 to 3
    assert high == pytest.approx(10**0.5)  # halfway from 1 to 1.4
    assert not open_ended


@pytest.mark.parametrize(
    ("medians", "expected"),
    [
        ([1.0, 1.0, 1.0, 1.0], (0.01, 10.0, True)),
        ([1.0, np.inf, np.inf, np.inf], (0.01, 0.01, True)),
        ([np.inf, 1.0, np.inf, np.inf], (0.1, 0.1, False)),  # it stays at the rate itself
        ([np.inf, 1.2, 1.0, np.inf], (0.1, 1.0, False)),  # at the limit is good
        ([1.0, np.inf, 1.1, np.inf], (0.01, 0.01, True)),  # what is good beyond a gap does not count
        ([1.2, 1.1, 1.0, np.inf], (0.01, 1.0, True)),  # to the first rate from elsewhere
        ([np.inf, 1.0, 1.1, 1.2], (0.1, 10.0, True)),  # and to the last
        ([1.3, 1.3, 1.3, 1.3], None),
        ([np.inf] * 4, None),
    ],
)
def test_ranges_at_the_ends_with_gaps_and_without_anything_good(medians, expected):
    low, high, open_ended = scores.good_range(np.array(medians), RATE, 1.2)
    if expected is None:
        assert (np.isnan(low), np.isnan(high), open_ended) == (True, True, False)
    else:
        assert (low, high, open_ended) == expected


def test_nothing_is_good_where_every_loss_of_every_method_is_lost():
    lost = scores.scores({"a": program([[np.nan]] * 4), "b": program([[np.inf]] * 4)}, RATE, None)
    for score in lost.values():
        assert (score.best_loss, score.decades, score.open_ended, score.survived) == (np.inf, 0.0, False, None)
        assert np.isnan([score.best_rate, score.spread, score.low, score.high, score.gap]).all()


def test_a_seed_that_is_lost_is_the_worst_of_the_median():
    np.testing.assert_array_equal(
        scores.median(np.array([[1.0, 2.0, 3.0], [1.0, np.nan, 3.0], [1.0, np.nan, np.inf]])), [2.0, 3.0, np.inf]
    )


def test_the_sensitivity_of_a_run_is_its_mean_distance_from_the_best_rate():
    """By hand, with Wortsman et al.'s definition: a loss above the one before the first step counts as that."""
    found = program([[4.0, 1.0], [2.0, 1.0], [100.0, np.nan], [np.nan, np.inf]], initial=[5.0, 3.0])
    np.testing.assert_allclose(scores.sensitivities(found), [(2 + 0 + 3 + 3) / 4, (0 + 0 + 2 + 2) / 4])
    assert scores.sensitivities(program([[np.nan] * 2] * 4)).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("difference", "expected"),
    [
        ([0.3, 0.2, 0.4, 0.3, 0.2], True),
        ([-0.3, -0.2, -0.4, -0.3, -0.2], True),
        ([0.3, -0.2, 0.4, -0.3, 0.2], False),
        ([0.3, 0.2, -0.01, 0.0, 0.3], False),  # the interval is that of Student's t, wider than a normal one
        ([2e-4] * 5, False),  # rounding
        ([0.0] * 5, False),
        ([3.0], False),  # one seed tells nothing
    ],
)
def test_methods_differ_if_the_interval_of_their_paired_difference_excludes_0(difference, expected):
    base = np.linspace(1, 50, len(difference))  # what the seeds differ by cancels
    assert scores.differs(base + difference, base) is expected


def test_each_method_is_compared_with_the_reference_at_its_own_best_rate():
    reference = program([[9, 9, 9], [3, 4, 5], [1, 2, 3], [9, 9, 9]])
    shifted = program([[9, 9, 9], [1, 2, 3], [9, 9, 9], [9, 9, 9]])  # as good, at another rate, and more sensitive
    found = scores.scores({"clip_by_global_norm": reference, "shifted": shifted}, RATE, None)
    assert (found["shifted"].loss_differs, found["shifted"].sensitivity_differs) == (False, True)
    itself = found["clip_by_global_norm"]
    assert (itself.loss_differs, itself.sensitivity_differs) == (None, None)


def test_spikes_are_counted_at_the_best_rate_and_before_the_clip():
    found = program([[9, 9], [2, 3]], spikes=[[50, 50], [1, 4]])
    assert scores.scores({"only": found}, RATE[:2], None)["only"].spikes == 2.5
    prepared = programs.prepare(SPIKY._replace(rates=(0.1,)), seeds=2, steps=40)
    counted = programs.train(prepared, METHODS["clip_by_global_norm"]).spikes
    assert counted.tolist() == [[8.0, 8.0]]  # one step in five is bad, and a hundred times as steep


def test_scores_of_two_methods_share_one_limit():
    found = scores.scores(
        {
            "good": program(
                [[9, 9, 9], [2, 1, 3], [2, 2, 2], [np.nan] * 3], train=[[9, 9, 9], [1, 1, 1], [0, 0, 0], [0] * 3]
            ),
            "bad": program([[9, 9, 9], [3, 3, 3], [9, 9, 9], [9, 9, 9]]),
            "lame": program([[9, 9, 9], [9, 9, 9], [2.05, np.nan, 2.05], [9, 9, 9]], train=[[1] * 3] * 4),
        },
        RATE,
        None,
    )
    good, bad, lame = found["good"], found["bad"], found["lame"]
    assert (good.best_loss, good.best_rate, good.spread, good.gap) == (2.0, 0.1, 2.0, 1.0)  # of two rates the smaller
    assert good.low == pytest.approx(0.1 * 10 ** (-0.1 / 7))  # the limit is 2.1
    assert good.high == 1.0
    assert good.decades == pytest.approx(1 + 0.1 / 7)
    assert (bad.best_loss, bad.decades) == (3.0, 0.0)
    assert (lame.best_loss, lame.best_rate, lame.spread, lame.gap) == (2.05, 1.0, np.inf, pytest.approx(1.05))
    assert 0 < lame.decades < 0.02


def test_survived_counts_the_runs_that_learn_without_spikes():
    spiked = program(
        held_out=[[1.4, 1.6], [np.nan, np.inf], [1.5, 0.1]],
        unspiked=[[1.0, 1.0], [1.0, 1.0], [2.0, np.nan]],  # the last two do not learn: a guess is 4
    )
    assert scores.survived(spiked, 4.0) == 1 / 4
    assert scores.survived(spiked, 1.0) is None  # none learns
    assert scores.survived(program(held_out=[[0.7, 0.8]], unspiked=[[0.5, 0.5]]), 4.0) == 1 / 2


# What is compared.


def transformations():
    return {name for name in optaxclip.__all__ if callable(getattr(optaxclip, name))} - set(NOT_TRANSFORMATIONS)


def test_every_transformation_of_the_library_is_in_a_row_or_has_a_reason(monkeypatch):
    built = record_calls(monkeypatch, optaxclip, transformations())
    recorded = runpy.run_path(methods.__file__)["METHODS"]  # again, with what records
    for method in recorded.values():
        method.optimizer(optax.identity(), 0.1)
    assert transformations() - built == set(EXCEPTIONS)


def test_optax_is_compared_too():
    names = ["clip", "clip_by_global_norm", "clip_by_block_rms", "adaptive_grad_clip", "apply_if_finite"]
    assert [name for name in METHODS if name.startswith("optax.")] == [f"optax.{name}" for name in names]


def test_a_method_stands_where_it_says():
    """What reaches the parameters, by the place of a clip of values at 1; the scaling multiplies by 10."""
    grads, params = {"layer": jnp.full(4, 3.0)}, {"layer": jnp.ones(4)}
    expected = {"before": 1.0, "between": 0.1, "last": 1.0, "instead": 0.1}
    found = {}
    for name in expected:
        clip = getattr(methods, f"_{name}")("name", "shown", lambda: optax.clip(1.0))
        assert clip.place == name
        optimizer = clip.optimizer(optax.scale(10.0), 0.1)
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        found[name] = -float(updates["layer"][0])
    assert found == pytest.approx(expected)
    assert {method.place for method in METHODS.values()} == set(PLACES)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_method_can_be_traced_in_every_task(task):
    if task.name in {"digits", "spikes"}:
        pytest.importorskip("sklearn", reason="the digits: pip install -e '.[notebooks]'")
    prepared = programs.prepare(task, seeds=1, steps=2)
    one_seed = jax.tree.map(lambda leaf: leaf[0], prepared.seen)
    for method in METHODS.values():
        run = programs._run(task, method)
        out, norms = jax.eval_shape(run, jnp.asarray(True), jnp.asarray(0.1), one_seed)
        assert norms.shape == (2,)
        shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (out, one_seed.params))
        assert shapes[0] == shapes[1], method.name


# A task whose gradient is what a seed sees: its parameter ends at minus the learning rate times the sum of that.

EVERY = Task(
    name="sum",
    about="",
    loss="",
    steps=1,
    optimizer="SGD",
    scaling=optax.identity,
    load=lambda: np.arange(1.0, 101.0) / 100,
    data=lambda rng, loaded: rng.permutation(loaded),
    init=lambda _rng, _data: {"layer": np.zeros(())},
    examples=len,
    batch_size=2,
    batch=lambda places, data: data[places].mean(),
    objective=lambda params, batch: params["layer"] * batch,
    measure=lambda params, data: Measured(params["layer"], params["layer"]),
)
SPIKY = EVERY._replace(spikes=Spikes(every=5, factor=100.0, spoil=lambda batch: -batch, guess=1.0))


def test_equal_seeds_see_equal_batches_whatever_the_method_and_the_rate():
    # Neither bound is reached in so few steps: what differs is the state, and what goes into the program.
    rates = (0.001, 0.01, 0.1)
    prepared = programs.prepare(EVERY._replace(rates=rates), seeds=3, steps=7)
    sums = {}
    for name in ("none", "clip_by_history", "clip"):
        held_out = programs.train(prepared, METHODS[name]).held_out
        sums[name] = -held_out / np.array(rates)[:, None]
    for found in sums.values():
        np.testing.assert_allclose(found, np.broadcast_to(sums["none"][:1], (3, 3)), rtol=1e-5)
    seeds = sums["none"][0]
    assert len(np.unique(seeds)) == 3
    data, places = np.asarray(prepared.seen.data), np.asarray(prepared.seen.places)
    by_hand = [data[seed][places[seed]].mean(axis=1).sum() for seed in range(3)]
    np.testing.assert_allclose(seeds, by_hand, rtol=1e-5)


def test_one_after_the_other_gives_what_together_gives():
    task, method = SPIKY._replace(rates=(0.01, 0.1, 1.0)), METHODS["clip"]
    expected, *found = (
        programs.train(programs.prepare(each, seeds=2, steps=6), how)
        for each, how in (
            (task, method),
            (task, method._replace(together=False)),
            (task._replace(together=False), method),
        )
    )
    assert expected.held_out.shape == (3, 2)
    for other in found:
        jax.tree.map(lambda one, same: np.testing.assert_allclose(one, same, rtol=1e-6), other, expected)


def test_a_seed_sees_the_same_again_and_beside_more_seeds():
    few, many = (programs.prepare(TASKS["regression"], seeds=seeds, steps=5).seen for seeds in (1, 3))
    first = [jax.tree.map(lambda leaf: np.asarray(leaf)[0], each) for each in (few, many)]
    jax.tree.map(np.testing.assert_array_equal, *first)


def test_one_step_in_so_many_is_bad_and_only_where_there_are_spikes():
    prepared = programs.prepare(SPIKY._replace(rates=(0.1,)), seeds=2, steps=12)
    data, places, bad = (np.asarray(getattr(prepared.seen, name)) for name in ("data", "places", "bad"))
    np.testing.assert_array_equal(bad[:, :10].reshape(2, 2, 5).sum(axis=-1), 1)
    found = programs.train(prepared, METHODS["none"])
    seen = data[np.arange(2)[:, None, None], places].mean(axis=-1)
    np.testing.assert_allclose(found.unspiked[0], -0.1 * seen.sum(axis=1), rtol=1e-5)
    np.testing.assert_allclose(found.held_out[0], -0.1 * (seen * np.where(bad, -100.0, 1.0)).sum(axis=1), rtol=1e-5)


def test_what_is_not_finite_is_nan():
    # Nine times a half of the first rate overflows.
    prepared = programs.prepare(EVERY._replace(rates=(3e38, 0.1)), seeds=1, steps=9)
    found = programs.train(prepared, METHODS["none"])
    assert (np.isnan(found.held_out[0, 0]), np.isfinite(found.held_out[1, 0])) == (True, True)


# The tasks.


def test_the_convolution_is_that_of_jax(rng):
    images = np.float32(rng.normal(size=(2, 8, 8, 3)))
    layer = {"kernel": np.float32(rng.normal(size=(3, 3, 3, 4))), "bias": np.arange(4, dtype=np.float32)}

    @jax.jit
    def both(images, layer):
        expected = jax.lax.conv_general_dilated(
            images, layer["kernel"], (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return digits._convolved(images, layer), jax.nn.relu(expected + layer["bias"][None, None, None])

    np.testing.assert_allclose(*both(images, layer), rtol=1e-4, atol=1e-5)


def test_the_network_predicts_each_character_from_those_before_it():
    data = {"train": np.arange(100) % 5, "held_out": np.arange(90) % 5, "alphabet": np.arange(5)}
    params = jax.device_put(characters._init(np.random.default_rng(0), data))
    batch = np.asarray(jax.jit(characters.CHARACTERS.batch)(np.array([3, 0]), jax.device_put(data)))
    assert batch[:, :3].tolist() == [[3, 4, 0], [0, 1, 2]]
    assert batch.shape == (2, characters.SEQUENCE + 1)
    loss, gradient = jax.jit(jax.value_and_grad(characters._objective))(params, batch)
    assert float(loss) == pytest.approx(np.log(5), rel=1e-3)  # it has learnt nothing
    # The last character is predicted, and read by none.
    gradient = jax.jit(jax.grad(characters._objective))(params, batch[:1, :3])["read"]
    assert np.flatnonzero(np.abs(gradient).sum(axis=1)).tolist() == [3, 4]


def test_the_digits_of_a_seed_are_split_and_a_tenth_of_the_labels_is_wrong():
    loaded = {"images": np.arange(1797), "labels": np.arange(1797) % 10}
    first, second = (digits._data(np.random.default_rng(seed), loaded) for seed in range(2))
    assert sorted([*first["train"][0], *first["held_out"][0]]) == list(range(1797))
    assert first["train"][0].tolist() != second["train"][0].tolist()
    for images, labels in first.values():
        assert 0.07 < np.mean(labels != images % 10) < 0.13
        assert set(labels) == set(range(10))


# Tables and figures.


def shown(found):
    """A report on hand-made losses: by task, by method."""
    tasks = [TASKS[name]._replace(rates=tuple(RATE)) for name in found]
    compared = [METHODS[name] for name in next(iter(found.values()))]
    return report.report(tasks, compared, found)


@pytest.fixture
def mixed():
    reference = program([[9, 9, 9], [1, 1, 1.4], [1, 1, 1], [1, 1, 1]], spikes=[[9, 9, 9], [3, 0, 0], [9] * 3, [9] * 3])
    tables_ = {
        "none": program([[np.nan] * 3] * 4),
        "clip_by_global_norm": reference,
        "optax.clip_by_global_norm": reference,
        "zclip": program([[9, 9, 9], [1.05, 1.05, 1.05], [1e5] * 3, [np.nan] * 3]),
        "adagc": program([[9, 9, 9], [1.2, 1.2, 1.2], [1.2, 1.2, 1.2], [1.2, 1.2, 1.2]]),
    }
    spikes = {name: losses._replace(unspiked=np.ones((4, 3))) for name, losses in tables_.items()}
    return shown({"regression": tables_, "spikes": spikes})


TABLE = [
    ["method", "regression", "spikes", "survived, spikes"],
    ["no clipping", "- (lost)", "- (lost)", "0%"],
    ["clip_by_global_norm(1.0)", "2.033 (1.000)", "2.033 (1.000)", "75%"],
    ["optax.clip_by_global_norm(1.0)", "=2.033 (=1.000)", "=2.033 (=1.000)", "75%"],
    ["zclip(2.5)", "5.963 (=1.050)", "5.963 (=1.050)", "25%"],
    ["adagc(1.05)", "- (=1.200)", "- (=1.200)", "75%"],  # a sensitivity is shown beside a comparable loss alone
]


def test_the_table_says_what_is_lost_and_what_does_not_differ(mixed):
    header, _, *lines = (re.split(r"\s{2,}", line.strip()) for line in tables.text(mixed).splitlines())
    assert [header, *lines] == TABLE


def test_the_markdown_table_has_the_same_numbers(mixed):
    printed = tables.markdown(mixed)
    header, _, *lines = ([cell.strip(" `") for cell in line.strip("|").split("|")] for line in printed.splitlines())
    assert [header, *lines] == TABLE
    assert "| no clipping |" in printed
    assert "| `zclip(2.5)` |" in printed


def test_without_the_reference_nothing_is_said_to_equal_it():
    without = shown({"regression": {"zclip": program([[1.0]] * 4)}})
    assert "=" not in tables.text(without)


def test_the_csv_has_them_unrounded(mixed, tmp_path):
    tables.write_csv(tmp_path / "table.csv", mixed)
    lines = read(tmp_path / "table.csv")
    assert [(line["task"], line["row"]) for line in lines] == list(
        itertools.product(["regression", "spikes"], mixed.scores["regression"])
    )
    assert (lines[0]["best_loss"], lines[0]["survived"], lines[1]["open_ended"]) == ("inf", "", "1")
    assert float(lines[6]["decades"]) == mixed.scores["spikes"]["clip_by_global_norm"].decades
    assert float(lines[6]["survived"]) == 0.75
    assert [line["spikes"] for line in lines[:3]] == ["nan", "1.0", "1.0"]
    assert [line["comparable"] for line in lines[:5]] == ["0", "1", "1", "1", "0"]
    assert [line["sensitivity_differs"] for line in lines[:5]] == ["1", "", "0", "1", "0"]


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """The figures that are drawn, by the name of the file."""
    saved = {}

    def saving(figure, path, **_kwargs):
        saved[Path(path).name] = figure
        figure.draw_without_rendering()

    monkeypatch.setattr(Figure, "savefig", saving)

    def draw(found):
        figures.write_sensitivities(tmp_path / "sensitivities.png", found)
        figures.write_ranges(tmp_path / "ranges.png", found)
        figures.write_losses(tmp_path / "losses.png", found)
        return saved["sensitivities.png"], saved["ranges.png"], saved["losses.png"]

    return draw


def test_the_figures_show_sensitivities_ranges_and_losses(drawn, mixed):
    sensitivities, ranges, losses = drawn(mixed)
    first = ranges.axes[0]
    assert [label.get_text() for label in first.get_yticklabels()] == [method.shown for method in mixed.methods]
    good, *_ = (line for line in first.lines if line.get_label() == "good")
    score = mixed.scores["regression"]["clip_by_global_norm"]
    assert (list(good.get_xdata()), list(good.get_ydata())) == ([score.low, score.high], [1, 1])
    crosses = [line for line in first.lines if line.get_label() == "not finite"]
    assert [len(line.get_xdata()) for line in crosses] == [4, 0, 0, 1, 0]
    assert "beyond the axis" in {text.get_text() for text in losses.legends[0].get_texts()}

    def seeds(figure):
        return [list(line.get_xdata()) for line in figure.axes[0].lines if line.get_label() == "seeds"]

    assert seeds(losses) == [[1.0, 1.4], [1.0, 1.4], [1.05, 1.05], [1.2, 1.2]]
    assert np.ravel(seeds(sensitivities)) == pytest.approx([2.0, 2.1, 2.0, 2.1, 5.9625, 5.9625])
    hollow = [line for line in sensitivities.axes[0].lines if line.get_label() == "mean, not told from it"]
    assert [list(line.get_ydata()) for line in hollow] == [[2]]


@pytest.mark.parametrize("value", [np.nan, 0.0, 1e-30, 3e38], ids=str)
def test_any_loss_can_be_drawn(drawn, value):
    for figure in drawn(shown({"regression": {"none": program([[value]] * 4)}})):
        low, high = figure.axes[0].get_xlim()
        assert -np.inf < low < high < np.inf
