"""Accepts records in every form: with jax or NumPy arrays, in Flax's boxes, or as dicts.

A restore without a template returns dicts.
"""

from collections.abc import Mapping
from typing import Any

import jax

from optaxclip._arrays import states
from optaxclip.records.names import Names

_WITHOUT_ARRAYS = {"names": Names(), "threshold_state": ()}  # fields that a restore may leave out, with their defaults


def is_of(kind: Any, node: Any) -> bool:
    """Whether a node of a state is a NamedTuple of this type, or a dict with its fields."""
    if isinstance(node, Mapping):
        return set(node) >= set(kind._fields) - set(_WITHOUT_ARRAYS)
    return isinstance(node, kind)


def as_kind(kind: Any, node: Any) -> Any:
    """Returns a node for which `is_of` is true as a NamedTuple, with unchanged fields."""
    if not isinstance(node, Mapping):
        return node
    return kind(**{field: node.get(field, _WITHOUT_ARRAYS.get(field)) for field in kind._fields})


def unboxed(record: Any) -> Any:
    """Returns a NamedTuple with one jax array per field.

    Flax boxes each leaf, and checkpoints return NumPy arrays or Python numbers.
    """
    return states.as_arrays(record._replace(**{name: _array(field) for name, field in record._asdict().items()}))


def _array(field: Any) -> Any:
    leaves = jax.tree.leaves(field)
    if not leaves:
        return field if isinstance(field, Names) else Names()
    return leaves[0]
