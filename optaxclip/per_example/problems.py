"""Sorts the arguments of a call: the parameters to differentiate by, and the batch of examples."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from optaxclip import core
from optaxclip._arguments import checks
from optaxclip._arrays import layouts, trees
from optaxclip._arrays.trees import Tree
from optaxclip._jaxprs import replaying
from optaxclip.functions import empty_state

Batch: TypeAlias = Any  # a pytree of arrays whose first axis indexes examples
Grads: TypeAlias = Any  # of the structure of the parameters


class Problem(NamedTuple):
    """What to calculate for a batch.

    Attributes:
      loss: `(params, example) -> (value, aux)`. Its Python code has run already, and does not run when it is called.
      params: what to differentiate by. If devices have different examples, each device has its own copy.
      tx: the transformation of each gradient.
      apart: the mesh axes along which devices have different examples.
      want_norms: whether to return the norms of the gradients.
    """

    loss: Callable[[Any, Any], tuple[jax.Array, Any]]
    params: Tree
    tx: optax.GradientTransformation
    apart: tuple[str, ...]
    want_norms: bool

    def grad(self, example: Any) -> tuple[tuple[jax.Array, Any], Grads]:
        """Returns value, auxiliary output and gradient of one example."""
        return jax.value_and_grad(self.loss, has_aux=True)(self.params, example)

    def no_state(self) -> Any:
        """Returns the state of the transformation, which must have no arrays.

        Raises:
          ValueError: if it has some.
        """
        advice = (
            "which one example can't pass on to the next. For a schedule, pass its value in this step, as in "
            "clip_by_global_norm(schedule(step)). For a record of the norms, pass return_norms=True. Apply a stateful "
            "transformation, such as an optimizer, to the result"
        )
        return empty_state("clipped_value_and_grad", self.tx, self.params, advice)

    def made_of(self) -> core.MadeOf | None:
        """Returns what `clip_by` made the transformation of; None if it is not known to be a clip."""
        return self.tx.made_of if isinstance(self.tx, core.Clip) else None


class Seen(NamedTuple):
    """What is known of each example, in arrays along the batch.

    Attributes:
      value: the value of the loss.
      aux: the auxiliary output.
      norm: the 2-norm of the gradient, or None.
      counted: whether the gradient counts: it is finite, and its weight is not 0.
    """

    value: jax.Array
    aux: Any
    norm: jax.Array | None
    counted: jax.Array


Weights: TypeAlias = jax.Array | None  # one finite number per example; None for 1 each

# Returns the weighted sum in float32 or wider, and what is known of each example.
Form: TypeAlias = Callable[[Problem, Batch, Weights], tuple[Grads, Seen]]


class Places(NamedTuple):
    """Which arguments are which.

    Attributes:
      argnums: the arguments to differentiate by: a number, or a tuple of several.
      batch_argnums: the arguments that hold the examples.
    """

    argnums: int | tuple[int, ...]
    batch_argnums: tuple[int, ...]


def places(argnums: Any, batch_argnums: Any) -> Places:
    """Checks `argnums` and `batch_argnums`.

    Raises:
      ValueError: if one is no whole number of at least 0 or an empty tuple, or if an argument is named twice.
    """
    wanted, batched = _numbers("argnums", argnums), _numbers("batch_argnums", batch_argnums)
    named = (*wanted, *batched)
    if twice := sorted({number for number in named if named.count(number) > 1}):
        raise ValueError(
            f"argnums={argnums!r} and batch_argnums={batch_argnums!r} name argument {twice[0]} twice: name each "
            "argument once, in one of the two"
        )
    return Places(wanted if isinstance(argnums, tuple | list) else wanted[0], batched)


def _numbers(name: str, value: Any) -> tuple[int, ...]:
    numbers = tuple(value) if isinstance(value, tuple | list) else (value,)
    if not numbers:
        raise ValueError(f"{name} must name an argument, got {value!r}")
    return tuple(checks.whole(name, number, at_least=0) for number in numbers)


def of_call(
    fun: Callable[..., Any],
    tx: optax.GradientTransformation,
    where: Places,
    has_aux: bool,
    want_norms: bool,
    args: Sequence[Any],
    kwargs: dict[str, Any],
) -> tuple[Problem, Any, Batch]:
    """Returns the problem, the parameters as the user passed them, and the batch."""
    wanted = where.argnums if isinstance(where.argnums, tuple) else (where.argnums,)
    if max(*wanted, *where.batch_argnums) >= len(args):
        raise ValueError(
            f"argnums={where.argnums} and batch_argnums={where.batch_argnums} name more than the {len(args)} "
            "positional arguments of the call: pass these arguments by position"
        )

    def loss(params: Tree, example: Any) -> tuple[jax.Array, Any]:
        given = list(args)
        for number, param in zip(wanted, params if isinstance(where.argnums, tuple) else (params,), strict=True):
            given[number] = param
        for number, rows in zip(where.batch_argnums, example, strict=True):
            given[number] = rows
        found = fun(*given, **kwargs)
        return found if has_aux else (found, None)

    params = tuple(args[number] for number in wanted) if isinstance(where.argnums, tuple) else args[wanted[0]]
    batch = tuple(args[number] for number in where.batch_argnums)
    require_examples(where, batch)
    own = jax.tree.map(jnp.asarray, params)
    traced = _traced(loss, own, batch)
    if apart := _axes_of_examples(traced, own, batch):
        # The parameters have another type now, which the trace above does not fit.
        own = jax.tree.map(lambda leaf: layouts.varying_over(leaf, apart), own)
        traced = _traced(loss, own, batch)
    return Problem(traced, own, tx, apart, want_norms), params, batch


def _traced(loss: Callable[[Any, Any], Any], params: Tree, batch: Batch) -> Callable[[Any, Any], Any]:
    """Traces `loss` for the examples of this batch. Its Python code runs now, and never again."""
    traced = loss

    def look(example: Any) -> tuple[()]:
        nonlocal traced
        traced = replaying.traced(loss, params, example)
        return ()

    # Traced under vmap, where an example has the type that it will have later, on every mesh.
    jax.eval_shape(jax.vmap(look), batch)
    return traced


def _axes_of_examples(loss: Callable[[Any, Any], Any], params: Tree, batch: Batch) -> tuple[str, ...]:
    """Returns the mesh axes along which devices have different examples.

    These are the axes that the value varies over. A batch may vary over more axes: if one example is spread over
    several devices, and the function adds up their shares.
    """
    if not any(map(layouts.varying, jax.tree.leaves((params, batch)))):
        return ()
    value, _ = jax.eval_shape(jax.vmap(loss, (None, 0)), params, batch)
    return tuple(sorted(layouts.varying(value)))


def require_examples(where: Places, batch: Batch) -> None:
    """Raises ValueError if there are no examples, or if arrays of the batch differ in their number."""
    lengths: dict[str, int] = {}
    for number, rows in zip(where.batch_argnums, batch, strict=True):
        for path, leaf in zip(trees.paths(rows), jax.tree.leaves(rows), strict=True):
            name = f"argument {number}" + (f" at {path!r}" if path else "")
            if not jnp.shape(leaf):
                raise ValueError(f"batch_argnums={where.batch_argnums}: {name} is a scalar and has no axis of examples")
            lengths[name] = jnp.shape(leaf)[0]
    if not lengths:
        raise ValueError(f"batch_argnums={where.batch_argnums}: there is no array in these arguments")
    if len(set(lengths.values())) > 1:
        several = ", ".join(f"{length} in {name}" for name, length in list(lengths.items())[:5])
        raise ValueError(f"batch_argnums={where.batch_argnums}: the numbers of examples differ: {several}")
    (number,) = set(lengths.values())
    if number == 0:
        raise ValueError(f"batch_argnums={where.batch_argnums}: there are 0 examples")


def size(batch: Batch) -> int:
    """Returns the number of examples."""
    return jnp.shape(jax.tree.leaves(batch)[0])[0]
