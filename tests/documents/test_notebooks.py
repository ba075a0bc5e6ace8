"""The notebooks run from top to bottom, in their short setting, and hold what they printed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import compiling

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


# What a notebook imports beyond the library, which the extra `notebooks` has.
NEEDS = {
    "acceleration": ["sklearn"],
    "bias": ["sklearn"],
    "choosing_a_threshold": ["sklearn"],
    "long_run": ["orbax"],
    "outliers_and_privacy": ["sklearn"],
    "quickstart": ["equinox", "flax"],
    "recipes": ["equinox", "flax", "orbax", "tensorboardX"],
    "which_clipper": ["IPython", "sklearn"],
}


def code_cells(notebook):
    return [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]


def text_of(lines):
    return lines if isinstance(lines, str) else "".join(lines)


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_a_notebook_runs_in_a_fresh_interpreter(notebook, tmp_path, request):
    for name in NEEDS.get(notebook.stem, []):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is needed: pip install 'optaxclip[notebooks]'")
    script = tmp_path / "notebook.py"
    script.write_text("\n\n".join(text_of(cell["source"]) for cell in code_cells(notebook)))
    plain = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    flags = "" if request.config.option.as_users_compile else compiling.as_flags(compiling.QUICK)
    environment = plain | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg", "OPTAXCLIP_SHORT": "1", "XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, script],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_a_notebook_holds_its_output_and_no_error(notebook):
    outputs = [output for cell in code_cells(notebook) for output in cell["outputs"]]
    assert outputs
    assert [output for output in outputs if output["output_type"] == "error"] == []
    assert all(cell["execution_count"] for cell in code_cells(notebook))
