"""What must hold of every migration: the report says exactly what became of each array."""

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip import ClipStats


def numbered(state):
    """A state of the same types in which no two arrays agree, except for names and axes, which are bytes."""
    flat, treedef = jax.tree.flatten(state)
    return treedef.unflatten([leaf if leaf.dtype == jnp.uint8 else _number(i, leaf) for i, leaf in enumerate(flat)])


def _number(i, leaf):
    away = np.arange(leaf.size).reshape(leaf.shape) / max(leaf.size, 1)
    return jnp.asarray((1000 + 8 * i + 4 * away).astype(leaf.dtype))


def by_path(tree):
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def below(path, places):
    """Whether a path is one of these, or below one."""
    return any(path == place or path.startswith(place + "/") for place in places)


def assert_reported(initial, old_state, state, report):
    """The report against three states, the old one `numbered` and of the types of the new one.

    A record of another length is not looked at here.
    """
    assert jax.tree.structure(state) == jax.tree.structure(initial)
    first, now, before = by_path(initial), by_path(state), by_path(old_state)
    resized = ClipStats._fields if any(" steps, now " in note for note in report.kept.values()) else ()
    known = {np.asarray(leaf).tobytes() for leaf in before.values()}
    assert set(report.kept) & set(report.new) == set()
    for path, leaf in now.items():
        assert (leaf.dtype, leaf.shape, leaf.weak_type) == (first[path].dtype, first[path].shape, False)
        assert below(path, report.kept) != below(path, report.new), path
        if below(path, report.new):
            np.testing.assert_array_equal(leaf, first[path], err_msg=path)
        else:
            assert path.rsplit("/", 1)[-1] in resized or np.asarray(leaf).tobytes() in known, path
    kept = {np.asarray(leaf).tobytes() for path, leaf in now.items() if below(path, report.kept)}
    for path, leaf in before.items():
        is_kept = path.rsplit("/", 1)[-1] in resized or np.asarray(leaf).tobytes() in kept
        assert leaf.dtype == jnp.uint8 or below(path, report.dropped) != is_kept, path
