"""The main job, `python -m optaxclip`, with few steps."""

import contextlib
import csv
import errno
import io
import itertools
import re
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
from matplotlib.text import Text

import optaxclip
from optaxclip.demo import batches, corpus, csv_files, figures, folder, job, models, picture, rows, timing, training
from optaxclip.demo.runs import runs
from optaxclip.demo.table import Line, table
from optaxclip.demo.training import History, Program, Result
from optaxclip.demo.watching import last_step_skipped, last_update_clipped, watch
from tests.support.commands import DEMO, cells
from tests.support.figures import leave_undrawn

ROOT = Path(__file__).parents[2]
FILES = {"optaxclip.png", "loss.png", "norm.png", "table.csv", "steps.csv"}
UNRECORDED = {"none", "optax.clip_by_global_norm", "clip_by_value"}  # what `clip_by` did not make
DECODER, RNN = models.DECODER, models.RECURRENT


def read(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def history(loss, norm=None, limit=None, scale=None, clipped=None, skipped=None):
    columns = (loss, loss if norm is None else norm, limit, scale)
    arrays = (None if column is None else np.asarray(column, np.float32) for column in columns)
    flags = (None if flag is None else np.asarray(flag, bool) for flag in (clipped, skipped))
    return History(*arrays, *flags)


def result(bits=2.5, nonfinite_steps=0, clipped_share=None, steps=None):
    return Result(bits, nonfinite_steps, clipped_share, steps or history([3.0, 2.5]))


def line(name="a", bits=2.5, nonfinite_steps=0, clipped_share=None, step_time=None, steps=None):
    """A line of the table of `--model rnn`, which has one optimizer."""
    return Line(name, f"{name}(1.0)", {"adam": result(bits, nonfinite_steps, clipped_share, steps)}, step_time)


def trained(*lines):
    return runs(RNN.optimizers, lines)


# A whole job.


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A job with two rows: its exit code, output, and folder. Its figures are empty files."""
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr), pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "ROUNDS", 5)
        leave_undrawn(patch)
        names = "optax.clip_by_global_norm,clip_by_global_norm"
        code = DEMO.main("--model", "rnn", "--steps", 12, "--clippers", names, "--seed", 1, "--out", out)
    return SimpleNamespace(code=code, out=stdout.getvalue(), err=stderr.getvalue(), folder=out)


def test_optax_is_lost_where_a_range_safe_norm_trains(finished):
    assert finished.code == 0
    found = cells(finished.out)
    assert list(found) == ["optax.clip_by_global_norm(1.0)", "clip_by_global_norm(1.0)"]  # in the order asked for
    assert found["optax.clip_by_global_norm(1.0)"][0] == "lost"
    bits, clipped, _ = found["clip_by_global_norm(1.0)"]
    assert float(bits) < 7
    assert 0 < float(clipped.removesuffix("%")) < 100


def test_progress_without_a_terminal_is_a_line_per_run(finished):
    done = r"(\[\d/2\] Adam, [\w.]+\(1\.0\): 12 steps in [\d.]+ s\n){2}step times, measured in [\d.]+ s\n"
    assert re.fullmatch(done, finished.err)


def test_the_folder_holds_what_is_announced_and_nothing_else(finished):
    assert {path.name for path in finished.folder.iterdir()} == FILES
    assert all(name in finished.out.splitlines()[-1] for name in FILES)


def test_table_csv_has_the_numbers_of_the_table(finished):
    lines = read(finished.folder / "table.csv")
    assert tuple(lines[0]) == csv_files.TABLE
    assert [each["row"] for each in lines] == ["adam/optax.clip_by_global_norm", "adam/clip_by_global_norm"]
    assert [int(each["nonfinite_steps"]) > 4 for each in lines] == [True, False]
    for each, (shown, printed) in zip(lines, cells(finished.out).items(), strict=True):
        bits, share, time = (
            float(each[name]) for name in ("bits_per_character", "clipped_share", "relative_step_time")
        )
        assert each["clipper"] == f"Adam, {shown}"
        assert ["lost" if np.isnan(bits) else f"{bits:.3f}", f"{share:.1%}", f"{time:.2f}x"] == printed
        assert 0.1 < time < 10  # a step is a step


def test_steps_csv_has_every_step_of_every_run(finished):
    lines = read(finished.folder / "steps.csv")
    assert tuple(lines[0]) == csv_files.STEPS
    by_row = {name: list(group) for name, group in itertools.groupby(lines, lambda each: each["row"])}
    assert all([int(each["step"]) for each in group] == list(range(1, 13)) for group in by_row.values())
    lost, global_norm = by_row["adam/optax.clip_by_global_norm"], by_row["adam/clip_by_global_norm"]

    # The first step has the same parameters and batch everywhere. One norm is logged, the other is in the record.
    assert lost[0]["loss"] == global_norm[0]["loss"]
    assert float(lost[0]["norm"]) == pytest.approx(float(global_norm[0]["norm"]), rel=1e-5)
    assert {(each["limit"], each["scale"]) for each in lost} == {("", "")}
    assert lost[-1]["loss"] == "nan"
    assert lost[-1]["clipped"] == "0"  # what was lost was not clipped, whatever became of it
    summary = read(finished.folder / "table.csv")[0]
    clipped, finite = (sum(int(each["clipped"]) for each in lost), 12 - int(summary["nonfinite_steps"]))
    assert float(summary["clipped_share"]) == pytest.approx(clipped / finite)

    for each in global_norm:
        norm, limit, scale = (float(each[name]) for name in ("norm", "limit", "scale"))
        assert limit == 1.0
        assert scale == pytest.approx(min(1.0, limit / norm), rel=1e-5)
        assert each["clipped"] == str(int(norm > limit))
    assert {each["clipped"] for each in global_norm} == {"0", "1"}


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_the_seed_decides_the_table(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(job, "relative_step_times", lambda programs, *_, **__: dict.fromkeys(programs, 1.0))
    monkeypatch.chdir(tmp_path)
    arguments = ["--model", "rnn", "--steps", "3", "--clippers", "clip_by_global_norm", "--seed"]
    first, again, other = (cells(DEMO.run(capsys, *arguments, seed)[1]) for seed in ("5", "5", "6"))
    assert first == again
    assert first != other


def pixels(folder):
    """The width and the height of each figure in a folder."""
    starts = {path.name: path.read_bytes()[:24] for path in folder.glob("*.png")}
    assert all(start.startswith(b"\x89PNG\r\n\x1a\n") for start in starts.values())
    return {name: tuple(np.frombuffer(start[16:], ">u4").tolist()) for name, start in starts.items()}


def test_as_a_process_on_a_text_with_warnings_as_errors(tmp_path):
    (tmp_path / "text.txt").write_text("\ufeffsmall text, " * 60, encoding="utf-8")
    command_line = [sys.executable, "-W", "error", "-m", "optaxclip", "--model", "rnn", "--steps=2", "--clippers=none"]
    done = subprocess.run(
        [*command_line, "--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    bits, clipped, time = cells(done.stdout)["no clipping"]
    assert float(bits) > 0
    assert (clipped, time) == ("-", "1.00x")
    assert "text.txt', 779 characters" in done.stdout  # the first of 60 marks is none of the text
    assert "\r" not in done.stdout + done.stderr  # no bar where there is no terminal
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    assert pixels(tmp_path / "out") == {"optaxclip.png": (840, 600), "loss.png": (640, 490), "norm.png": (640, 490)}
    assert {each["limit"] for each in read(tmp_path / "out" / "steps.csv")} == {""}


@pytest.mark.usefixtures("undrawn")
def test_without_out_the_picture_is_written_to_the_working_folder(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(job, "train", lambda *_args, **_kwargs: result())
    monkeypatch.setattr(job, "relative_step_times", lambda programs, *_args, **_kwargs: dict.fromkeys(programs, 1.0))
    code, out, _ = DEMO.run(capsys, "--clippers", "none")
    assert (code, out.count("2.500")) == (0, 2)  # SGD and AdamW
    assert out.endswith("\nPicture: optaxclip.png\n")
    assert [path.name for path in tmp_path.iterdir()] == ["optaxclip.png"]


# Bad input: one line, code 2, and no training.


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(job, "train", lambda *_args, **_kwargs: pytest.fail("the input is bad, and still it trains"))


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--model transformer", "--model: invalid choice: 'transformer'"),
        ("--optimizer adam", "--optimizer: --model decoder is trained with sgd or adamw, got 'adam'"),
        ("--model rnn --optimizer sgd", "--optimizer: --model rnn is trained with adam, got 'sgd'"),
        ("--learning-rate 0.1", "--learning-rate: needs one optimizer: add --optimizer sgd or adamw"),
        ("--steps 0", "--steps: must be at least 1 and less than 2**31, got 0"),
        ("--steps -3", "--steps: must be at least 1 and less than 2**31, got -3"),
        ("--steps 1.5", "--steps: must be a whole number, got '1.5'"),
        ("--learning-rate 0", "--learning-rate: must be a positive"),
        ("--learning-rate -0.1", "--learning-rate: must be a positive"),
        ("--learning-rate nan", "--learning-rate: must be a positive"),
        ("--learning-rate inf", "--learning-rate: must be a positive"),
        ("--learning-rate 1e-60", "--learning-rate: must be a positive"),
        ("--learning-rate fast", "--learning-rate: must be a positive"),
        ("--seed -1", "--seed: must be at least 0"),
        ("--seed 4294967296", "--seed: must be at least 0 and less than"),
        ("--seed today", "--seed: must be a whole number"),
        ("--clippers clipy", "no clipper is called 'clipy' (did you mean clippy?)"),
        ("--clippers none,", "no clipper is called ''"),
        ("--clippers", "expected one argument"),
        ("--text=", "--text: must not be empty"),
        ("--out=", "--out: must not be empty"),
        ("--speed 3", "unrecognized arguments"),
        ("text.txt", "unrecognized arguments"),
    ],
)
def test_a_bad_command_line_gives_one_line(capsys, arguments, complaint):
    DEMO.assert_refused(capsys, complaint, *arguments.split())


def test_a_bad_command_line_exits_with_2_as_a_process():
    done = subprocess.run(
        [sys.executable, "-m", "optaxclip", "--steps", "none"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("module", "complaint"),
    [
        ("tqdm", "tqdm: pip install 'optaxclip[demo]'"),
        ("matplotlib", "matplotlib: pip install 'optaxclip[demo]'"),
        ("pydoc_data.topics", "this Python has no pydoc_data.topics"),
    ],
)
def test_a_missing_module_gives_one_line(capsys, monkeypatch, tmp_path, module, complaint):
    monkeypatch.setitem(sys.modules, module, None)
    DEMO.assert_refused(capsys, complaint, "--steps", 1, "--out", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "text.txt': No such file or directory"),
        (b"", "text.txt' has 0 characters; at least 641 are needed"),
        (b"a" * 640, "text.txt' has 640 characters; at least 641 are needed"),
        (b"a" * 700 + b"\xff" + b"a" * 700, "text.txt' is not UTF-8: invalid start byte at byte 700"),
    ],
    ids=["missing", "empty", "short", "latin"],
)
def test_a_bad_text_gives_one_line(capsys, tmp_path, content, complaint):
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    DEMO.assert_refused(capsys, complaint, "--text", tmp_path / "text.txt", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_training")
def test_a_text_that_cannot_be_read_gives_one_line(capsys, monkeypatch, tmp_path):
    DEMO.assert_refused(capsys, f"cannot read '{tmp_path}': Is a directory", "--text", tmp_path)

    def denied(*_args, **_kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")  # root is denied nothing

    monkeypatch.setattr(Path, "read_text", denied)
    DEMO.assert_refused(capsys, "cannot read 'text.txt': Permission denied", "--text", "text.txt")


@pytest.mark.usefixtures("no_training")
def test_an_out_that_cannot_be_a_folder_gives_one_line(capsys, tmp_path):
    (tmp_path / "file").write_text("untouched", encoding="utf-8")
    DEMO.assert_refused(capsys, "file': it is not a folder", "--out", tmp_path / "file")
    DEMO.assert_refused(capsys, "below': Not a directory", "--out", tmp_path / "file" / "below")
    DEMO.assert_refused(capsys, "File name too long", "--out", tmp_path / "new" / ("a" * 300))
    (tmp_path / "out" / "loss.png").mkdir(parents=True)
    DEMO.assert_refused(capsys, "loss.png': it is a folder", "--out", tmp_path / "out")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "untouched"
    assert {path.name for path in tmp_path.rglob("*")} == {"file", "out", "loss.png"}


@pytest.mark.usefixtures("no_training")
def test_an_out_without_permission_gives_one_line(capsys, monkeypatch, tmp_path):
    def denied(*_args, **_kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")  # root is denied nothing

    monkeypatch.setattr(folder.tempfile, "mkdtemp", denied)
    DEMO.assert_refused(capsys, "out': Permission denied", "--out", tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []  # the new folders are gone again


# Ctrl-C, and a disk that fills up.


@pytest.fixture
def trains(monkeypatch, undrawn):
    """Makes that many rows train, in no time, before Ctrl-C."""

    def patch(count):
        results = iter([result()] * count)

        def train(*_args, **_kwargs):
            if (done := next(results, None)) is None:
                raise KeyboardInterrupt
            return done

        monkeypatch.setattr(job, "train", train)
        monkeypatch.setattr(job, "relative_step_times", lambda programs, *_, **__: dict.fromkeys(programs, 1.25))

    return patch


@pytest.mark.parametrize("count", [0, 2])
def test_interrupt_keeps_the_rows_that_are_finished(capsys, trains, tmp_path, count):
    trains(count)
    code, out, err = DEMO.run(capsys, "--model", "rnn", "--out", tmp_path / "new" / "out")
    assert code == 130
    assert out.count("2.500") == count
    assert err.splitlines()[-1] == f"interrupted; {count} of {len(rows.ROWS)} rows finished"
    if count:
        assert [each[-1] for each in cells(out).values()] == ["-"] * count  # not timed
        assert {path.name for path in (tmp_path / "new" / "out").iterdir()} == FILES
        assert [each["relative_step_time"] for each in read(tmp_path / "new" / "out" / "table.csv")] == [""] * count
        assert len(read(tmp_path / "new" / "out" / "steps.csv")) == 2 * count
    else:
        assert list(tmp_path.iterdir()) == []


def test_interrupt_while_timing_keeps_all_rows(capsys, monkeypatch, trains, ctrl_c, tmp_path):
    trains(1)

    def interrupted(_programs, unclipped, *, between_rounds):
        assert unclipped == "none"
        ctrl_c()
        between_rounds()
        pytest.fail("between_rounds should have raised KeyboardInterrupt")

    monkeypatch.setattr(job, "relative_step_times", interrupted)
    monkeypatch.chdir(tmp_path)
    code, out, err = DEMO.run(capsys, "--model", "rnn", "--clippers", "clip_by_leaf_norm")
    assert code == 130
    assert cells(out) == {"clip_by_leaf_norm(1.0)": ["2.500", "-", "-"]}
    assert err.endswith("interrupted; 1 of 1 rows finished\n")


def test_interrupt_waits_for_the_end_of_a_step(capsys, monkeypatch, ctrl_c, tmp_path):
    after_signal = []

    def train(*_args, report, **_kwargs):
        ctrl_c()
        after_signal.append("still here")
        report(1, 2.0)
        pytest.fail("report should have raised KeyboardInterrupt")

    monkeypatch.setattr(job, "train", train)
    monkeypatch.chdir(tmp_path)
    code, _, err = DEMO.run(capsys)
    assert (code, list(tmp_path.iterdir())) == (130, [])
    assert (code, after_signal) == (130, ["still here"])
    assert err == f"interrupted; 0 of {len(DECODER.rows)} rows finished\n"


@pytest.mark.parametrize(("signals", "names"), [(1, FILES), (2, set())], ids=["once", "twice"])
def test_interrupt_waits_for_the_files_unless_it_comes_twice(
    capsys, monkeypatch, trains, ctrl_c, tmp_path, signals, names
):
    trains(1)
    write = csv_files.write_steps

    def interrupted(*arguments):
        for _ in range(signals):
            ctrl_c()
        write(*arguments)

    monkeypatch.setattr(csv_files, "write_steps", interrupted)
    code, out, _ = DEMO.run(capsys, "--model", "rnn", "--clippers", "none", "--out", tmp_path / "out")
    assert (code, "2.500" in out) == (130, True)
    assert {path.name for path in tmp_path.glob("out/*")} == names


def test_a_full_disk_leaves_the_folder_as_it_was(capsys, monkeypatch, trains, tmp_path):
    def full(path, _lines):
        path.write_text("half", encoding="utf-8")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(csv_files, "write_steps", full)
    (tmp_path / "table.csv").write_text("old", encoding="utf-8")
    for out in (tmp_path, tmp_path / "new"):
        trains(1)
        code, printed, err = DEMO.run(capsys, "--model", "rnn", "--clippers", "none", "--out", out)
        assert (code, "2.500" in printed) == (1, True)  # the table at least is there
        assert err.splitlines()[-1].endswith(f"cannot write to '{out}': No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]
    assert (tmp_path / "table.csv").read_text(encoding="utf-8") == "old"


# The parts.


def test_list_names_every_row(capsys):
    code, out, err = DEMO.run(capsys, "--list")
    assert (code, err) == (0, "")
    assert [each.split()[0] for each in out.splitlines()] == list(rows.ROWS)


def test_a_skip_is_seen_and_leaves_the_optimizer_alone():
    optimizer = rows.ROWS["skip_spikes"].around(optax.sgd(0.5), 3)
    params = np.ones(2, np.float32)
    update, state, seen = jax.jit(optimizer.update), jax.jit(optimizer.init)(params), []
    for step in range(70):
        grads = np.full(2, np.nan if step == 1 else 1e10 if step == 69 else 0.1 + 0.01 * (step % 3), np.float32)
        updates, state = update(grads, state, params)
        seen.append(bool(last_step_skipped(state)))
    assert [step for step, skipped in enumerate(seen) if skipped] == [1, 69]
    assert updates.tolist() == [0.0, 0.0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "row", [row for row in rows.ROWS.values() if row.name != "skip_spikes"], ids=lambda row: row.name
)
def test_every_row_is_an_optimizer_whose_clip_is_seen_and_recorded(row):
    optimizer = row.around(optax.adam(0.1), 3)
    params = {"matrix": np.full((3, 2), 0.5, np.float32), "vector": np.full(2, 0.5, np.float32)}
    update, state = jax.jit(optimizer.update), jax.jit(optimizer.init)(params)
    for step in range(70):  # some look at more than sixty norms before they clip
        size = np.float32(1 + 0.1 * (step % 3))
        _, state = update({name: size * param for name, param in params.items()}, state, params)
    grads = {name: np.full_like(param, 1e10) for name, param in params.items()}
    updates, state = update(grads, state, params)
    assert all(np.all(np.isfinite(leaf) & (leaf < 0)) for leaf in map(np.asarray, jax.tree.leaves(updates)))
    clipped = last_update_clipped(state)
    assert clipped is None if row.name == "none" else bool(clipped)
    if row.name in UNRECORDED:
        with pytest.raises(ValueError, match="there is no record in this state"):
            optaxclip.clip_stats(state)
    else:
        record = optaxclip.clip_stats(state, history=True)
        assert [record[name].shape for name in ("clip_norm", "clip_limit", "clip_scale")] == [(3,)] * 3


def test_watch_sees_what_changed_and_changes_nothing():
    clip = optaxclip.clip_by_global_norm(5.0)
    watched, plain = (jax.jit(lambda x, tx=tx: tx.update(x, tx.init(x))) for tx in (watch(clip), clip))
    for updates, expected in [([3.0, 4.0], False), ([6.0, 8.0], True), ([np.nan, 8.0], False), ([0.0, 0.0], False)]:
        before = np.array(updates, np.float32)
        after, state = watched(before)
        np.testing.assert_array_equal(after, plain(before)[0])
        assert bool(last_update_clipped(state)) is expected


AXES = jax.tree_util.GetAttrKey("norm_axes")


def test_a_step_is_traced_once_donates_and_stays_on_the_device():
    optimizer = rows.ROWS["clip_by_global_norm"].around(optax.adam(0.01), 2)
    step = training._make_step(RNN, optimizer)
    run_ = jax.jit(lambda key: training._start(optimizer, RNN.init(key, 4), 2))(jax.random.key(0))
    text, key = jax.device_put(np.arange(100, dtype=np.int32) % 4), jax.random.key(1)
    with jax.transfer_guard("disallow"):
        for _ in range(3):  # one more than is logged
            before = run_
            run_, loss = step(run_, text, key)
            # The flag of `watch` and the axes of a record are only written: jit drops an argument that nothing reads.
            flat = jax.tree_util.tree_leaves_with_path(before)
            read = [leaf for path, leaf in flat if not (leaf.dtype == bool and leaf.ndim == 0) and path[-1] != AXES]
            assert all(leaf.is_deleted() for leaf in read)
    assert step._cache_size() == 1
    assert int(run_.step) == 3
    assert float(loss) not in run_.log.loss.tolist()


def test_lost_steps_are_counted_logged_and_reported_up_to_the_last():
    reports = {}
    text = corpus.from_text("a small text", "abcd" * 200)
    program = training.prepare(RNN, optax.sgd(1e30), text, steps=25, seed=0)
    lost = training.train(program, steps=25, report=reports.__setitem__)
    assert not np.isfinite(lost.bits)
    assert 20 <= lost.nonfinite_steps <= 24  # the first step is finite
    assert lost.clipped_share is None
    assert {done: np.isfinite(loss) for done, loss in reports.items()} == {1: True, 20: False, 25: False}
    assert (len(lost.history.loss), lost.history.limit, lost.history.clipped) == (25, None, None)
    assert lost.history.loss[0] == pytest.approx(reports[1])
    assert np.isfinite(lost.history.norm[0])
    assert not np.isfinite(lost.history.norm[-1])


def test_the_corpus_keeps_every_character():
    text = corpus.from_text("two alphabets", "aé" * 400)
    assert (text.alphabet, len(text.train), len(text.held_out)) == ("aé", 720, 80)
    assert "".join(text.alphabet[place] for place in [*text.train, *text.held_out]) == "aé" * 400


def test_the_shortest_text_holds_out_one_sequence():
    text = corpus.from_text("short", "a" * 641)
    assert batches.sequences(text.held_out).shape == (1, 65)
    with pytest.raises(corpus.CorpusError, match="640 characters; at least 641 are needed"):
        corpus.from_text("shorter", "a" * 640)


def test_held_out_text_is_predicted_once():
    sequences = jax.jit(batches.sequences)(np.arange(200, dtype=np.int32))
    np.testing.assert_array_equal(sequences[:, 1:].ravel(), np.arange(1, 193))


def test_step_times_are_paired_within_a_round_and_the_first_does_not_count(monkeypatch):
    now, rounds, turns = [0.0], [0], [[]]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def program(name, *costs):
        def step(done):
            turns[-1].append(name)
            now[0] += costs[rounds[0] % 2] * 2.0 ** rounds[0] if done else 1e99  # ever slower, and compiled at first
            return done + 1, jnp.zeros(())

        return Program(start=lambda: 0, step=step, held_out_loss=lambda _: 0.0)

    def next_round():
        rounds[0] += 1
        now[0] = 0.0  # or it would swallow the small numbers
        turns.append([])

    programs = {"none": program("none", 1.0, 3.0), "other": program("other", 3.0, 3.0)}
    times = timing.relative_step_times(programs, "none", between_rounds=next_round)
    assert times == {"none": 1.0, "other": 2.0}  # halfway between 3 / 1 and 3 / 3, which are equally frequent
    assert rounds[0] > 24
    assert {tuple(turn) for turn in turns[:-1]} == {("none", "other"), ("other", "none")}


@pytest.mark.usefixtures("undrawn")
def test_step_times_need_no_row_without_clipping(capsys, monkeypatch, tmp_path):
    asked = {}

    def times(programs, unclipped, **_kwargs):
        asked[unclipped] = list(programs)
        return dict.fromkeys(programs, 1.125)

    monkeypatch.setattr(job, "train", lambda *_args, **_kwargs: result())
    monkeypatch.setattr(job, "relative_step_times", times)
    monkeypatch.chdir(tmp_path)
    _, out, _ = DEMO.run(capsys, "--model", "rnn", "--clippers", "clippy")
    assert asked == {"none": ["none", "clippy"]}
    assert cells(out) == {"clippy(0.1, 0.01), last": ["2.500", "-", "1.12x"]}


def test_table_says_plainly_what_was_lost():
    lines = [
        line("good", 2.5, 0, 0.125, 1.016),
        line("bad", float("nan"), 12, None, 0.994),
        line("huge", 1e25, 0, 1.0, None),
    ]
    assert table(RNN.optimizers, lines).splitlines() == [
        "clipper    Adam bits  clipped   time",
        "---------  ---------  -------  -----",
        "good(1.0)      2.500    12.5%  1.02x",
        "bad(1.0)        lost        -  0.99x",
        "huge(1.0)    1.0e+25   100.0%      -",
    ]


@pytest.mark.parametrize("model", models.MODELS.values(), ids=models.MODELS)
def test_the_table_fits_into_80_columns(model):
    worst = dict.fromkeys(model.optimizers, result(1e25, 0, 1.0))
    lines = [Line(row.name, row.shown, worst, 10.0) for row in rows.ROWS.values()]
    assert max(map(len, table(model.optimizers, lines).splitlines())) <= 80


def test_csv_says_nan_and_inf_and_leaves_empty_what_there_is_none_of(tmp_path):
    steps = history([0.1, np.nan], norm=[16777213, np.inf], limit=[np.inf, 0.5], clipped=[False, True])
    bad = trained(line("bad", float("nan"), 1, None, None, steps))
    csv_files.write_table(tmp_path / "table.csv", bad)
    csv_files.write_steps(tmp_path / "steps.csv", bad)
    assert (tmp_path / "table.csv").read_text(encoding="utf-8").splitlines()[1:] == [
        'adam/bad,"Adam, bad(1.0)",nan,1,,'
    ]
    first, second = ((tmp_path / "steps.csv").read_text(encoding="utf-8")).splitlines()[1:]
    assert second == "adam/bad,2,nan,inf,0.5,,1,"
    _, step, loss, norm, limit, scale, clipped, skipped = first.split(",")
    assert (step, limit, scale, clipped, skipped) == ("1", "inf", "", "0", "")
    assert (np.float32(loss), norm) == (np.float32(0.1), "16777213")  # no digit is lost


# The figures.


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Both figures of some lines, as matplotlib has them before it renders."""
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_args, **_kwargs: saved.append(figure))

    def draw(lines, guess=6.0):
        figures.write_losses(tmp_path / "loss.png", trained(*lines), guess)
        figures.write_norms(tmp_path / "norm.png", trained(*lines))
        return saved

    return draw


@pytest.fixture
def pictured(monkeypatch, tmp_path):
    """The picture of some lines, as matplotlib has it: its axes by their titles."""
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_args, **_kwargs: saved.append(figure))

    def draw(lines, optimizers=DECODER.optimizers):
        picture.write_picture(tmp_path / "optaxclip.png", optimizers, lines, 6.0)
        saved[-1].draw_without_rendering()
        return {axes.get_title(loc="left"): axes for axes in saved[-1].axes}

    return draw


def curves(axes):
    return {curve.get_label(): np.asarray(curve.get_ydata()).tolist() for curve in axes.lines}


def test_the_picture_has_losses_per_optimizer_and_what_was_clipped_and_skipped_with_the_first(pictured):
    def row(name, sgd, adamw):
        return Line(name, name, {"sgd": result(steps=sgd), "adamw": result(steps=adamw)}, None)

    ours, skipped = [False, True, False], [True, False, False]
    panels = pictured(
        [
            row("none", history([5.0, 1e9, np.nan]), history([5.0, 4.0, 3.5])),
            row(
                "fixed",
                history([5.0, 4.5, 4.25], [0.5, 2.0, 1.0], [1.0] * 3, [1.0] * 3, ours),
                history([5.0, 4.0, 3.0]),
            ),
            row(
                "skip_spikes",
                history([5.0, 4.75, 4.5], [9.0, 2.0, 1.0], clipped=ours, skipped=skipped),
                history([5.0, 4.0, 2.5]),
            ),
        ]
    )
    assert list(panels) == ["SGD, learning rate 1", "AdamW, learning rate 0.003", "SGD, fixed", "SGD, skip_spikes"]
    sgd, adamw, fixed, skips = panels.values()
    np.testing.assert_array_equal(curves(sgd)["no clipping"], [5.0, 7.5, np.nan])  # at the axis' end, with its size
    assert sorted(notes(sgd)) == ["not finite from step 3 on", r"up to $1.0\times10^{9}$"]
    assert curves(adamw)["no clipping"] == [5.0, 4.0, 3.5]
    assert curves(sgd)["fixed"] == [5.0, 4.5, 4.25]
    assert (curves(fixed)["norm"], curves(fixed)["limit"]) == ([0.5, 2.0, 1.0], [1.0] * 3)
    assert (curves(skips)["norm"], "limit" in curves(skips)) == ([9.0, 2.0, 1.0], False)
    ticks = [collection.get_label() for axes in (fixed, skips) for collection in axes.collections]
    assert ticks == ["clipped steps", "skipped steps"]


def test_a_picture_of_the_unclipped_run_alone_is_one_panel(pictured):
    assert list(pictured([line("none")], RNN.optimizers)) == ["Adam, learning rate 0.03"]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def notes(axes):
    return [text.get_text() for text in axes.texts]


def test_a_lost_row_is_hatched_and_says_from_when_on(drawn):
    lost = history([6.0, 5.0, np.nan, 4.0, np.inf, np.nan], norm=[1.0, 2.0, np.nan, 3.0, np.inf, np.nan])
    back = history([6.0, 5.0, np.nan, 4.0, 3.5, 3.0])
    for figure in drawn([line("lost", steps=lost), line("back", steps=back)]):
        left, right = figure.axes
        assert notes(left) == ["not finite from step 5 on"]
        assert notes(right) == []
        spans = [[(patch.get_x(), patch.get_width()) for patch in axes.patches] for axes in (left, right)]
        assert spans == [[(2.5, 1.0), (4.5, 2.0)], [(2.5, 1.0)]]
        assert "not finite" in legend(figure)


def test_what_leaves_the_panel_is_marked_with_its_size(drawn):
    steps = [2.0] * 40
    steps[3] = 7.4e23
    losses, norms = drawn([line(steps=history(steps))])
    for figure in (losses, norms):
        (axes,) = figure.axes
        (triangle,) = (curve for curve in axes.lines if curve.get_marker() == "^")
        assert triangle.get_xdata().tolist() == [4]
        assert triangle.get_ydata()[0] == axes.get_ylim()[1] < 1e4
        assert notes(axes) == [r"up to $7.4\times10^{23}$"]
        assert "beyond the axis" in legend(figure)


def test_norms_come_with_limit_and_clipped_steps_on_a_logarithmic_axis(drawn):
    limit, clipped = [1.0, 1.5, 2.0, 1.0], [False, True, True, False]
    steps = history([3.0] * 4, norm=[0.5, 3.0, 4.0, 0.7], limit=limit, scale=[1.0, 0.5, 0.5, 1.0], clipped=clipped)
    _, norms = drawn([line(steps=steps)])
    (axes,) = norms.axes
    assert axes.get_yscale() == "log"
    curves = {curve.get_label(): curve for curve in axes.lines}
    assert curves["limit"].get_ydata().tolist() == limit
    assert curves["limit"].get_linestyle() != curves["norm"].get_linestyle()  # in black and white too
    (ticks,) = (collection for collection in axes.collections if collection.get_label() == "clipped steps")
    (path,) = ticks.get_paths()  # two steps side by side are one bar
    assert (path.vertices[:, 0].min(), path.vertices[:, 0].max()) == (1.5, 3.5)
    assert path.vertices[:, 1].max() < 0.1  # of the panel's height
    assert legend(norms) == ["norm", "limit", "clipped steps"]


@pytest.mark.parametrize(
    ("guess", "steps"),
    [
        (6.0, history([6.0], norm=[1.0])),
        (0.0, history([0.0] * 3, norm=[0.0] * 3, limit=[0.0] * 3, clipped=[False] * 3)),
        (0.0, history([np.nan] * 3, norm=[np.inf] * 3, limit=[np.inf] * 3, clipped=[True] * 3)),
        (6.0, history([3.4e38] * 3, norm=[3.4e38, 1e-38, 1e-45], limit=[3.4e38] * 3)),
    ],
    ids=["one step", "zeros", "nothing finite", "whole range"],
)
def test_any_history_can_be_drawn(drawn, guess, steps):
    """A guess takes 0 bits where the text has one character only."""
    for figure in drawn([line(steps=steps)], guess):
        figure.draw_without_rendering()
        low, high = figure.axes[0].get_ylim()
        assert -np.inf < low < high < np.inf


def test_nothing_overlaps_in_the_figures_of_all_rows(drawn):
    everything = history(
        np.append(np.full(99, 1e30), np.nan), limit=[1.0] * 100, scale=[0.1] * 100, clipped=[True] * 100
    )
    lines = [Line(row.name, row.shown, {"adam": result(steps=everything)}, None) for row in rows.ROWS.values()]
    for figure in drawn(lines):
        figure.draw_without_rendering()
        titles = {f"Adam, {row.shown}" for row in rows.ROWS.values()} | {figure.get_supxlabel(), figure.get_supylabel()}
        names = titles | set(legend(figure)) | {note for axes in figure.axes for note in notes(axes)}
        texts = [text for text in figure.findobj(Text) if text.get_text() in names]  # all but the ticks' labels
        assert {text.get_text() for text in texts} == names
        boxes = [text.get_window_extent() for text in texts]
        width, height = figure.canvas.get_width_height()
        outside = [(box.x0 < 0, box.y0 < 0, box.x1 > width, box.y1 > height) for box in boxes]
        assert not np.any(outside)
        for (one, first), (other, second) in itertools.combinations(zip(texts, boxes, strict=True), 2):
            assert not first.overlaps(second), (one.get_text(), other.get_text())
