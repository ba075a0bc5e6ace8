"""Links between files of the repository lead to the pages that are made of these files.

`[README](../../README.md)` works for a reader of the sources. In a file that a page includes, it would lead nowhere.
"""

import re
from typing import Any

from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.nodes import make_refnode

PAGES = {
    "README.md": "index",
    "CHANGELOG.md": "changelog",
    "CONTRIBUTING.md": "contributing",
    "notebooks/README.md": "examples",
    "optaxclip/contrib/README.md": "contrib",
    "tests/benchmarks/README.md": "benchmarks",
}


class RepositoryLinks(SphinxPostTransform):
    """Takes the links that MyST, which comes next, would not find."""

    default_priority = 8

    def run(self, **_: Any) -> None:
        """Follows those whose file is a page; the others are left, and MyST warns of them."""
        for link in list(self.document.findall(pending_xref)):
            if link.get("reftype") == "myst" and (page := _page(link["reftarget"])) in self.env.found_docs:
                assert page is not None
                link.replace_self(make_refnode(self.app.builder, link["refdoc"], page, "", link[0].deepcopy()))


def _page(target: str) -> str | None:
    path = re.sub(r"^(\.\./)+", "", target.partition("#")[0])
    return PAGES.get(path) or re.sub(r"^notebooks/(.*)\.(md|ipynb)$", r"\1", path)


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_post_transform(RepositoryLinks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
