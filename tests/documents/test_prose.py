"""The documentation is short and plain: words per page and per sentence, and words to avoid.

`python -m tests.documents.prose` prints what is counted here. The limits are in that file.
"""

import pytest

from tests.documents import prose

FILES = prose.limited()


def test_pages_are_counted():
    assert len(FILES) > 20


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(prose.ROOT)))
def test_a_page_keeps_its_limits(file):
    limits, page = FILES[file], prose.counted(file)
    assert limits.words is None or page.words <= limits.words
    assert limits.lines is None or page.lines <= limits.lines
    assert limits.sentence is None or len(prose.words(page.longest)) <= limits.sentence, page.longest
    assert page.avoided == []


@pytest.mark.parametrize(
    ("markdown", "expected"),
    [
        ("# A heading\n\nOne two. Three `f(a, b, c)` five\nsix!\n\n```python\nx = 1\n```\n", [2, 2, 4]),
        ("- One entry.\n- Another, e.g. this; norm 1.5 holds.\n  It goes on.\n", [2, 6, 3]),
        ("| a table | of words |\n|---|---|\n\n:::{note}\n:class: wide\n\n[Two words](https://x.org/a)\n:::\n", [2]),
        (
            "Term\n: Its text, with $x + y$ in it.\n\n{py:obj}`optax.adam` is one. **Bold.** Then this.\n",
            [1, 6, 3, 1, 2],
        ),
    ],
)
def test_words_are_counted_per_sentence(markdown, expected):
    texts = prose.paragraphs(markdown)
    assert [len(prose.words(each)) for text in texts for each in prose.sentences(text)] == expected


def test_words_to_avoid_are_found_in_text_and_tables_and_not_in_code(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("It is dear, besides.\n\n`mend` is code. I recommend it.\n\n| so | of what optax adds |\n")
    assert [found.partition(":")[0] for found in prose.counted(page).avoided] == [
        "dear",
        "besides",
        "of what optax adds",
    ]
