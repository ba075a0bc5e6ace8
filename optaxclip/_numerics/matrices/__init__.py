"""Singular values of matrices: the largest one, and a cap on all of them.

All functions take a stack of matrices in float32 or wider, of shape [number, rows, columns], with at least as many rows
as columns. `stacks` makes stacks of leaves.

On CPUs singular values come from decompositions, which are faster there. On accelerators decompositions are slow, so
they come from iterations of matrix products. A program may be traced on one platform and run on another, so the choice
is made at compile time.
"""
