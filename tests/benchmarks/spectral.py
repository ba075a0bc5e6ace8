"""What a cap on singular values, and the largest of them, cost beside the plain ways to get them.

Claim: at 1024 x 1024 in float32 faster than the SVD form on a CPU for caps down to a thirtieth of the largest singular
value, and a sixth slower at most below that; and right, where the plain forms are not. No GPU or TPU was measured.

    python -m tests.benchmarks.spectral
    python -m tests.benchmarks.spectral --shapes 2048x512 --caps 0.3 0.001 --json spectral.json

How it measures. Each repeat runs every program once, in an order of its own; medians are printed, and the error, in the
spectral norm, as a part of what is promised: 1e-3 of the cap and 20 eps of the largest singular value, or 1e-5 of that
where it is what is measured. `SVD` is U min(S, c) V^T; `Gram` scales in the eigenvectors of A^T A. `iterations` is what
accelerators take and `decompositions` what CPUs do, whatever runs here; `ours` is what the library takes. Spectra: that
of Gaussian numbers, and one from 1 down to 1e-6, evenly by ratio.
"""

import argparse
import functools
import statistics
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import optaxclip
from optaxclip._numerics.matrices import decompositions, iterations
from optaxclip.core import Leaves
from tests.benchmarks import interleaved, show_environment, write_json
from tests.reference import spectral

EPS = float(np.finfo(np.float32).eps)


def main() -> None:
    args = parse_arguments()
    show_environment()
    found = []
    for text in args.shapes:
        shape = tuple(int(length) for length in text.split("x"))
        for name in args.spectra:
            matrix = SPECTRA[name](np.random.default_rng(0), shape)
            triple = spectral.svd(matrix)
            found += show(
                f"{text} {name}, largest singular value", norms(args.skip), matrix, (), args.repeats,
                lambda out, top=triple[1][0]: abs(float(np.squeeze(out)) - top) / top / 1e-5,
            )  # fmt: skip
            for soft in (False, True):
                for part in args.caps:
                    c = part * triple[1][0]
                    right = spectral.capped(triple, c, soft=soft)
                    room = 1e-3 * c + 20 * EPS * triple[1][0]
                    found += show(
                        f"{text} {name}, {'soft' if soft else 'hard'} cap at {part:g} of the largest",
                        caps(soft, args.skip), matrix, (np.float32(c),), args.repeats,
                        lambda out, right=right, room=room: np.linalg.norm(np.squeeze(out) - right, 2) / room,
                    )  # fmt: skip
    write_json(args.json, results=found)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["1024x1024"])
    parser.add_argument("--caps", nargs="+", type=float, default=[0.3, 0.001])
    parser.add_argument("--spectra", nargs="+", choices=list(SPECTRA), default=list(SPECTRA))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--skip", nargs="*", default=[], help="programs to leave out, as iterations on a CPU")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def show(title, programs, matrix, arguments, repeats, error_of):
    """Times the programs and prints a table of them."""
    matrix = jnp.asarray(matrix)
    compiled = {name: jax.jit(program).lower(matrix, *arguments).compile() for name, program in programs.items()}
    run = {name: functools.partial(program, matrix, *arguments) for name, program in compiled.items()}
    times = interleaved(run, repeats)
    print(f"\n{title}\n{'':16}{'ms':>9}{'of SVD':>9}{'error, of allowed':>20}")
    rows = []
    for name, each in times.items():
        row = {"title": title, "program": name, "ms": statistics.median(each), "error": float(error_of(run[name]()))}
        ratio = statistics.median(one / svd for one, svd in zip(each, times["SVD"], strict=True))
        print(f"{name:16}{row['ms']:9.1f}{ratio:8.2f}x{row['error']:20.3g}", flush=True)
        rows.append(row)
    return rows


def caps(soft, skip):
    def kept(values, c):
        return values / jnp.sqrt(1 + (values / c) ** 2) if soft else jnp.minimum(values, c)

    def svd(matrix, c):
        u, s, vh = jnp.linalg.svd(matrix, full_matrices=False)
        return (u * kept(s, c)) @ vh

    def gram(matrix, c):
        eigenvalues, v = jnp.linalg.eigh(matrix.T @ matrix)
        values = jnp.sqrt(jnp.maximum(eigenvalues, 1e-30))
        return matrix @ ((v * (kept(values, c) / values)) @ v.T)

    def ours(matrix, c):
        return optaxclip.clip_singular_values(c, smooth=soft).update(matrix, None)[0]

    def by(form, matrix, c):
        size = jnp.max(jnp.abs(matrix))
        out, _ = form.capped(matrix[None] / size, c[None] / size, c[None] / size, soft)
        return c * out

    programs = {"ours": ours, "SVD": svd, "Gram": gram}
    programs["decompositions"] = functools.partial(by, decompositions)
    programs["iterations"] = functools.partial(by, iterations)
    return {name: program for name, program in programs.items() if name not in skip}


def norms(skip):
    def ours(matrix):
        norm = optaxclip.norms.spectral_norm()
        return norm.measure(Leaves(matrix))

    programs = {
        "ours": ours,
        "SVD": lambda matrix: jnp.linalg.svd(matrix, compute_uv=False)[0],
        "decompositions": lambda matrix: decompositions.largest_singular_values(matrix[None]),
        "iterations": lambda matrix: iterations.largest_singular_values(matrix[None]),
    }
    return {name: program for name, program in programs.items() if name not in skip}


def gaussian(rng, shape):
    return np.float32(rng.normal(size=shape))


def decaying(rng, shape):
    return np.float32(spectral.with_singular_values(rng, shape, np.geomspace(1, 1e-6, min(shape))))


SPECTRA = {"Gaussian": gaussian, "decaying": decaying}

if __name__ == "__main__":
    main()
