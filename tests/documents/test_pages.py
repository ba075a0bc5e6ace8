"""The code on the pages of the documentation runs, and prints what the pages say."""

import re

import pytest

from tests.support.pages import ROOT, blocks, is_missing, run, said

NOTEBOOKS = ROOT / "notebooks"
PAGES = [page for page in sorted(NOTEBOOKS.glob("*.md")) if blocks(page)]


def numbers_in(text):
    return [float(number) for number in re.findall(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?", text)]


def words_in(text):
    return re.findall(r"[A-Za-z]\w*", text)


def test_there_are_pages_with_code():
    assert {"index", "install", "tutorial", "how_it_works"} <= {page.stem for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs_and_prints_what_it_says(page, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": page.stem}
    for block in blocks(page):
        if is_missing(block):
            continue
        run(block, namespace)
        printed, expected = capsys.readouterr().out, said(page, block)
        assert words_in(printed) == words_in(expected)
        assert numbers_in(printed) == pytest.approx(numbers_in(expected), rel=0.02)  # other versions round otherwise
