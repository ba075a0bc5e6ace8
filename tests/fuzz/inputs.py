"""Adversarial trees, bounds and sequences of norms, all from a seed.

`example(name, seed)` gives the same tree again, to paste into a REPL.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

FLOAT32 = np.finfo(np.float32)
TINY, LARGEST = float(FLOAT32.tiny), float(FLOAT32.max)
# From zero through subnormals to the largest float32 and inf.
BOUNDS = [0.0, 1e-45, 1e-40, TINY, 1e-38, 1e-30, 1e-20, 1e-3, 1.0, 1e3, 1e20, 1e38, LARGEST, np.inf]
SPECIAL = [0.0, -0.0, 1e-45, -1e-40, TINY, 1e-38, 1e-30, -1e-20, 1e-3, 1.0, -1.0, 3.0, 1e20, -1e30, 3e38, LARGEST]


def _is_held(name: str) -> bool:
    """Whether arrays on this machine hold a dtype; float6 has a name and no arrays."""
    try:
        jax.device_put(np.ones(1, getattr(jnp, name).dtype)).block_until_ready()  # which compiles nothing
    except (jax.errors.JaxRuntimeError, TypeError, ValueError):
        return False
    return True


NARROW = [name for name in sorted(dir(jnp)) if name.startswith(("float4_", "float6_", "float8_")) and _is_held(name)]


class Pair(NamedTuple):
    left: Any
    right: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: Any
    bias: Any


class Array(NamedTuple):
    """A place in a tree for an array of floats."""

    shape: tuple[int, ...]
    dtype: str = "float32"


OTHERS = {
    "count": np.arange(3, dtype=np.int32),
    "flags": np.array([True, False]),
    "no_gradient": np.zeros(2, jax.dtypes.float0),
    "nothing": None,
}
TREES = {
    "scalar": Array(()),
    "vector": Array((7,)),
    "nested": {
        "a": [Array(()), None, (Array((1,)), Array((3, 5)))],
        "b": Layer(Array((0,)), Array((2, 3, 2))),
        "others": OTHERS,
    },
    "sixteen": Pair(Layer(Array((3, 5), "float16"), Array((5,), "bfloat16")), [Array((), "bfloat16"), Array((4, 1))]),
    "float16": [Array((3, 5), "float16"), Array((), "float16")],
    "bfloat16": (Array((5, 3), "bfloat16"), {"x": Array((1,), "bfloat16")}),
    "complex": Pair(Array((3,), "complex64"), {"real": Array((2, 3)), "one": Array((), "complex64")}),
    "large": {"kernel": Array((131, 130)), "bias": Array((130,))},
    "wide": [Array((3, 16400)), Array((3,), "bfloat16")],
    "empty": {},
    "no floats": OTHERS | {"empty": Array((0, 3))},
    "double": {"a": Array((3, 4), "float64"), "b": [Array((5,), "float64"), Array((2,), "complex128")]},
    **{name: [Array((3, 4), name), Array((5,), name)] for name in NARROW},
}


class Example(NamedTuple):
    updates: Any
    params: Any
    rng: np.random.Generator


def is_place(node: Any) -> bool:
    return isinstance(node, Array)


def example(name: str, seed: int) -> Example:
    """Updates and parameters for the tree of that name."""
    rng = np.random.default_rng([seed, list(TREES).index(name)])
    places, treedef = jax.tree.flatten(TREES[name], is_leaf=is_place)
    kind = str(rng.choice(["one scale", "all scales", "special", "largest", "small", "nonfinite"]))
    updates, params = (
        treedef.unflatten([numbers(rng, *place, kind=kind) if is_place(place) else place for place in places])
        for kind in (kind, "all scales" if rng.random() < 0.3 else "one scale")
    )
    return Example(updates, params, rng)


def numbers(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, kind: str) -> np.ndarray:
    """Numbers over the range of a dtype; as a NumPy array of it."""
    if dtype.startswith("complex"):
        part = {"complex64": "float32", "complex128": "float64"}[dtype]
        real, imag = (numbers(rng, shape, part, kind) for _ in range(2))
        return (real + 1j * imag).astype(dtype) if kind != "nonfinite" else real.astype(dtype)
    info = jnp.finfo(dtype)
    low, high = np.log10(float(info.smallest_subnormal)), np.log10(float(info.max))
    mantissa = rng.uniform(0.1, 1, shape) * rng.choice([-1, 1], shape)
    x = {
        "one scale": lambda: mantissa * 10.0 ** rng.uniform(low + 1, high),
        "all scales": lambda: mantissa * 10.0 ** rng.uniform(low, high, shape),
        "special": lambda: rng.choice(SPECIAL, shape),
        "largest": lambda: mantissa * float(info.max),
        "small": lambda: mantissa * 10.0 ** rng.uniform(low, low + 8),
        "nonfinite": lambda: mantissa * 10.0 ** rng.uniform(low + 1, high),
    }[kind]()
    x = np.clip(np.where(rng.random(shape) < 0.1, 0.0, x), -float(info.max), float(info.max))
    x = np.asarray(x)
    if dtype == "float8_e8m0fnu":  # which has powers of two alone
        x = np.maximum(np.abs(x), float(info.tiny))
    if kind == "nonfinite" and x.size and rng.random() < 0.7:
        x.flat[rng.integers(x.size)] = rng.choice([np.nan, np.inf, -np.inf])
    return x.astype(dtype)


def bound(rng: np.random.Generator, norm: Any) -> np.float32:
    """A bound from the whole range, or one about a norm."""
    if rng.random() < 0.5 and np.isfinite(norm):
        with np.errstate(all="ignore"):
            return np.float32(norm * rng.choice([0.01, 0.5, 0.9999, 1.0001, 2.0]))
    return np.float32(rng.choice(BOUNDS))


def pasteable(x: Any) -> str:
    """An array as an expression, or its shape where it is long."""
    x = np.asarray(x)
    if x.size > 20:
        return f"<{x.dtype} array of shape {x.shape}>"
    plain = x.astype(np.complex128 if x.dtype.kind == "c" else np.float64)
    return f"jnp.array({plain.tolist()}, {str(x.dtype)!r})"


# Sequences of norms.


def sequences(seed: int, number: int, steps: int) -> np.ndarray:
    """That many sequences of norms: an array of sequences by steps, float32."""
    rng = np.random.default_rng(seed)
    return np.stack([_sequence(rng, steps) for _ in range(number)])


def _sequence(rng: np.random.Generator, steps: int) -> np.ndarray:
    level = 10.0 ** rng.uniform(-38, 38) if rng.random() < 0.4 else 10.0 ** rng.uniform(-3, 3)
    x = np.full(steps, level)
    if rng.random() < 0.7:
        x *= np.exp(rng.choice([0.01, 0.3, 2.0]) * rng.standard_normal(steps))
    for _ in range(rng.integers(0, 3)):  # a lasting rise or drop
        x[rng.integers(steps) :] *= 10.0 ** (rng.choice([-1, 1]) * rng.uniform(1, 30))
    for _ in range(rng.integers(0, 4)):  # a spike, or the opposite
        x[rng.integers(steps)] *= 10.0 ** (rng.choice([-1, 1]) * rng.uniform(1, 30))
    x = np.clip(x, 0, LARGEST)
    for value in (0.0, 1e-40, TINY, LARGEST, np.nan, np.inf):
        if rng.random() < 0.1:
            x[rng.integers(steps)] = value
    if rng.random() < 0.1:
        x[: rng.integers(1, steps)] = 0
    return x.astype(np.float32)
