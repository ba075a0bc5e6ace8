"""The version stands in one place, `optaxclip.__version__`."""

import re
import tomllib

import optaxclip
from tests.support.pages import ROOT


def test_the_build_reads_the_version_of_the_package():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in settings["project"]
    assert settings["project"]["dynamic"] == ["version"]
    file = ROOT / settings["tool"]["hatch"]["version"]["path"]
    assert re.findall(r'^__version__ = "(.*)"$', file.read_text(), flags=re.MULTILINE) == [optaxclip.__version__]


def test_the_citation_has_the_version_of_the_package():
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.findall(r"^version: (.*)$", citation, flags=re.MULTILINE) == [optaxclip.__version__]
