"""The names of what is recorded, in the structure of a state instead of its arrays."""

import jax


@jax.tree_util.register_static
class Names(tuple[()]):
    """Names of the groups and leaves of a record; a pytree without leaves.

    It costs no array, passes through jit, scan and checkpoints with a template, and is there while a function is
    traced. To a library that knows namedtuples alone, as Flax's msgpack, it is one without fields. What such a library
    returns, or a restore without a template, knows no names. Names that are not known equal all others, so that a state
    can learn them in its next step without a change of its structure. The price: of two states of one structure, one of
    which knows its names, jax takes a function that was compiled for the one for the other, too, and what it returns
    has the names of the first.

    Attributes:
      groups: the path of each group, None where they are not known.
      leaves: the path of each leaf that holds floats.
    """

    _fields = ()
    groups: tuple[str, ...] | None
    leaves: tuple[str, ...]

    def __new__(cls, groups: tuple[str, ...] | None = None, leaves: tuple[str, ...] = ()) -> "Names":
        """Names; without arguments, those that are not known."""
        names = super().__new__(cls)
        names.groups, names.leaves = groups, leaves
        return names

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Names):
            return False
        return None in (self.groups, other.groups) or (self.groups, self.leaves) == (other.groups, other.leaves)

    def __ne__(self, other: object) -> bool:  # a tuple has one of its own
        return not self == other

    def __hash__(self) -> int:
        return hash(Names)  # of all the same, since those that are not known equal all

    def __repr__(self) -> str:
        return f"Names(groups={self.groups}, leaves={self.leaves})"

    def __reduce__(self) -> tuple[object, ...]:
        return Names, (self.groups, self.leaves)

    @property
    def are_known(self) -> bool:
        """Whether there are names."""
        return self.groups is not None

    def group(self, number: int) -> str:
        """The path of a group; its number where it is not known."""
        return f"#{number}" if self.groups is None else self.groups[number]

    def leaf(self, number: int) -> str:
        """The path of a leaf; its number where it is not known."""
        return f"#{number}" if self.groups is None else self.leaves[number]
