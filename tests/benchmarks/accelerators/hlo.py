"""Reads the text of a compiled program: its computations, their instructions, and the arrays these pass on.

fusion.1 = f32[768,3072]{1,0:T(8,128)S(1)} fusion(param.0, param.1), kind=kLoop, calls=fused_computation.1
^name      ^result, in memory space 1      ^op    ^operands          ^attributes
"""

import dataclasses
import itertools
import math
import re
from typing import NamedTuple

import numpy as np

HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{")
INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)(\(.*)")
ARRAY = re.compile(r"\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
SPACE = re.compile(r"S\((\d+)\)")
NAME = re.compile(r"%?([A-Za-z_][\w.\-]*)")
# Groups of devices: written out; an array of all of them, transposed; or along axes of a mesh of such an array.
LISTED = re.compile(r"replica_groups=\{(\{[\d,{}]*\})\}")
IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}")
AXIS = re.compile(r"'([^']+)'=(\d+)")


class Array(NamedTuple):
    """What one array takes, and where it lies: memory space 0, which is not written, is the device's main memory."""

    bytes: int
    space: int


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation. A result that is a tuple is the list of its arrays."""

    name: str
    op: str
    results: list[Array]
    operands: list[str]
    attributes: str

    def called(self, *keys: str) -> list[str]:
        """The computations that attributes of these names hold: `calls=%a`, `branch_computations={%a, %b}`."""
        found = re.findall(rf"\b(?:{'|'.join(keys)})=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
        return [name for each in found for name in NAME.findall(each)]


class Module(NamedTuple):
    """A program: computations by name, and the name of the one that starts."""

    computations: dict[str, list[Instruction]]
    entry: str


def parsed(text: str) -> Module:
    """The program of an HLO text, as `compiled.as_text()` returns it."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            if header := HEADER.match(line):
                current = computations.setdefault(header[2], [])
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif found := INSTRUCTION.match(line):
            current.append(_instruction(*found.groups()))
    return Module(computations, entry)


def replica_groups(attributes: str) -> list[tuple[int, ...]]:
    """The groups of devices of a collective. These are three ways to write the same:

    {{0,2},{1,3}}    [2,2]<=[2,2]T(1,0)    mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}
    """
    if listed := LISTED.search(attributes):
        return [_numbers(group) for group in re.findall(r"\{([\d,]*)\}", listed[1])]
    if iota := IOTA.search(attributes):
        groups, dims, order = iota.groups(default="")
        return _tuples(_devices(dims, order).reshape(_numbers(groups)))
    if mesh := MESH.search(attributes):
        axes, dims, order, along = mesh.groups(default="")
        return _tuples(_along(dict(AXIS.findall(axes)), _devices(dims, order), re.findall(r"'([^']+)'", along)))
    return []


def _devices(dims: str, order: str) -> np.ndarray:
    """The devices 0, 1, ... of an array of these dimensions, which is then transposed."""
    sizes = _numbers(dims)
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(_numbers(order) or range(len(sizes))).ravel()


def _along(axes: dict[str, str], devices: np.ndarray, along: list[str]) -> np.ndarray:
    """Groups of the devices of a mesh that differ along these axes only. If none are listed, they are in order."""
    sizes = tuple(map(int, axes.values()))
    mesh = (devices if devices.size == math.prod(sizes) else np.arange(math.prod(sizes))).reshape(sizes)
    names = list(axes)
    moved = np.moveaxis(mesh, [names.index(axis) for axis in along], range(-len(along), 0))
    return moved.reshape(-1, math.prod(int(axes[axis]) for axis in along))


def _tuples(groups: np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(group) for group in groups.tolist()]


def _instruction(name: str, shape: str, op: str, rest: str) -> Instruction:
    end = _closing(rest)
    # An operand may be written with its shape, "f32[8]{0} %a", or alone, "a".
    operands = re.findall(r"%([\w.\-]+)", rest[:end]) or NAME.findall(rest[:end])
    return Instruction(name, op, _arrays(shape), operands, rest[end + 1 :])


def _closing(text: str) -> int:
    """Where the parenthesis that the text starts with closes."""
    depths = itertools.accumulate((char == "(") - (char == ")") for char in text)
    return next((at for at, depth in enumerate(depths) if depth == 0), len(text))


def _arrays(shape: str) -> list[Array]:
    return [
        Array(math.prod(_numbers(dims)) * int(bits or 8) // 8, int(space[1]) if (space := SPACE.search(layout)) else 0)
        for bits, dims, layout in ARRAY.findall(shape)
    ]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(","))) if text else ()
