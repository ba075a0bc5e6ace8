"""How the commands end: the exit code, and one line on stderr, whatever goes wrong."""

import errno
import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from optaxclip.demo import ending, folder, interrupts, job, memory, models, options, rows, training
from optaxclip.demo.command import FILES
from tests.benchmarks.sweep import job as sweep_job
from tests.support.commands import DEMO, SWEEP

ROOT = Path(__file__).parents[2]
COMMANDS = pytest.mark.parametrize("command", [DEMO, SWEEP], ids=lambda each: each.name)
SHORT = ["--model", "rnn", "--steps", "2", "--clippers", "none"]


class Stream:
    """A stdout that can't be written to, as a pipe without a reader, or a full disk: it buffers, as stdout does."""

    def __init__(self, error):
        self._error, self._text = error, ""

    def write(self, text):
        self._text += text

    def flush(self):
        if self._text:
            raise self._error


@COMMANDS
@pytest.mark.parametrize(
    ("number", "expected"),
    [(errno.EPIPE, (141, "")), (errno.ENOSPC, (1, "cannot write the output: No space left on device\n"))],
    ids=["closed", "full"],
)
def test_an_output_that_cannot_be_written_is_no_traceback(monkeypatch, capsys, command, number, expected):
    monkeypatch.setattr(sys, "stdout", Stream(OSError(number, os.strerror(number))))
    code = command.main("--list")
    assert (code, capsys.readouterr().err.split("error: ")[-1]) == expected


@COMMANDS
def test_help_that_cannot_be_written_is_no_traceback(monkeypatch, command):
    monkeypatch.setattr(sys, "stdout", Stream(BrokenPipeError(errno.EPIPE, "Broken pipe")))
    assert command.main("--help") == 141


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (ending.InputError("bad\nvalue"), 2),
        (ending.OutputError("disk"), 1),
        (OSError(errno.EIO, "Input/output error", "a\nb"), 1),
        (BrokenPipeError(), 141),
        (KeyboardInterrupt(), 130),
        (interrupts.Terminated(signal.SIGTERM), 143),
    ],
    ids=lambda each: type(each).__name__ if isinstance(each, BaseException) else "",
)
def test_every_end_has_a_code_and_at_most_one_line(capsys, raised, code):
    def work():
        raise raised

    assert ending.ended("name", work) == code
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.count("\n") == (code < 128)
    assert written.err.startswith("name: error: " * (code < 128))


def test_an_error_is_not_lost_behind_a_stderr_that_cannot_be_written(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Stream(OSError(errno.ENOSPC, "No space left on device")))
    assert DEMO.main("--text", "missing.txt") == 2


def test_files_are_written_although_the_reader_of_the_table_has_gone(monkeypatch, tmp_path):
    found = training.Result(2.5, 0, None, training.History(*[np.ones(2)] * 2, None, None, None, None))
    monkeypatch.setattr(job, "train", lambda *_args, **_kwargs: found)
    monkeypatch.setattr(job, "relative_step_times", lambda programs, *_args, **_kwargs: dict.fromkeys(programs, 1.0))
    closed = Stream(BrokenPipeError(errno.EPIPE, "Broken pipe"))

    def trained(self):
        monkeypatch.setattr(sys, "stdout", closed)
        run_job(self)

    run_job = job.Job.run
    monkeypatch.setattr(job.Job, "run", trained)
    assert DEMO.main(*SHORT, "--out", tmp_path / "out") == 141
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(FILES)


# Numbers.

NUMBERS = [(DEMO, "--steps"), (DEMO, "--seed"), (DEMO, "--learning-rate"), (SWEEP, "--steps"), (SWEEP, "--seeds")]


@pytest.mark.parametrize(("command", "option"), NUMBERS, ids=lambda each: getattr(each, "name", each))
@pytest.mark.parametrize(
    "value",
    [
        "-1",
        "nan",
        "-inf",
        "1e400",
        "9" * 5000,
        "1" + "0" * 400,
        "\u0661",
        "1_0",
        " 1",
        "1\n",
        "0x1",
        "1,5",
        "\ud800",
        "",
    ],
    ids=ascii,
)
def test_a_number_outside_its_range_gives_one_line(capsys, tmp_path, monkeypatch, command, option, value):
    monkeypatch.chdir(tmp_path)
    command.assert_refused(capsys, f"argument {option}: must be a", f"{option}={value}")
    assert list(tmp_path.iterdir()) == []


def test_a_message_repeats_little_of_a_long_value(capsys):
    for asked in (["--steps", "9" * 5000], ["--clippers", "a" * 5000]):
        _, _, err = DEMO.run(capsys, *asked)
        assert "(5000 characters)" in err
        assert len(err) < 300


@pytest.mark.parametrize("text", ["1", "+7", "2147483647", "007"])
def test_whole_numbers_in_range_are_taken(text):
    assert options.integer(1)(text) == int(text)


# Memory.


@pytest.mark.parametrize("out", [(), ("--out", "out")], ids=["table", "figures"])
def test_steps_that_do_not_fit_are_refused_and_the_largest_that_do_are_not(capsys, monkeypatch, tmp_path, out):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory, "free", lambda: 2.0**30)
    monkeypatch.setattr(job, "prepare", lambda *_args, **_kwargs: pytest.fail("it is about to allocate"))
    asked = ["--clippers", "none,zclip", *out, "--steps"]
    _, _, err = DEMO.run(capsys, *asked, 2_000_000_000)
    most = int(err.split("ask for at most ")[1].split(",")[0])
    DEMO.assert_refused(capsys, f"ask for at most {most}, or for fewer --clippers", *asked, most + 1)
    with pytest.raises(pytest.fail.Exception, match="about to allocate"):
        DEMO.main(*asked, most)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("asked", [("--seeds", 2**31 - 1), ("--steps", 2**31 - 1)], ids=str)
def test_a_sweep_that_does_not_fit_is_refused(capsys, monkeypatch, tmp_path, asked):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep_job, "prepare", lambda *_args, **_kwargs: pytest.fail("it is about to allocate"))
    monkeypatch.setattr(memory, "free", lambda: 2.0**36)
    SWEEP.assert_refused(capsys, "GiB is free: ask for at most ", *asked)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("row", rows.ROWS.values(), ids=rows.ROWS)
def test_no_row_logs_more_in_a_step_than_is_reckoned_with(row):
    def size(steps):
        made = jax.eval_shape(
            lambda: training._start(
                row.around(optax.adam(0.1), steps), models.RECURRENT.init(jax.random.key(0), 4), steps
            )
        )
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(made))

    assert 0 < size(2) - size(1) <= job.LOG


def test_files_without_an_end_or_too_large_are_refused(capsys, monkeypatch, tmp_path):
    DEMO.assert_refused(capsys, "cannot read '/dev/zero': it is a device", "--text", "/dev/zero")
    text = tmp_path / "text.txt"
    text.write_text("a few letters", encoding="utf-8")
    monkeypatch.setattr(memory, "free", lambda: 100.0)
    DEMO.assert_refused(capsys, "of memory, and 9.31e-08 GiB is free: cut it to at most ", "--text", text)


@pytest.mark.parametrize(
    ("meminfo", "limit", "expected"),
    [("MemTotal: 9 kB\nMemAvailable: 4 kB\n", "max\n", 4096), ("MemAvailable: 4 kB\n", "1000\n", 1000)],
)
def test_free_memory_is_what_the_machine_and_the_container_have(monkeypatch, tmp_path, meminfo, limit, expected):
    (tmp_path / "meminfo").write_text(meminfo, encoding="ascii")
    (tmp_path / "limit").write_text(limit, encoding="ascii")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUPS", (tmp_path / "missing", tmp_path / "limit"))
    assert memory.free() == expected


# Signals.


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_while_files_are_written_leaves_nothing_behind(capsys, tmp_path, name):
    number = getattr(signal, name)

    def work():
        write = folder.folder(tmp_path / "new" / "out", ["a"])
        assert list(tmp_path.iterdir()) == []  # while it trains there is nothing to clean up

        def half(where):
            (where / "a").write_text("half", encoding="utf-8")
            signal.raise_signal(number)

        write(half)
        return 0

    before = signal.getsignal(number)
    signal.signal(number, signal.SIG_DFL)
    assert ending.ended("name", work) == 128 + number
    assert signal.getsignal(number) is signal.SIG_DFL
    signal.signal(number, before)
    assert (list(tmp_path.iterdir()), capsys.readouterr()) == ([], ("", ""))


def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    folder.folder(tmp_path, ["a"])(lambda where: [(where / "a").touch(), signal.raise_signal(signal.SIGHUP)])
    assert signal.signal(signal.SIGHUP, before) is signal.SIG_IGN
    assert (tmp_path / "a").exists()


# As processes.


def process(*arguments, **options_):
    return subprocess.Popen(
        [sys.executable, "-m", "optaxclip", *map(str, arguments)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        **options_,
    )


# As `python -m optaxclip`, which says when its imports are done.
AS_THE_COMMAND = """
from optaxclip.demo import command, ending
print("imported", flush=True)
ending.end_process(command.main)
"""


def test_list_into_a_pipe_without_a_reader():
    reader, writer = os.pipe()
    os.close(reader)
    with process("--list", stdout=writer) as listing:
        os.close(writer)
        assert (listing.communicate()[1], listing.returncode) == ("", 141)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has one")
def test_list_onto_a_full_disk():
    with Path("/dev/full").open("w", encoding="utf-8") as full, process("--list", stdout=full) as listing:
        line = "python -m optaxclip: error: cannot write the output: No space left on device\n"
        assert (listing.communicate()[1], listing.returncode) == (line, 1)


def test_closed_streams():
    closed = subprocess.run(
        ["sh", "-c", '"$0" -m optaxclip --list >&-', sys.executable], cwd=ROOT, stderr=subprocess.PIPE, check=False
    )
    line = b"python -m optaxclip: error: cannot write the output: Bad file descriptor\n"
    assert (closed.returncode, closed.stderr) == (1, line)


@pytest.mark.slow
def test_closed_stderr_costs_the_progress_only(tmp_path):
    command_line = [sys.executable, *SHORT]
    done = subprocess.run(
        ["sh", "-c", '"$0" -m optaxclip "$@" 2>&-', *command_line], cwd=ROOT, stdout=subprocess.PIPE, check=False
    )
    assert (done.returncode, b"no clipping" in done.stdout) == (0, True)


def test_ctrl_c_at_the_very_end():
    last = list(rows.ROWS)[-1]
    with process("--list", stdout=subprocess.PIPE) as listing:
        while not listing.stdout.readline().startswith(f"{last} "):
            assert listing.poll() is None
        listing.send_signal(signal.SIGINT)
        assert listing.communicate() == ("", "")
    assert listing.returncode in {0, 130}


@pytest.mark.parametrize(
    ("number", "raised"),
    [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, interrupts.Terminated)],
    ids=["Ctrl-C", "SIGTERM"],
)
@pytest.mark.usefixtures("ctrl_c")
def test_a_signal_in_a_callback_of_the_garbage_collector(number, raised, capfd):
    def callback(phase, info):
        del phase, info
        gc.callbacks.remove(callback)
        signal.raise_signal(number)

    with interrupts.not_lost_in_callbacks(), interrupts.cleaned_up():
        gc.callbacks.append(callback)
        with pytest.raises(raised):  # noqa: PT012 -- it arrives after the first line
            gc.collect()
            for _ in range(1000):
                time.sleep(0.01)
    assert capfd.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize("delay", [0.2, 2, 4, 6])
def test_a_signal_at_any_moment(tmp_path, number, delay):
    # Before, while it imports jax, it is Python that answers.
    line = [sys.executable, "-c", AS_THE_COMMAND, *SHORT, "--out", str(tmp_path / "new" / "out")]
    with subprocess.Popen(
        line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    ) as running:
        assert running.stdout.readline() == "imported\n"
        time.sleep(delay)
        running.send_signal(number)
        _, err = running.communicate()
    assert running.returncode in {0, 128 + number, *([-number] if number == signal.SIGTERM else [])}
    assert "Traceback" not in err
    assert "Exception" not in err
    assert {path.name for path in (tmp_path / "new" / "out").glob("*")} in (set(), set(FILES))
    assert list(tmp_path.iterdir()) == [] or list((tmp_path / "new" / "out").iterdir())
