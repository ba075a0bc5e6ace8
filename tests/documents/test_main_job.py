"""What the README and the page on the main job say of it is what it does today."""

import re

import pytest
from PIL import Image

from optaxclip.demo import job
from tests.support.commands import DEMO, cells
from tests.support.pages import ROOT

PICTURE = ROOT / "notebooks" / "figures" / "main_job.png"
PAGE = ROOT / "notebooks" / "demo.md"


def drawn():
    """The table of the run that the picture shows, which the main job puts into the file."""
    with Image.open(PICTURE) as picture:
        return picture.text["Description"]


def bits(text):
    """From what each row shows to its bits per character: with SGD, and with AdamW."""
    return {name: (float(sgd), float(adamw)) for name, (sgd, _, adamw, *_) in cells(text).items()}


def test_the_page_has_the_table_of_the_run_in_the_picture():
    assert f"```text\n{drawn()}\n```" in PAGE.read_text(encoding="utf-8")


def test_the_readme_has_its_numbers():
    without, with_clip = (bits(drawn())[name] for name in ("no clipping", "clip_by_global_norm(1.0)"))
    said = re.search(r"([\d.]+) bits per character without[^.]*and at ([\d.]+) with", (ROOT / "README.md").read_text())
    assert said.groups() == (f"{without[0]:.2f}", f"{with_clip[0]:.2f}")


@pytest.mark.slow
def test_the_main_job_still_does_that(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(job, "relative_step_times", lambda programs, *_, **__: dict.fromkeys(programs, 1.0))
    expected = bits(drawn())
    clip = "clip_by_global_norm(1.0)"
    trained = (
        ("sgd", "none,clip_by_global_norm", {"no clipping", clip}),
        ("adamw", "clip_by_global_norm", {clip}),
    )
    for place, (optimizer, clippers, names) in enumerate(trained):
        code, out, _ = DEMO.run(capsys, "--optimizer", optimizer, "--clippers", clippers)
        assert code == 0
        found = cells(out)
        assert set(found) == names
        for name, (bits_per_character, *_) in found.items():
            # Another processor rounds otherwise.
            assert float(bits_per_character) == pytest.approx(expected[name][place], abs=0.2)
