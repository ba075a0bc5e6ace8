"""Blocks of code in Markdown, and what the page says that they print."""

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
# In no extra of the tests. A block that imports one of these runs where it is installed; no other block builds on it.
ELSEWHERE = {"haiku", "jax_privacy", "tensorboardX"}


def blocks(page):
    """The blocks of Python on a page, a path from the root of the repository."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def run(block, namespace):
    """Runs a block in a namespace, which it returns."""
    exec(compile(block, "a block of code in the documentation", "exec"), namespace)
    return namespace


def is_missing(block):
    """Whether a block imports something of ELSEWHERE that is not installed."""
    imported = re.findall(r"^(?:import|from) (\w+)", block, flags=re.MULTILINE)
    return any(importlib.util.find_spec(name) is None for name in ELSEWHERE.intersection(imported))


def said(page, block):
    """What a page says that a block prints: behind `print(...)  # `, and in the block of text right after it."""
    beside = re.findall(r"^ *print\(.*\)  # (.+)$", block, flags=re.MULTILINE)
    text = (ROOT / page).read_text(encoding="utf-8")
    below = re.match(r"```\n+```text\n(.*?)^```$", text.partition(block)[2], flags=re.DOTALL | re.MULTILINE)
    return "".join(f"{line}\n" for line in beside) + (below[1] if below else "")
