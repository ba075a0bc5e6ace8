"""Everything that reads jaxprs, the programs that jax traces.

Each has a plain fallback that gives the same numbers, only slower. It is taken where jax does not show its programs as
`reading` needs them.

| reads jaxprs | what for | the fallback |
|---|---|---|
| `holding.update_or_hold` | holds a state back without a copy of it | `jnp.where(hold, old, new)` on the state |
| `outer.evaluate` | norms of outer products, without the products | the function itself: every gradient is calculated |
| `hoisting.hoist` | passes a closure's arrays from forward to backward pass | `jax.closure_convert` |
| `replaying.traced` | runs the Python code of a function once | the function itself: it runs again at every call |
| `reading.equations` | says which operations a function has | None: the caller takes what is valid for all functions |
"""
