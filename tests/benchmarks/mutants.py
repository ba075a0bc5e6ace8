"""What the tests would notice: breaks the library in one way after another, and runs the tests that cover it.

Claim: every mutant of `mutants.toml` is caught, by a test that passes on the library as it is.

    python -m tests.benchmarks.mutants
    python -m tests.benchmarks.mutants --only skips
    python -m tests.benchmarks.mutants --list

How it works. Each mutant replaces one text of one file, in a copy of the tree: nothing changes in the checkout. pytest
then runs its test files up to the first failure. A mutant that no test notices has SURVIVED, and the exit code is 1. A
run that takes too long counts as caught: the mutant hangs. At the end the tests that failed must pass without any
mutant. The mutants are chosen by hand: mutmut and cosmic-ray apply their operators to every line, and of jitted code
each of thousands of mutants would compile anew.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "notebooks", "build", "dist", "out")


class Mutant(NamedTuple):
    """One way to break the library.

    Attributes:
      part: the part of the package that it belongs to.
      name: what the broken library does.
      file: where, below `optaxclip/`.
      old: the text that is replaced; it stands in the file once.
      new: what takes its place.
      tests: the test files that must notice, by stem.
      k: which of their tests, as in pytest's `-k`; "" for all.
    """

    part: str
    name: str
    file: str
    old: str
    new: str
    tests: list[str]
    k: str = ""

    def mutated(self, source: str) -> str:
        """The file with the bug in it."""
        if (times := source.count(self.old)) != 1:
            raise ValueError(
                f"{self.name!r}: this text must stand once in {self.file}, got {times} times: {self.old!r}"
            )
        return source.replace(self.old, self.new)


def mutants() -> list[Mutant]:
    """All of them, in order."""
    parts = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
    return [Mutant(part, **entry) for part, entries in parts.items() for entry in entries]


class Outcome(NamedTuple):
    """What became of a mutant.

    Attributes:
      is_caught: whether a test noticed.
      by: the test that did, or what else there is to say.
    """

    is_caught: bool
    by: str

    def __str__(self) -> str:
        return f"caught by {self.by}" if self.is_caught else f"SURVIVED {self.by}".rstrip()


def test_files(root: Path, stems: Iterable[str]) -> list[str]:
    """Where the test files of these stems are, wherever they lie below `tests/`."""
    found = {stem: sorted((root / "tests").rglob(f"{stem}.py")) for stem in stems}
    if missing := [stem for stem, paths in found.items() if not paths]:
        raise ValueError(f"there is no {missing[0]}.py under tests/")
    return [str(path.relative_to(root)) for paths in found.values() for path in paths]


def main() -> int:
    args = parse_arguments()
    chosen = [each for each in mutants() if re.search(args.only, f"{each.part}: {each.name}")]
    if not chosen:
        raise SystemExit(f"no mutant matches {args.only!r}")
    if args.list:
        print(*(f"{each.part}: {each.name} ({', '.join(each.tests)})" for each in chosen), sep="\n")
        return 0
    options = ["--as-users-compile"] if args.as_users_compile else []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(ROOT, Path(folder) / "copy", ignore=NOT_COPIED))
        outcomes: list[Outcome] = []
        for each in chosen:
            start = time.monotonic()
            with broken(copy, each):
                outcomes.append(
                    first_failure(copy, [*test_files(copy, each.tests), "-k", each.k], options, args.timeout)
                )
            print(f"{each.part}: {each.name}: {outcomes[-1]} ({time.monotonic() - start:.0f} s)", flush=True)
        catchers = sorted({each.by for each in outcomes if "::" in each.by})
        without = first_failure(copy, catchers, options, args.timeout * len(catchers)) if catchers else None
    number = sum(each.is_caught for each in outcomes)
    print(f"\n{number} of {len(chosen)} caught")
    if without is None or without == PASSED:
        return int(number < len(chosen))
    print(f"not a catch: {without.by} fails without any mutant, too")
    return 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="PATTERN", help="mutants whose part or name match")
    parser.add_argument("--list", action="store_true", help="say which there are, and run nothing")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds per mutant")
    parser.add_argument("--as-users-compile", action="store_true", help="run the tests with XLA's own settings")
    return parser.parse_args()


@contextmanager
def broken(root: Path, mutant: Mutant) -> Iterator[None]:
    """A tree with a mutant in it, for as long as this is entered."""
    path = root / "optaxclip" / mutant.file
    source = path.read_text()
    _write(path, mutant.mutated(source))
    try:
        yield
    finally:
        _write(path, source)


def _write(path: Path, source: str) -> None:
    path.write_text(source)
    # Python tells stale bytecode by size and second, which two versions may share.
    for stale in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
        stale.unlink()


PASSED = Outcome(is_caught=False, by="")


def first_failure(root: Path, chosen: list[str], options: list[str], timeout: float) -> Outcome:
    """Which of the chosen tests fails first in this tree."""
    report = root / "report.xml"
    report.unlink(missing_ok=True)
    # Groups would be written into the names of tests, and those could not be found again.
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "1", "--dist=load", *chosen, *options]
    command += [f"--junitxml={report}", "--override-ini=junit_family=xunit1"]
    environment = os.environ | {"PYTHONPATH": str(root)}
    # In a session of its own, so that the workers can be stopped with it.
    process = subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        return Outcome(is_caught=True, by=f"taking more than {timeout:g} s")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code == 0:
        return PASSED
    failures = _failures(report)
    return Outcome(is_caught=True, by=failures[0]) if failures else Outcome(is_caught=False, by="since no test ran")


def _failures(report: Path) -> list[str]:
    """The tests that failed; what could not be collected is none."""
    cases = ET.parse(report).iter("testcase") if report.exists() else ()
    return [
        f"{case.get('file')}::{case.get('name')}"
        for case in cases
        if any(each.get("message") != "collection failure" for tag in ("failure", "error") for each in case.iter(tag))
    ]


if __name__ == "__main__":
    sys.exit(main())
