"""Pictures of pages of the built site, in two widths, light and dark, to be looked at.

    python -m sphinx -b html notebooks site
    python -m tests.documents.screenshots site index api/clippers --out pictures

It needs Chromium (`apt-get install chromium`). Each page is drawn in full, up to `--height` pixels.
"""

import argparse
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

WIDTHS = (1280, 390)
MODES = ("light", "dark")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--virtual-time-budget=5000",
]  # fmt: skip


def draw(page: Path, picture: Path, width: int, height: int, mode: str) -> None:
    """Writes a picture of a page. Chromium's windows are at least 500 pixels wide, so a frame has the width."""
    with tempfile.TemporaryDirectory() as profile:
        frame = Path(profile) / "frame.html"
        copy = page.with_name(f"{page.stem}.{mode}.screenshot.html")  # beside the page, whose links are relative
        text = page.read_text(encoding="utf-8")
        copy.write_text(re.sub(r'localStorage\.getItem\("(mode|theme)"\)', f'"{mode}"', text), encoding="utf-8")
        frame.write_text(
            f'<body style="margin:0"><iframe src="{copy.resolve().as_uri()}" style="border:0" '
            f'width="{width}" height="{height}"></iframe></body>'
        )
        try:
            subprocess.run(
                [
                    *(shutil.which("chromium") or "chromium", *FLAGS, f"--user-data-dir={profile}/chromium"),
                    *(f"--window-size={max(width, 500)},{height}", f"--screenshot={picture}", frame.as_uri()),
                ],
                check=True,
                capture_output=True,
                timeout=120,
            )
        finally:
            copy.unlink()


def main() -> None:
    """Draws the pages that the command names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path, help="what Sphinx built")
    parser.add_argument("pages", nargs="+", help="without .html")
    parser.add_argument("--out", type=Path, default=Path("pictures"))
    parser.add_argument("--height", type=int, default=1600)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.pages:
        for width in given.widths:
            for mode in given.modes:
                picture = given.out / f"{name.replace('/', '-')}-{width}-{mode}.png"
                draw(given.site / f"{name}.html", picture.resolve(), width, given.height, mode)
                print(picture)


if __name__ == "__main__":
    main()
