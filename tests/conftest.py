"""Settings for every test: eight CPU devices, no silent rank promotion, fixed seeds, quick compilations."""

import os
import signal

# jax reads both when it starts its backend, so they come before its import. Ours is appended: of two, the last counts.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import gc
import hashlib
from collections.abc import Iterator

import hypothesis
import jax
import numpy as np
import pytest

from tests.support import compiling, figures

jax.config.update("jax_numpy_rank_promotion", "raise")
# For the same reason as in `set_aside_what_is_kept`, below.
gc.set_threshold(100_000, 50, 100)

# Compiling takes longer than any deadline; a failure in CI must come back with the same examples.
hypothesis.settings.register_profile(
    "optaxclip", deadline=None, print_blob=True, derandomize=os.environ.get("CI") == "true"
)
hypothesis.settings.load_profile("optaxclip")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--as-users-compile", action="store_true", help="XLA's own settings: two to three times slower")


def pytest_configure(config: pytest.Config) -> None:
    if not config.option.as_users_compile:
        os.environ["XLA_FLAGS"] += f" {compiling.as_flags(compiling.QUICK)}"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that share compiled programs share a worker: those of a row of the table, or else those of a file."""
    for item in items:
        row = getattr(item, "callspec", None) and item.callspec.params.get("row")
        item.add_marker(pytest.mark.xdist_group(getattr(row, "name", item.path.stem)))
        if item.get_closest_marker("xla") and not config.option.as_users_compile:
            item.add_marker(pytest.mark.skip(reason="needs --as-users-compile"))


def group(item: pytest.Item) -> str:
    return item.get_closest_marker("xdist_group").args[0]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    result = yield
    # On a worker a group spans files, and without workers a file spans groups.
    if nextitem is None or (item.path != nextitem.path and group(item) != group(nextitem)):
        if jax.__version_info__ < (0, 12):
            drop_modules()
        set_aside_what_is_kept()
    return result


def drop_modules() -> None:
    """Before 0.12, jax keeps with every program the module that it was compiled from, and its context of MLIR.

    That is 1.4 MB, and the more contexts there are, the longer a lowering takes: twice as long at the end of all tests.
    No public function drops the modules and keeps the programs. This can go when no such jax is supported.
    """
    from jax._src import pjit  # noqa: PLC0415  # private: nothing that a newer jax needs
    from jax._src.interpreters import pxla  # noqa: PLC0415

    for modules in (pjit._pjit_lower, pxla._cached_lowering_to_hlo):
        modules.cache_clear()


def set_aside_what_is_kept() -> None:
    """jax keeps every program; the garbage collector need not walk through all of them again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """A generator seeded by the test's id: the same numbers alone, in the whole suite, and on every worker."""
    name = request.node.nodeid.removesuffix(f"@{group(request.node)}")  # which a worker adds
    digest = hashlib.sha256(name.encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


@pytest.fixture
def strict_promotion() -> Iterator[None]:
    """Strict dtype promotion, for updates of ours alone: optax's Adam fails under it."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    figures.leave_undrawn(monkeypatch)


@pytest.fixture
def ctrl_c():
    """Python's own handler of Ctrl-C, which a test runner may have replaced."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)
