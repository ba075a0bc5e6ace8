"""Which collectives a program has, and where."""

import re

import jax

COLLECTIVE = re.compile(
    r"\b(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast)(?:-start)?\("
)


def collectives(hlo):
    """The collectives of a compiled program, by name."""
    return COLLECTIVE.findall(hlo)


def collectives_under_branches(hlo):
    """Those that lie in a branch of a conditional, or in what a branch calls."""
    bodies = dict(re.findall(r"^(?:ENTRY )?%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", hlo, flags=re.MULTILINE | re.DOTALL))
    pending, seen = [], set()
    for line in hlo.splitlines():
        if " conditional(" in line:
            pending += re.findall(r"%([\w.\-]+)", line.split(" conditional(", 1)[1])
    while pending:
        name = pending.pop()
        if name in bodies and name not in seen:
            seen.add(name)
            pending += re.findall(r"%([\w.\-]+)", bodies[name])
    return [found for name in seen for found in collectives(bodies[name])]


def written_collectives(jaxpr):
    """Those of a program as it was traced: several over the same axes may be merged when it is compiled."""
    found = [eqn.primitive.name for eqn in jaxpr.eqns if re.match("psum|pmax|pmin|all_gather", eqn.primitive.name)]
    for inner in jax.tree.leaves([list(eqn.params.values()) for eqn in jaxpr.eqns]):
        body = getattr(inner, "jaxpr", inner)
        found += written_collectives(body) if hasattr(body, "eqns") else []
    return found
