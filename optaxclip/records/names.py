"""The names of groups and leaves in a record. They are part of the structure of a state, not of its arrays."""

import jax


@jax.tree_util.register_static
class Names(tuple[()]):
    """Names of the groups and leaves of a record; a pytree without leaves.

    The names take no array. They pass through jit, scan and checkpoints with a template, and are known while a function
    is traced. Libraries that only know namedtuples, such as Flax's msgpack, see a namedtuple without fields. The names
    are unknown in what they restore, and in a restore without a template.

    Unknown names equal all others, so that a state can learn its names in the next step without changing its structure.
    The price: jax treats two states of the same structure as equal, even if one knows its names and the other does not.
    It reuses the function compiled for the first, and the results have the names of the first.

    Attributes:
      groups: the path of each group; None if the names are unknown.
      leaves: the path of each leaf that holds floats.
    """

    _fields = ()
    groups: tuple[str, ...] | None
    leaves: tuple[str, ...]

    def __new__(cls, groups: tuple[str, ...] | None = None, leaves: tuple[str, ...] = ()) -> "Names":
        """Creates names; unknown ones without arguments."""
        names = super().__new__(cls)
        names.groups, names.leaves = groups, leaves
        return names

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Names):
            return False
        return None in (self.groups, other.groups) or (self.groups, self.leaves) == (other.groups, other.leaves)

    def __ne__(self, other: object) -> bool:  # overrides that of tuple
        return not self == other

    def __hash__(self) -> int:
        return hash(Names)  # the same for all, because unknown names equal all others

    def __repr__(self) -> str:
        return f"Names(groups={self.groups}, leaves={self.leaves})"

    def __reduce__(self) -> tuple[object, ...]:
        return Names, (self.groups, self.leaves)

    @property
    def are_known(self) -> bool:
        """Whether the names are known."""
        return self.groups is not None

    def group(self, number: int) -> str:
        """Returns the path of a group, or "#" and its number if it is unknown."""
        return f"#{number}" if self.groups is None else self.groups[number]

    def leaf(self, number: int) -> str:
        """Returns the path of a leaf, or "#" and its number if it is unknown."""
        return f"#{number}" if self.groups is None else self.leaves[number]
