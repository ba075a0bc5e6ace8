"""An update that can be held back, at the price of one more operation on each entry of the state.

Written plainly, as a choice between the old state and the new one, it is dear: the updates are calculated from the new
state *before* the choice, so that XLA must write both to memory, and an Adam step on GPT-2 small takes three to four
times as long on a CPU. A `lax.cond` around the step has to write the updates to memory, and puts the collectives of a
mesh into a branch.

Here the choice is made where each entry of the new state arises, in the middle of the calculation, and what follows
goes on from what was chosen. If the step is taken that is the new state, bit for bit; if it is held back the updates
are worthless, and their caller drops them. So XLA writes every entry of the state once, in place. It is for XLA on
CPUs (measured with jax 0.10), and can go when a plain choice costs no more there.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core


def update_or_hold(
    update: Callable[[Any, Any], tuple[Any, Any]], hold: jax.Array, updates: Any, state: Any
) -> tuple[Any, Any]:
    """`update(updates, state)`, but with `state` as it was where `hold` is set. The updates are worthless there."""
    closed, (new_updates, new_state) = jax.make_jaxpr(update, return_shape=True)(updates, state)
    jaxpr, old = closed.jaxpr, jax.tree.leaves(state)
    number = len(jax.tree.leaves(new_updates))
    entries = jaxpr.outvars[number:]
    if len(entries) != len(old):
        raise ValueError(f"the inner state had {len(old)} arrays before the update, and has {len(entries)} after it")
    # Of a value that is in the state twice, the first place is where it is held.
    place: dict[Any, int] = {}
    for i, var in enumerate(entries):
        if not isinstance(var, core.Literal):
            place.setdefault(var, i)

    inputs = [*closed.consts, *jax.tree.leaves((updates, state))]
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], inputs, strict=True))
    unheld: dict[Any, Any] = {}
    for part in _ending_in(place, jaxpr.eqns):
        made = _run(jaxpr, part, known)
        unheld |= {var: value for var, value in made.items() if var in place}
        known |= made | {var: _choose(hold, old[place[var]], unheld[var]) for var in made if var in place}

    def value(var: Any) -> Any:
        return var.val if isinstance(var, core.Literal) else known[var]

    def entry(i: int, var: Any) -> jax.Array:
        if isinstance(var, core.Literal) or var not in unheld:
            return _choose(hold, old[i], value(var))
        return value(var) if place[var] == i else _choose(hold, old[i], unheld[var])

    return (
        jax.tree.unflatten(jax.tree.structure(new_updates), map(value, jaxpr.outvars[:number])),
        jax.tree.unflatten(jax.tree.structure(new_state), [entry(i, var) for i, var in enumerate(entries)]),
    )


def _ending_in(wanted: dict[Any, int], equations: Sequence[Any]) -> list[list[Any]]:
    """The equations in pieces, each but the last of which ends with one that makes something wanted."""
    parts: list[list[Any]] = [[]]
    for equation in equations:
        parts[-1].append(equation)
        if any(var in wanted for var in equation.outvars):
            parts.append([])
    return [part for part in parts if part]


def _run(jaxpr: core.Jaxpr, equations: list[Any], known: dict[Any, Any]) -> dict[Any, Any]:
    """What some equations of a jaxpr make, by variable."""
    made = [var for equation in equations for var in equation.outvars]
    read = [var for equation in equations for var in equation.invars if not isinstance(var, core.Literal)]
    needed = list(dict.fromkeys(var for var in read if var in known))
    unnamed = jaxpr.debug_info.with_unknown_names()
    part = jaxpr.replace(constvars=[], invars=needed, outvars=made, eqns=equations, debug_info=unnamed)
    values = core.jaxpr_as_fun(core.ClosedJaxpr(part, ()))(*(known[var] for var in needed))
    return dict(zip(made, values, strict=True))


def _choose(hold: jax.Array, old: Any, new: Any) -> jax.Array:
    """In the dtype of `new`: that an update changes it, if it does, is the business of the update."""
    new, old = jnp.asarray(new), jnp.asarray(old)
    return jnp.where(hold, old if old.dtype == new.dtype else old.astype(new.dtype), new)
