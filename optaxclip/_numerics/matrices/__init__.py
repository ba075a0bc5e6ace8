"""Singular values of matrices: the largest one, and a cap on all of them.

Everything takes a stack of matrices, of shape [number, rows, columns], with at least as many rows as columns and in
float32 or wider; `stacks` makes them of leaves.

On CPUs singular values come from decompositions, which are the faster there; on accelerators, whose decompositions are
slow, from iterations of matrix products alone. A program may be traced on one and run on another, so which it is is
decided when it is compiled.
"""
