"""The code in the README and on the pages of the documentation runs, and prints what the pages say."""

import re

import pytest

from tests.support.pages import ROOT, blocks, is_missing, run, said

NOTEBOOKS = ROOT / "notebooks"
GUIDES = [page for page in sorted((NOTEBOOKS / "guides").glob("*.md")) if page.stem != "index"]
PAGES = [page for page in (ROOT / "README.md", *sorted(NOTEBOOKS.glob("*.md")), *GUIDES) if blocks(page)]


def numbers_in(text):
    return [float(number) for number in re.findall(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?", text)]


def words_in(text):
    return re.findall(r"[A-Za-z]\w*", text)


def test_there_are_pages_with_code():
    assert {"README", "index", "install", "tutorial", "how_it_works"} <= {page.stem for page in PAGES}
    assert set(GUIDES) <= set(PAGES)


@pytest.mark.filterwarnings("ignore:optax.global_norm is deprecated:DeprecationWarning")  # which jax-privacy calls
@pytest.mark.filterwarnings("ignore:jax.(array_ref|ArrayRef) is deprecated:DeprecationWarning")  # flax with jax 0.8
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


def test_the_index_names_every_guide():
    index = (NOTEBOOKS / "guides" / "index.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"\((\w+)\.md\)", index)) == [page.stem for page in GUIDES]
