"""The code in the how-to guides runs, and prints what is said beside it or in the block of text after it."""

import importlib.util
import re

import pytest

from tests.documents.test_readme import ROOT, blocks, run

GUIDES = {path.stem: path for path in sorted((ROOT / "notebooks" / "guides").glob("*.md")) if path.stem != "index"}
# In no extra of the tests. A block that imports one of these runs where it is installed; no other block builds on it.
ELSEWHERE = {"haiku", "jax_privacy", "tensorboardX"}


def is_missing(block):
    imported = re.findall(r"^(?:import|from) (\w+)", block, flags=re.MULTILINE)
    return any(importlib.util.find_spec(name) is None for name in ELSEWHERE.intersection(imported))


def text_after(page, block):
    """What the block of text right after a block of code says, if there is one."""
    found = re.match(r"```\n+```text\n(.*?)^```$", page.partition(block)[2], flags=re.DOTALL | re.MULTILINE)
    return found[1] if found else ""


@pytest.mark.filterwarnings("ignore:optax.global_norm is deprecated:DeprecationWarning")  # which jax-privacy calls
@pytest.mark.filterwarnings("ignore:jax.(array_ref|ArrayRef) is deprecated:DeprecationWarning")  # flax with jax 0.8
@pytest.mark.parametrize("guide", GUIDES)
def test_a_guide_runs_and_prints_what_it_says(guide, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page, namespace = GUIDES[guide].read_text(encoding="utf-8"), {"__name__": guide}
    for block in blocks(GUIDES[guide]):
        if is_missing(block):
            continue
        run(block, namespace)
        said = re.findall(r"^ *print\(.*\)  # (.+)$", block, flags=re.MULTILINE)
        assert capsys.readouterr().out == "".join(f"{line}\n" for line in said) + text_after(page, block)


def test_the_index_names_every_guide():
    index = (ROOT / "notebooks" / "guides" / "index.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"\((\w+)\.md\)", index)) == sorted(GUIDES)
