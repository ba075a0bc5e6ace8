"""The list of mutants that `python -m tests.benchmarks.mutants` breaks the library with fits the library as it is."""

import ast

import pytest

from tests.benchmarks import mutants

MUTANTS = mutants.mutants()
LIBRARY = mutants.ROOT / "optaxclip"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda each: f"{each.part}: {each.name}")
def test_a_mutant_is_another_program_that_some_tests_cover(mutant):
    source = (LIBRARY / mutant.file).read_text()
    assert ast.dump(ast.parse(mutant.mutated(source))) != ast.dump(ast.parse(source))
    assert mutants.test_files(mutants.ROOT, mutant.tests)


def test_each_is_there_once():
    assert len({each.name for each in MUTANTS}) == len(MUTANTS) >= 60
    assert len({(each.file, each.old, each.new) for each in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("source", ["y = 2\n", "x = 1\nx = 1\n"])
def test_a_text_that_is_gone_or_there_twice_is_an_error(source):
    with pytest.raises(ValueError, match=r"this text must stand once in tiny\.py, got [02] times: 'x = 1'"):
        TINY._replace(old="x = 1").mutated(source)


TINY = mutants.Mutant("tiny", "three is four", "tiny.py", "3", "4", ["test_tiny"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("new", "outcome"),
    [
        ("4", "caught by tests/below/test_tiny.py::test_three[@]"),
        ("2 + 1", "SURVIVED"),
        ("missing", "SURVIVED since no test ran"),
        ("3 if __import__('time').sleep(60) else 3", "caught by taking more than 10 s"),
    ],
)
def test_what_becomes_of_a_mutant(new, outcome, tmp_path):
    (tmp_path / "optaxclip").mkdir()
    (tmp_path / "optaxclip" / "__init__.py").touch()
    (tmp_path / "tests" / "below").mkdir(parents=True)
    library, tests = tmp_path / "optaxclip" / "tiny.py", tmp_path / "tests" / "below" / "test_tiny.py"
    library.write_text("THREE = 3\n")
    tests.write_text(
        "import pytest\nfrom optaxclip import tiny\n\n@pytest.mark.parametrize('_', ['@'])\n"
        "def test_three(_):\n    assert tiny.THREE == 3\n"
    )
    mutant = TINY._replace(new=new)
    with mutants.broken(tmp_path, mutant):
        found = mutants.first_failure(tmp_path, mutants.test_files(tmp_path, mutant.tests), [], 10.0)
    assert str(found) == outcome
    assert library.read_text() == "THREE = 3\n"
