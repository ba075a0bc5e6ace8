"""The two forms of a sum of transformed per-example gradients, and the choice between them.

`one_pass` is valid for every transformation. `two_pass` needs less memory and, for some functions, less time.
"""

from typing import Any

import jax

from optaxclip._jaxprs import outer
from optaxclip.per_example import one_pass, reasons, two_pass
from optaxclip.per_example.problems import Batch, Form, Problem

NAMES = ("auto", "one_pass", "two_pass")
SUMMED: dict[str, Form] = {"one_pass": one_pass.summed, "two_pass": two_pass.summed}


def choose(wanted: str, problem: Problem, batch: Batch) -> str:
    """Returns the wanted form, or for "auto" the faster of the valid ones.

    Raises:
      ValueError: if the transformation has a state, or, with the reason, if two passes are wanted but not valid.
    """
    problem.no_state()
    if wanted == "one_pass":
        return wanted
    reason = reasons.against_two_passes(problem, batch)
    if wanted == "two_pass" and reason:
        raise ValueError(f"form='two_pass' is not possible here: {reason}; pass form='auto' or 'one_pass'")
    is_taken = wanted == "two_pass" or (not reason and _is_faster(problem, batch))
    return "two_pass" if is_taken else "one_pass"


def _is_faster(problem: Problem, batch: Batch) -> bool:
    """Whether two passes are faster: at least half of all entries are in gradients whose norm does not need them."""
    undone = 0

    def look(example: Any) -> Any:
        nonlocal undone
        found, grads = outer.evaluate(problem.grad, example)
        kinds = zip(jax.tree.leaves(grads), jax.tree.leaves(problem.params), strict=True)
        undone = sum(param.size for leaf, param in kinds if isinstance(leaf, outer.Outer))
        return jax.tree.map(outer.as_array, found)

    jax.eval_shape(jax.vmap(look), batch)
    return 2 * undone >= sum(param.size for param in jax.tree.leaves(problem.params))
