"""Float64 NumPy transcriptions of the published methods, to hold the library to. Nothing in `fixed` knows jax."""
