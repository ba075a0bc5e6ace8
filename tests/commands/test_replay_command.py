"""`python -m optaxclip replay`: clippers over the norms in a CSV file."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from optaxclip import diagnostics
from optaxclip.demo import csv_files, job, replaying, rows
from optaxclip.demo.runs import Run
from optaxclip.demo.training import History, Result
from tests.support.commands import REPLAY

ROOT = Path(__file__).parents[2]
NORMS = "step,norm\n1,1\n2,nan\n3,8.5\n4,inf\n5,0\n"


@pytest.fixture
def file(tmp_path):
    """Writes a CSV file, and returns its path."""

    def write(text):
        (tmp_path / "steps.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
        return tmp_path / "steps.csv"

    return write


def shares(text):
    """The share of the steps clipped, by clipper."""
    return dict(re.findall(r"^(\S+) +([\d.]+%)", text, flags=re.MULTILINE))


def test_a_plain_file_with_a_column_of_norms(capsys, file):
    code, out, err = REPLAY.run(capsys, file("\ufeff" + NORMS), "--clippers", "zclip,clip_by_global_norm")
    assert (code, err) == (0, "")
    found = diagnostics.replay([1, np.nan, 8.5, np.inf, 0], **{
        name: rows.ROWS[name].clipper() for name in ("zclip", "clip_by_global_norm")
    })  # fmt: skip
    assert out == f"{found}\n"
    assert shares(out)["clip_by_global_norm"] == "20.0%"
    assert "Open loop" in out


def test_the_clippers_that_it_takes_by_default_and_nothing_is_trained(capsys, file, monkeypatch):
    monkeypatch.setattr(job, "train", lambda *_args, **_kwargs: pytest.fail("it trains"))
    code, out, _ = REPLAY.run(capsys, file(NORMS))
    assert (code, list(shares(out))) == (0, replaying.CLIPPERS.split(","))


def test_steps_csv_is_replayed_row_by_row(capsys, tmp_path):
    def trained(name, norms):
        columns = np.float32(norms)
        return Run(name, name, Result(2.5, 0, None, History(columns, columns, None, None, None, None)), None)

    csv_files.write_steps(tmp_path / "steps.csv", [trained("sgd/none", [0.5, 1.5]), trained("sgd/zclip", [3.0, 4.0])])
    for name, share in (("sgd/none", "50.0%"), ("sgd/zclip", "100.0%")):
        asked = (tmp_path / "steps.csv", "--row", name, "--clippers", "clip_by_global_norm")
        code, out, _ = REPLAY.run(capsys, *asked)
        assert (code, shares(out)) == (0, {"clip_by_global_norm": share})
    REPLAY.assert_refused(
        capsys, "has several rows: choose with --row one of sgd/none, sgd/zclip", tmp_path / "steps.csv"
    )
    REPLAY.assert_refused(capsys, "no row 'clip': choose", tmp_path / "steps.csv", "--row", "clip")


def test_every_row_with_a_clipper_is_replayed_or_refused_in_one_line(capsys, file):
    given = file(NORMS)
    for name in rows.ROWS:
        code, out, err = REPLAY.run(capsys, given, "--clippers", name)
        assert (code, err.count("\n")) in {(0, 0), (2, 1)}
        assert (name in out) == (code == 0)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--clippers zclp", "no clipper is called 'zclp' (did you mean zclip?); python -m optaxclip --list names"),
        ("--clippers none", "argument --clippers: 'none' cannot be replayed"),
        ("--clippers clip_by_value", "clip_by_value must be a clipper that clip_by makes"),
        (
            "--clippers adagc",
            "adagc can't be replayed on these norms: it measures several per step, but there is one",
        ),
        ("--row none", "steps.csv' has no column 'row'"),
        ("--steps 3", "unrecognized arguments: --steps 3"),
    ],
)
def test_a_bad_command_line_gives_one_line(capsys, file, arguments, complaint):
    REPLAY.assert_refused(capsys, complaint, file(NORMS), *arguments.split())


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "steps.csv' is empty"),
        ("step,loss\n1,2\n", "must have one column 'norm', got 'step, loss'"),
        ("norm,norm\n1,2\n", "must have one column 'norm', got 'norm, norm'"),
        ("norm\n1,5\n", "line 2: more cells than the header has columns, 1"),
        ("step,norm\nx,1\n", "line 2: the step must be a whole number, got 'x'"),
        ("x" * 9999, "characters)"),
        ("norm\n", "has no line below its header"),
        ("step,norm\n1,2\n2,x\ty\n", r"line 3: the norm must be a number, got 'x\ty'"),
        ("step,norm\n1\n", "line 2: the norm must be a number, got ''"),
        ("norm\n1_0\n", "got '1_0'"),
        ("norm\n-1\n", "line 2: the norm must be at least 0, got -1"),
        ("norm\n-inf\n", "line 2: the norm must be at least 0, got -inf"),
        (b"norm\n\xff\n", "is no CSV file in UTF-8"),
        ('norm\n"' + "1" * 200_000, "is no CSV file in UTF-8: field larger than field limit"),
    ],
    ids=[
        "empty",
        "other",
        "twice",
        "comma",
        "step",
        "long",
        "header",
        "word",
        "short",
        "digits",
        "negative",
        "minus inf",
        "latin",
        "huge",
    ],
)
def test_a_bad_file_gives_one_line(capsys, file, text, complaint):
    REPLAY.assert_refused(capsys, complaint, file(text))


def test_steps_are_those_of_the_file(capsys, file):
    spiky = "".join(f"{step},{100 if step == 5030 else 1}\n" for step in range(5000, 5060))
    given = file(f"step, norm\n{spiky}")
    lines = REPLAY.run(capsys, given, "--clippers", "clip_by_global_norm")[1].splitlines()
    assert lines[0] == "Steps 5000 to 5059."
    assert [line.split()[:2] for line in lines if line.startswith("50")] == [["5030", "100"]]


def test_a_file_that_can_not_be_read_gives_one_line(capsys, tmp_path):
    REPLAY.assert_refused(capsys, "No such file or directory", tmp_path / "none.csv")
    REPLAY.assert_refused(capsys, "Is a directory", tmp_path)
    REPLAY.assert_refused(capsys, "the following arguments are required: FILE")
    REPLAY.assert_refused(capsys, "it is a device", "/dev/zero")


def test_as_a_process_with_warnings_as_errors(file):
    command_line = [sys.executable, "-W", "error", "-m", "optaxclip", "replay", file(NORMS), "--clippers", "zclip"]
    done = subprocess.run(command_line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert list(shares(done.stdout)) == ["zclip"]
