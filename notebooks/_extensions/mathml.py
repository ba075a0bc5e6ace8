"""Formulas as MathML, which browsers draw themselves: no script, nothing to load but one font of this site's own."""

import html
import re
from pathlib import Path

import ziamath
from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util.fileutil import copy_asset
from sphinx.writers.html5 import HTML5Translator

# ziamath is here for the font that it installs: STIX Two Math, under the SIL Open Font License.
FONT = Path(ziamath.__file__).parent / "fonts" / "STIXTwoMath-Regular.ttf"


def _inline(self: HTML5Translator, node: nodes.Element) -> None:
    self.body.append(f'<span class="formula">{_mathml(node.astext(), "inline")}</span>')
    raise nodes.SkipNode


def _display(self: HTML5Translator, node: nodes.Element) -> None:
    # Equations side by side, which go below each other where there is no room.
    equations = re.split(r"\\qquad|(?<=,)\s*\\quad", node.astext())
    drawn = "".join(_mathml(each.strip(), "block") for each in equations)
    self.body.append(f'<div class="formula" tabindex="0">{drawn}</div>\n')
    raise nodes.SkipNode


# The spaces of TeX, which MathML leaves to tables of operators that suit other writing.
SPACES = [
    (r"<mo( stretchy=\"false\")?>(&#x0007C;|&#x0002F;)</mo>", r'<mo\1 lspace="0" rspace="0">\2</mo>'),  # | and /
    (r"<mo>&#x02202;</mo>", "<mi>&#x02202;</mi>"),  # the sign of a derivative
    (r"(<mo stretchy=\"false\">&#x00028;</mo>)<mo>&#x02212;", r'\1<mo form="prefix">&#x02212;'),  # (-x)
    (r"<mo>([a-z]{2,})</mo>(?=<mo stretchy=\"false\">&#x00028;)", r'<mo lspace="0.17em" rspace="0">\1</mo>'),  # max(x)
]


def _mathml(latex: str, display: str) -> str:
    """What a browser draws, with the LaTeX for whoever listens."""
    drawn = convert(latex, display=display).replace("<math ", f'<math aria-label="{html.escape(latex)}" ', 1)
    for pattern, spaced in SPACES:
        drawn = re.sub(pattern, spaced, drawn)
    return drawn


def _copy_font(app: Sphinx, error: Exception | None) -> None:
    if error is None and app.builder.format == "html":
        copy_asset(FONT, Path(app.outdir) / "_static" / "fonts")


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", inline_renderers=(_inline, None), block_renderers=(_display, None))
    app.config.html_math_renderer = "mathml"
    app.connect("build-finished", _copy_font)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
