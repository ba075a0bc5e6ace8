"""Singular values in float64."""

import numpy as np

Triple = tuple[np.ndarray, np.ndarray, np.ndarray]


def with_singular_values(rng, shape, values, *, complex_=False) -> np.ndarray:
    """A matrix of a shape with these singular values, and random singular vectors."""
    number = min(shape)

    def vectors(rows):
        square = rng.normal(size=(rows, number)) + (1j * rng.normal(size=(rows, number)) if complex_ else 0)
        return np.linalg.qr(square)[0]

    return (vectors(shape[0]) * np.asarray(values)) @ vectors(shape[1]).conj().T


def svd(matrix) -> Triple:
    wide = np.asarray(matrix, np.complex128 if np.iscomplexobj(matrix) else np.float64)
    return np.linalg.svd(wide, full_matrices=False)


def norm(matrix) -> float:
    """The largest singular value, by the eigenvalues of the Gram matrix: for large matrices much the fastest way."""
    wide = np.asarray(matrix, np.float64)
    return float(np.sqrt(max(np.linalg.eigvalsh(wide.T @ wide)[-1], 0)))


def capped(triple: Triple, c, *, soft: bool) -> np.ndarray:
    """U min(S, c) V^T, or U S / sqrt(1 + (S / c)^2) V^T."""
    u, s, vh = triple
    return (u * (s / np.sqrt(1 + np.square(s / c)) if soft else np.minimum(s, c))) @ vh
