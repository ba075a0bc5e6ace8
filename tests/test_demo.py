"""The main job, `python -m optaxclip`, with few steps."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip
from optaxclip.demo import command, corpus, model, rows, training
from optaxclip.demo.table import table
from optaxclip.demo.training import Result
from optaxclip.demo.watching import last_update_clipped, watch

ROOT = Path(__file__).parents[1]


def run(capsys, *arguments):
    """The exit code, and what was written to stdout and stderr."""
    try:
        code = command.main(arguments)
    except SystemExit as error:
        code = error.code
    written = capsys.readouterr()
    return code, written.out, written.err


def cells(text):
    """The table in a text: from what each row shows to its other cells."""
    body = re.split(r"^-[- ]+$", text, flags=re.MULTILINE)[1].strip().split("\n\n")[0]
    return {name: others for name, *others in (re.split(r"\s{2,}", line) for line in body.splitlines())}


def test_optax_is_lost_where_a_range_safe_norm_trains(capsys):
    code, out, err = run(
        capsys, "--steps", "12", "--clippers", "optax.clip_by_global_norm,clip_by_global_norm", "--seed", "1"
    )
    assert code == 0
    found = cells(out)
    assert list(found) == ["optax.clip_by_global_norm(1.0)", "clip_by_global_norm(1.0)"]  # in the order asked for
    bits, nonfinite, _ = found["optax.clip_by_global_norm(1.0)"]
    assert (bits, int(nonfinite) > 4) == ("lost", True)
    bits, nonfinite, clipped = found["clip_by_global_norm(1.0)"]
    assert float(bits) < 7
    assert nonfinite == "0"
    assert 0 < float(clipped.removesuffix("%")) < 100
    assert re.fullmatch(r"(\[\d/2\] [\w.]+\(1\.0\): 12 steps in [\d.]+ s\n){2}", err)


def test_the_seed_decides_the_table(capsys):
    arguments = ["--steps", "3", "--clippers", "none", "--learning-rate", "0.001", "--seed"]
    first, again, other = (cells(run(capsys, *arguments, seed)[1]) for seed in ("5", "5", "6"))
    assert first == again
    assert first != other


def test_as_a_process_with_warnings_as_errors():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "optaxclip", "--steps", "2", "--clippers", "none"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    bits, nonfinite, clipped = cells(done.stdout)["no clipping"]
    assert float(bits) > 0
    assert (nonfinite, clipped) == ("0", "-")
    assert "\r" not in done.stdout + done.stderr  # no bar where there is no terminal


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--steps 0", "--steps: must be at least 1, got 0"),
        ("--steps -3", "--steps: must be at least 1, got -3"),
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
        ("--speed 3", "unrecognized arguments"),
        ("text.txt", "unrecognized arguments"),
    ],
)
def test_bad_input_gives_one_line(capsys, arguments, complaint):
    code, out, err = run(capsys, *arguments.split())
    assert (code, out) == (2, "")
    assert err.startswith("python -m optaxclip: error: ")
    assert complaint in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("module", "complaint"),
    [("tqdm", "pip install 'optaxclip[demo]'"), ("pydoc_data.topics", "this Python has no pydoc_data.topics")],
)
def test_missing_module_gives_one_line(capsys, monkeypatch, module, complaint):
    monkeypatch.setitem(sys.modules, module, None)
    code, out, err = run(capsys, "--steps", "1")
    assert (code, out) == (2, "")
    assert complaint in err
    assert err.count("\n") == 1


def test_bad_input_exits_with_2_as_a_process():
    done = subprocess.run(
        [sys.executable, "-m", "optaxclip", "--steps", "none"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("finished", [0, 2])
def test_interrupt_keeps_the_rows_that_are_finished(capsys, monkeypatch, finished):
    results = iter([Result(2.5, 0, None)] * finished)

    def train(*_args, **_kwargs):
        if (result := next(results, None)) is None:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(command, "train", train)
    code, out, err = run(capsys)
    assert code == 130
    assert out.count("2.500") == finished
    assert err.splitlines()[-1] == f"interrupted; {finished} of {len(rows.ROWS)} rows finished"


def test_interrupt_waits_for_the_end_of_a_step(capsys, monkeypatch):
    after_signal = []

    def train(*_args, report, **_kwargs):
        signal.raise_signal(signal.SIGINT)
        after_signal.append("still here")
        report(1, 2.0)
        pytest.fail("report should have raised KeyboardInterrupt")

    monkeypatch.setattr(command, "train", train)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code, _, err = run(capsys)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert (code, after_signal) == (130, ["still here"])
    assert err == f"interrupted; 0 of {len(rows.ROWS)} rows finished\n"


def test_list_names_every_row(capsys):
    code, out, err = run(capsys, "--list")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == list(rows.ROWS)


@pytest.mark.parametrize("row", rows.ROWS.values(), ids=rows.ROWS)
def test_every_row_is_an_optimizer_whose_clip_is_seen(row):
    optimizer = row.optimizer(0.1)
    params = {"matrix": jnp.full((3, 2), 0.5), "vector": jnp.full(2, 0.5)}
    grads = jax.tree.map(lambda param: jnp.full_like(param, 1e10), params)
    updates, state = optimizer.update(grads, optimizer.init(params), params)
    assert all(jnp.all(jnp.isfinite(leaf) & (leaf < 0)) for leaf in jax.tree.leaves(updates))
    clipped = last_update_clipped(state)
    assert clipped is None if row.name == "none" else bool(clipped)


def test_watch_sees_what_changed_and_changes_nothing():
    clip = optaxclip.clip_by_global_norm(5.0)
    tx = watch(clip)
    for updates, expected in [([3.0, 4.0], False), ([6.0, 8.0], True), ([jnp.nan, 8.0], False), ([0.0, 0.0], False)]:
        before = jnp.asarray(updates)
        after, state = tx.update(before, tx.init(before))
        np.testing.assert_array_equal(after, clip.update(before, clip.init(before))[0])
        assert bool(last_update_clipped(state)) is expected


def test_a_step_is_traced_once_donates_and_stays_on_the_device():
    optimizer = rows.ROWS["clip_by_global_norm"].optimizer(0.01)
    step = training._make_step(optimizer)
    run_ = training._start(optimizer, model.init(jax.random.key(0), 4))
    text, key = jnp.arange(100) % 4, jax.random.key(1)
    with jax.transfer_guard("disallow"):
        for _ in range(3):
            before = run_
            run_, _ = step(run_, text, key)
            # The one flag in it is only written: jit drops an argument that nothing reads.
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before) if leaf.dtype != bool)
    assert step._cache_size() == 1
    assert int(run_.step) == 3


def test_lost_steps_are_counted_and_reported_up_to_the_last():
    reports = {}
    text = corpus.from_text("a small text", "abcd" * 100)
    lost = training.train(optax.sgd(1e30), text, steps=25, seed=0, report=reports.__setitem__)
    assert not np.isfinite(lost.bits)
    assert 20 <= lost.nonfinite_steps <= 24  # the first step is finite
    assert lost.clipped_share is None
    assert {done: np.isfinite(loss) for done, loss in reports.items()} == {1: True, 20: False, 25: False}


def test_the_corpus_keeps_every_character():
    text = corpus.from_text("two alphabets", "aé" * 10)
    assert (text.alphabet, len(text.train), len(text.held_out)) == ("aé", 18, 2)
    assert "".join(text.alphabet[place] for place in [*text.train, *text.held_out]) == "aé" * 10


def test_held_out_text_is_predicted_once():
    sequences = training._sequences(np.arange(200))
    np.testing.assert_array_equal(sequences[:, 1:].ravel(), np.arange(1, 193))


def test_table_says_plainly_what_was_lost():
    assert table(
        [("good", Result(2.5, 0, 0.125)), ("bad", Result(float("nan"), 12, None)), ("huge", Result(1e25, 0, 1.0))]
    ) == "\n".join(
        [
            "clipper  bits per character  non-finite steps  steps clipped",
            "-------  ------------------  ----------------  -------------",
            "good                  2.500                 0          12.5%",
            "bad                    lost                12              -",
            "huge                1.0e+25                 0         100.0%",
        ]
    )
