"""What the README and the page on the main job say of it is what it does today."""

import re

import pytest
from PIL import Image

from optaxclip.demo import job
from tests.support.commands import DEMO
from tests.support.pages import ROOT

PICTURE = ROOT / "notebooks" / "figures" / "main_job.png"
PAGE = ROOT / "notebooks" / "demo.md"


def table_in(text):
    """The last table in a text, up to the empty line."""
    return re.findall(r"^clipper .*\n-[- ]+\n(?:.+\n)+", text, flags=re.MULTILINE)[-1].strip()


def drawn():
    """The table of the run that the picture shows, which the main job puts into the file."""
    with Image.open(PICTURE) as picture:
        return picture.text["Description"]


def bits(table):
    """From what each row shows to its bits per character: with SGD, and with AdamW."""
    rows = [re.split(r"\s{2,}", line) for line in table.splitlines()[2:]]
    return {row[0]: tuple(map(float, row[1:4:2])) for row in rows}


def test_the_page_has_the_table_of_the_run_in_the_picture():
    text = PAGE.read_text(encoding="utf-8").replace("```", "\n")
    assert table_in(re.sub(r"^text$", "", text, flags=re.MULTILINE).split("--model rnn")[0]) == drawn()


def test_the_readme_has_its_numbers():
    without, with_clip = (bits(drawn())[name] for name in ("no clipping", "clip_by_global_norm(1.0)"))
    said = re.search(r"([\d.]+) bits per character without[^.]*and at ([\d.]+) with", (ROOT / "README.md").read_text())
    assert said.groups() == (f"{without[0]:.2f}", f"{with_clip[0]:.2f}")


@pytest.mark.slow
def test_the_main_job_still_does_that(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(job, "relative_step_times", lambda programs, *_, **__: dict.fromkeys(programs, 1.0))
    code, out, _ = DEMO.run(capsys, "--clippers", "none,clip_by_global_norm")
    assert code == 0
    found, expected = bits(table_in(out)), bits(drawn())
    for name in ("no clipping", "clip_by_global_norm(1.0)"):
        assert found[name] == pytest.approx(expected[name], abs=0.2)  # another processor rounds otherwise
