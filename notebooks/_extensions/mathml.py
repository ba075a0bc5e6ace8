"""Formulas as MathML, which browsers draw themselves: no script, nothing to load but one font of this site's own."""

import html
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
    text = node.astext()
    rows = text if r"\\" not in text or r"\begin" in text else rf"\begin{{aligned}}{text}\end{{aligned}}"
    self.body.append(f'<div class="formula" tabindex="0">{_mathml(rows, "block")}</div>\n')
    raise nodes.SkipNode


def _mathml(latex: str, display: str) -> str:
    """What a browser draws, with the LaTeX for whoever copies or listens."""
    return convert(latex, display=display).replace("<math ", f'<math aria-label="{html.escape(latex)}" ', 1)


def _copy_font(app: Sphinx, error: Exception | None) -> None:
    if error is None and app.builder.format == "html":
        copy_asset(FONT, Path(app.outdir) / "_static" / "fonts")


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", inline_renderers=(_inline, None), block_renderers=(_display, None))
    app.config.html_math_renderer = "mathml"
    app.connect("build-finished", _copy_font)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
