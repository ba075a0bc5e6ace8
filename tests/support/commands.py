"""The commands of this repository, called in this process."""

import re
from collections.abc import Callable
from typing import NamedTuple

from optaxclip.demo import command as demo
from tests.benchmarks.sweep import command as sweep


class Command(NamedTuple):
    """A command: what a shell calls it, and its function."""

    name: str
    function: Callable

    def main(self, *arguments):
        """The exit code."""
        try:
            return self.function([str(argument) for argument in arguments])
        except SystemExit as error:
            return error.code

    def run(self, capsys, *arguments):
        """The exit code, and what was written to stdout and stderr."""
        code = self.main(*arguments)
        written = capsys.readouterr()
        return code, written.out, written.err

    def assert_refused(self, capsys, complaint, *arguments):
        """Code 2, nothing on stdout, and one line on stderr that begins with the name of the command."""
        code, out, err = self.run(capsys, *arguments)
        assert (code, out) == (2, "")
        assert err.startswith(f"{self.name}: error: ")
        assert complaint in err
        assert err.count("\n") == 1


DEMO = Command("python -m optaxclip", demo.main)
REPLAY = Command("python -m optaxclip replay", lambda words: demo.main(["replay", *words]))
SWEEP = Command("python -m tests.benchmarks.sweep", sweep.main)


def cells(text):
    """The table of the main job in a text: from what each row shows to its other cells."""
    body = re.split(r"^-[- ]+$", text, flags=re.MULTILINE)[1].strip().split("\n\n")[0]
    return {name: others for name, *others in (re.split(r"\s{2,}", line) for line in body.splitlines())}
