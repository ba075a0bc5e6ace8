"""What one run of a compiled program does: the bytes it moves, and how many operations of each kind it starts.

The bytes are counted by hand. Every instruction that runs moves its results and its operands, as far as they lie in the
device's main memory. XLA's own estimate is no substitute: on a TPU it adds up all branches of a conditional and counts
on-chip memory, and on a GPU there is none. A loop's body is counted once. An update in place counts as a write of all.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from tests.benchmarks.accelerators.hlo import Array, Instruction, Module, replica_groups

MAIN, HOST = 0, 5  # memory spaces in XLA's layouts; the others are on the chip
# Bookkeeping of the compiler, and numbers that it computes where they are used.
FREE = frozenset(
    ("after-all", "bitcast", "constant", "domain", "get-tuple-element", "opt-barrier", "parameter", "tuple")
)
FREE |= {"iota", "partition-id", "replica-id"}
ENDS = ("-done", "-update")
COLLECTIVES = frozenset(
    ("all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute", "reduce-scatter")
)
TRANSFERS = frozenset(("infeed", "outfeed", "recv", "send"))


@dataclasses.dataclass(frozen=True)
class Run:
    """What is moved and started.

    Attributes:
      bytes: read from and written to main memory.
      kernels: operations that run by themselves. On a TPU most small ones are on scalars.
      conditionals: how many a run meets.
      loops: how many a run meets.
      host: transfers between device and host.
      collectives: by kind and groups of devices.
    """

    bytes: int = 0
    kernels: int = 0
    conditionals: int = 0
    loops: int = 0
    host: int = 0
    collectives: Counter[Any] = dataclasses.field(default_factory=Counter)

    def __add__(self, other: "Run") -> "Run":
        names = [field.name for field in dataclasses.fields(self)]
        return Run(**{name: getattr(self, name) + getattr(other, name) for name in names})


def ordinary_run(module: Module, platform: str) -> Run:
    """A run that takes the cheaper branch of every conditional."""
    return _Counter(module, platform, min).run(module.entry)


def worst_run(module: Module, platform: str) -> Run:
    """A run that takes the more expensive branch of every conditional."""
    return _Counter(module, platform, max).run(module.entry)


@dataclasses.dataclass(frozen=True)
class _Counter:
    module: Module
    platform: str
    choose: Callable[..., Run]

    def run(self, name: str) -> Run:
        """What a computation does when it is called."""
        instructions = self.module.computations[name]
        results = {each.name: each.results for each in instructions}
        running = (each for each in instructions if _runs(each.op))
        return sum((self.step(each, results) for each in running), Run())

    def step(self, instruction: Instruction, results: dict[str, list[Array]]) -> Run:
        """What one instruction does, with what it calls."""
        host = int(_involves_host(instruction, results, self.platform))
        match instruction.op:
            case "conditional":
                branches = instruction.called("branch_computations", "true_computation", "false_computation")
                taken = self.choose(map(self.run, branches), key=lambda run: run.bytes)
                return taken + Run(conditionals=1, host=host)
            case "call" | "async-start":
                return self.called(instruction, "to_apply", "calls")
            case "while":
                return self.called(instruction, "body") + Run(loops=1, host=host)
            case "copy-start" | "slice-start":
                return Run(bytes=_copied(instruction.results), host=host)
        arrays = [*instruction.results, *_operands(instruction, results)]
        kind = instruction.op.removesuffix("-start")
        collective = Counter({(kind, *replica_groups(instruction.attributes)): int(kind in COLLECTIVES)})
        return Run(bytes=_in_main_memory(arrays), kernels=1, host=host, collectives=+collective)

    def called(self, instruction: Instruction, *keys: str) -> Run:
        return sum(map(self.run, instruction.called(*keys)), Run())


def _runs(op: str) -> bool:
    """Whether an operation moves anything, and is not the end of one that is counted where it starts."""
    return op not in FREE and not op.endswith(ENDS)


def _operands(instruction: Instruction, results: dict[str, list[Array]]) -> Iterable[Array]:
    """The arrays that an instruction reads, each operand once."""
    return (array for name in dict.fromkeys(instruction.operands) for array in results.get(name, []))


def _in_main_memory(arrays: Iterable[Array]) -> int:
    return sum(array.bytes for array in arrays if array.space == MAIN)


def _copied(results: list[Array]) -> int:
    """An asynchronous copy or slice results in what it reads and what it writes, and moves the smaller of both."""
    two = results[:2]
    moved = min(array.bytes for array in two)
    return sum(moved for array in two if array.space == MAIN)


def _involves_host(instruction: Instruction, results: dict[str, list[Array]], platform: str) -> bool:
    """Whether an instruction copies between device and host."""
    if any(array.space == HOST for array in (*instruction.results, *_operands(instruction, results))):
        return True
    attributes = instruction.attributes
    match instruction.op:
        # A GPU's host waits for the predicate, to know what to launch next; not where it knows how often a loop runs.
        # (XLA can put conditionals into a CUDA graph. In jax 0.10 it does not by default.)
        case "conditional":
            return platform == "gpu"
        case "while":
            return platform == "gpu" and "known_trip_count" not in attributes
        case "custom-call":
            return "callback" in attributes
        case op:
            return op in TRANSFERS
