"""The check of the built documentation finds what a browser would load from elsewhere."""

import pytest

from tests.documents import built_site as site

FINE = '<a href="https://x.org">x</a><link rel="next" href="a.html"><link rel="canonical" href="https://x.org/a">'
INSIDE = '<script src="a.js"></script><img src="data:image/png;base64,AA"><link rel="stylesheet" href="a.css?v=1">'


@pytest.mark.parametrize(
    ("name", "text", "faults"),
    [
        ("a.html", FINE + INSIDE, 0),
        ("a.html", '<script src="https://cdn.org/a.js"></script>', 1),
        ("a.html", '<script>import("//cdn.org/a.js"); const link = "https://x.org"</script>', 1),
        ("a.html", '<link rel="preconnect" href="https://fonts.org">', 1),
        ("a.html", '<link href="//fonts.org/a.css" rel="stylesheet">', 1),
        ("a.html", '<img srcset="a.css 1x, https://x.org/b.png 2x">', 1),
        ("a.html", '<style>@import "https://x.org/a.css"; p { background: url(http://x.org/b.png) }</style>', 2),
        ("a.html", "<p style=\"background: url('https://x.org/b.png')\">", 1),
        ("a.html", '<img src="missing.png">', 1),
        ("a.css", "/* https://x.org */ @font-face { src: local('x'), url('a.js') }", 0),
        ("a.css", "@font-face { src: url('https://x.org/f.woff2') }", 1),
        ("a.js", "// https://x.org\nlink.href = 'https://x.org'; fetch('a.css')", 0),
        ("a.js", "fetch('https://x.org/index.json')", 1),
    ],
)
def test_what_is_loaded_from_elsewhere_is_found(name, text, faults, tmp_path, monkeypatch):
    monkeypatch.setattr(site, "PAGES", [])
    for other in ("a.html", "a.css", "a.js"):
        (tmp_path / other).write_text("")
    (tmp_path / name).write_text(text)
    assert len(site.faults_of(tmp_path)) == faults


def test_a_missing_page_is_found(tmp_path):
    assert site.faults_of(tmp_path) == [f"{page}.html is missing" for page in site.PAGES]
