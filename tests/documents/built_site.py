"""Checks the built documentation: browsers load nothing of it from another host, and it is complete.

    python -m sphinx -W --keep-going -b html notebooks site
    python -m tests.documents.built_site site

What a reader clicks may lead anywhere. What a page loads by itself, scripts, styles, fonts and images, must lie in the
site.
"""

import argparse
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADING = {"audio", "embed", "iframe", "img", "input", "object", "script", "source", "track", "use", "video"}
NOT_LOADED = {"alternate", "author", "canonical", "help", "license", "next", "prev", "search"}  # kinds of <link>
PAGES = ["index", "tutorial", "guides/index", "examples", "which_clipper", "api/index", "api/clippers", "search"]


class Loads(HTMLParser):
    """Collects what a page loads."""

    def __init__(self) -> None:
        """An empty collection."""
        super().__init__()
        self.urls: list[str] = []
        self._in_style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Takes the addresses of a tag."""
        given = {name: value or "" for name, value in attrs}
        self._in_style = tag == "style"
        if tag in LOADING:
            self.urls += [given[name] for name in ("src", "data", "poster", "href") if name in given]
            self.urls += [each.split()[0] for each in given.get("srcset", "").split(",") if each.strip()]
        if tag == "link" and not set(given.get("rel", "").split()) <= NOT_LOADED:
            self.urls.append(given.get("href", ""))
        self.urls += of_style(given.get("style", ""))

    def handle_data(self, data: str) -> None:
        """Takes those of a style sheet inside the page."""
        if self._in_style:
            self.urls += of_style(data)


def of_style(text: str) -> list[str]:
    """What a style sheet loads."""
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    quoted = re.findall(r"url\(\s*[\"']?([^\"')]+)", text) + re.findall(r"@import\s+[\"']([^\"']+)", text)
    return [url.strip() for url in quoted]


def of_script(text: str) -> list[str]:
    """What a script may load: addresses that it gives to whatever loads."""
    loading = r"(?:\bimport\s*\(?|\bfrom|\bfetch\(|importScripts\(|\.src\s*=|\.open\([^,()]*,)"
    return re.findall(loading + r"\s*[\"'`]((?:https?:)?//[^\"'`]+)", text)


def loaded_by(file: Path) -> list[str]:
    """All that a file of the site loads."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".css":
        return of_style(text)
    if file.suffix == ".js":
        return of_script(text)
    page = Loads()
    page.feed(text)
    return page.urls + of_script("\n".join(re.findall(r"<script\b[^>]*>(.*?)</script>", text, flags=re.DOTALL)))


def faults_of(site: Path) -> list[str]:
    """What is wrong with a site: what it loads from elsewhere, what it loads and lacks, and pages that are missing."""
    faults = [f"{page}.html is missing" for page in PAGES if not (site / f"{page}.html").is_file()]
    for file in sorted(each for each in site.rglob("*") if each.suffix in (".html", ".css", ".js")):
        if file.suffix == ".html" and "_static" in file.parts:  # a template of the theme's
            continue
        for url in dict.fromkeys(loaded_by(file)):
            parts = urlsplit(url)
            if parts.scheme == "data" or not (parts.path or parts.netloc):
                continue
            if parts.scheme or parts.netloc:
                faults.append(f"{file.relative_to(site)} loads {url}")
            elif not (file.parent / unquote(parts.path)).is_file():
                faults.append(f"{file.relative_to(site)} loads {url}, which is not there")
    return faults


def main() -> None:
    """Prints the faults of a site, and fails if there are any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path, help="what Sphinx built")
    faults = faults_of(parser.parse_args().site)
    print(*faults or ["nothing is loaded from elsewhere"], sep="\n")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
