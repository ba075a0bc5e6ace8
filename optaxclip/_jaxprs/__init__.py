"""Everything that reads jaxprs, the programs that jax traces.

Each function has a fallback for a jax whose jaxprs `reading` can't read. The fallback gives the same numbers, but is
slower.

| reads jaxprs | to | fallback |
|---|---|---|
| `holding.update_or_hold` | keep an old state without copying it | `jnp.where(hold, old, new)` on the state |
| `outer.evaluate` | take norms of outer products without the products | the function itself, with every gradient |
| `hoisting.hoist` | pass a closure's arrays from forward to backward pass | `jax.closure_convert` |
| `replaying.traced` | run the Python code of a function once | the function itself: it runs at every call |
| `reading.equations` | list the operations of a function | None: the caller takes what is valid for all functions |
"""
