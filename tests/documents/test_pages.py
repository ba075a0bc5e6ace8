"""The code in the README and on the pages runs, and prints what is said beside it or in the text below it."""

import re

import pytest

from tests.support.marks import slow_but
from tests.support.pages import ROOT, blocks, is_missing, run, said

NOTEBOOKS = ROOT / "notebooks"
FILES = [ROOT / "README.md", *sorted(NOTEBOOKS.glob("*.md")), *sorted(NOTEBOOKS.glob("guides/*.md"))]
PAGES = {str(page.relative_to(ROOT)): page for page in FILES if blocks(page)}
# Their calls are those of tests/per_example, tests/mesh, test_backward and test_models.
SLOW = {"accumulation_and_precision", "backward", "libraries", "meshes", "per_example"}


def parts_of(text):
    """Words, with numbers that are not whole as floats."""
    parts = re.split(r"((?<![\w.])[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?(?![\w.]*\w))", text)
    return [float(part) if re.match(r"[-+]?\d+[.e]", part) else part.split() for part in parts]


def rounded(parts):
    """The same up to 2 %: other versions of jax round otherwise."""
    return [pytest.approx(part, rel=0.02) if isinstance(part, float) else part for part in parts]


def test_there_are_pages_with_code():
    names = {page.stem for page in PAGES.values()}
    guides = {page.stem for page in NOTEBOOKS.glob("guides/*.md")} - {"index"}
    assert {"README", "index", "install", "tutorial", "how_it_works"} | guides <= names


@pytest.mark.filterwarnings("ignore:optax.global_norm is deprecated:DeprecationWarning")  # which jax-privacy calls
@pytest.mark.filterwarnings("ignore:jax.(array_ref|ArrayRef) is deprecated:DeprecationWarning")  # flax with jax 0.8
@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("page", slow_but(PAGES, *(name for name, page in PAGES.items() if page.stem not in SLOW)))
def test_a_page_runs_and_prints_what_it_says(page, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": page}
    for block in blocks(PAGES[page]):
        if not is_missing(block):
            run(block, namespace)
            assert parts_of(capsys.readouterr().out) == rounded(parts_of(said(PAGES[page], block)))


def test_the_index_of_the_guides_names_every_guide():
    index = (NOTEBOOKS / "guides" / "index.md").read_text(encoding="utf-8")
    guides = {page.stem for page in NOTEBOOKS.glob("guides/*.md")} - {"index"}
    assert set(re.findall(r"\((\w+)\.md\)", index)) == guides


@pytest.mark.parametrize(
    ("printed", "equal"),
    [("a 1.01 b 3", True), ("a 1.1 b 3", False), ("a 1.0 b 4", False), ("c 1.0 b 3", False), ("a 1.0 b", False)],
)
def test_what_is_printed_may_only_differ_by_rounding(printed, equal):
    assert (parts_of(printed) == rounded(parts_of("a  1.0 b 3"))) is equal
