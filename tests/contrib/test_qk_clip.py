"""`contrib.qk_clip` against a transcription of algorithm 1 of the report of Kimi K2, in NumPy's float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip as oc
from optaxclip.contrib import Projection, qk_clip
from tests.support.meshes import AUTO, EXPLICIT, P, put

MODEL, HEADS, DIM, ROTARY = 3, 4, 6, 2
LOGITS = np.array([400.0, 50.0, 1e4, 100.0], np.float32)
QUERY, KEY = Projection("query"), Projection("key")


def reference(w, kind, logits, axis, bound=100.0, alpha=0.5, queries_per_key=1, tail=0):
    """arXiv:2507.20534, algorithm 1, for weights with an axis of heads, and one of their entries behind it."""
    w = np.array(w, np.float64)
    etas = np.minimum(1.0, bound / np.max(np.reshape(np.float64(logits), (-1, queries_per_key)), axis=1))
    etas = np.repeat(etas, queries_per_key) if kind == "query" else etas
    for head, eta in enumerate(etas):
        at = (slice(None),) * axis + (head,)
        own, rest = (eta**alpha, eta) if kind == "query" else (eta ** (1 - alpha), 1.0)
        size = w.shape[axis + 1]
        w[at] *= np.reshape([own] * (size - tail) + [rest] * tail, (size,) + (1,) * (w.ndim - axis - 2))
    return w


def numbers(rng, *shape, dtype="float32", scale=1.0):
    return (scale * rng.normal(size=shape)).astype(jnp.dtype(dtype))


def zeros(tree):
    return jax.tree.map(np.zeros_like, tree)


def plus(params, updates):
    return jax.tree.map(lambda w, u: np.float64(w) + np.float64(u), params, updates)


def compiled(tx):
    return jax.jit(lambda updates, params, logits: tx.update(updates, tx.init(params), params, max_logits=logits)[0])


def after(tx, params, updates, logits):
    return plus(params, compiled(tx)(updates, params, logits))


def test_multi_head(rng):
    params = {"q": numbers(rng, MODEL, HEADS, DIM), "k": numbers(rng, MODEL, HEADS, DIM), "v": numbers(rng, 5)}
    updates = jax.tree.map(lambda w: numbers(rng, *w.shape, scale=0.1), params)
    moved = plus(params, updates)
    specs = {"q": QUERY, "k": KEY, "v": None}
    steps = {alpha: compiled(qk_clip(100.0, projections=specs, alpha=alpha)) for alpha in (0.5, 0.0, 0.3, 1.0)}
    together = jax.jit(lambda *given: {alpha: step(*given) for alpha, step in steps.items()})
    for alpha, clipped in together(updates, params, LOGITS).items():
        found = plus(params, clipped)
        for name, kind in (("q", "query"), ("k", "key")):
            expected = reference(moved[name], kind, LOGITS, 1, alpha=alpha)
            np.testing.assert_allclose(found[name], expected, atol=1e-6, err_msg=f"{name}, alpha={alpha}")
        np.testing.assert_array_equal(found["v"], moved["v"])


@pytest.mark.parametrize("merged", [False, True])
def test_grouped_queries(rng, merged):
    """Two query heads to a key head: the group has the factor of the larger logit."""
    q, k = numbers(rng, MODEL, HEADS, DIM), numbers(rng, MODEL, HEADS // 2, DIM)
    params = {"q": q.reshape(MODEL, -1) if merged else q, "k": k.reshape(MODEL, -1) if merged else k}
    axis = -1 if merged else -2
    specs = {"q": Projection("query", axis), "k": Projection("key", axis)}
    tx = qk_clip(projections=specs, queries_per_key=2)
    found = after(tx, params, zeros(params), LOGITS)
    for name, kind, whole in (("q", "query", q), ("k", "key", k)):
        expected = reference(whole, kind, LOGITS, 1, queries_per_key=2)
        np.testing.assert_allclose(found[name].reshape(whole.shape), expected, atol=1e-6)


@pytest.mark.parametrize("layout", ["heads", "merged", "torch"])
def test_latent_attention(rng, layout):
    """Rotary queries get the whole factor, values and the shared rotary key none."""
    q, kv = numbers(rng, MODEL, HEADS, DIM + ROTARY), numbers(rng, MODEL, HEADS, DIM + 5)
    lay = {
        "heads": lambda w: w,
        "merged": lambda w: w.reshape(MODEL, -1),
        "torch": lambda w: w.reshape(MODEL, -1).T,
    }[layout]
    axis = {"heads": -2, "merged": -1, "torch": 0}[layout]
    params = {"q_up": lay(q), "kv_up": lay(kv), "k_rotary": numbers(rng, MODEL, ROTARY)}
    specs = {"q_up": Projection("query", axis, ROTARY), "kv_up": Projection("key", axis, 5)}
    found = after(qk_clip(projections=specs.get), params, zeros(params), LOGITS)
    for name, kind, whole, tail in (("q_up", "query", q, ROTARY), ("kv_up", "key", kv, 5)):
        expected = lay(np.float32(reference(whole, kind, LOGITS, 1, tail=tail)))
        np.testing.assert_allclose(found[name], expected, atol=1e-6)
    np.testing.assert_array_equal(found["k_rotary"], params["k_rotary"])


def test_the_largest_logit_comes_to_the_bound(rng):
    """The same batch again, with the weights afterwards, in attention itself; biases are weights, too."""
    shapes = {"w": (MODEL, HEADS, DIM), "b": (HEADS, DIM)}
    params = {name: {at: numbers(rng, *shape, scale=20) for at, shape in shapes.items()} for name in "qk"}
    x = numbers(rng, 8, MODEL)

    def largest(params):
        q, k = (np.einsum("nm,mhd->hnd", x, params[name]["w"]) + params[name]["b"][:, None] for name in "qk")
        return np.max(np.einsum("hnd,hmd->hnm", q, k), axis=(1, 2))

    before = largest(params)
    bound = float(np.sort(before)[1])
    found = after(qk_clip(bound, projections={"q": QUERY, "k": KEY}), params, zeros(params), before)
    np.testing.assert_allclose(largest(found), np.minimum(before, bound), rtol=1e-5)


def test_layers(rng):
    """A dict has logits for each layer, stacked layers have them in one array; None and other layers are left."""
    layers = {f"layer_{i}": {"q": numbers(rng, MODEL, HEADS, DIM), "out": numbers(rng, 3)} for i in range(3)}
    tx = qk_clip(projections=lambda path: QUERY if path.endswith("q") else None, alpha=1.0)
    found = after(
        tx, layers, zeros(layers), {"layer_0": LOGITS, "layer_1": None, "layer_2": {"q": LOGITS[::-1].copy()}}
    )
    for i, logits in enumerate([LOGITS, np.ones(HEADS), LOGITS[::-1]]):
        expected = reference(layers[f"layer_{i}"]["q"], "query", logits, 1, alpha=1.0)
        np.testing.assert_allclose(found[f"layer_{i}"]["q"], expected, atol=1e-6)
    stacked = np.stack([layers["layer_0"]["q"], layers["layer_2"]["q"]])
    both = after(qk_clip(projections=QUERY, alpha=1.0), stacked, zeros(stacked), np.stack([LOGITS, LOGITS[::-1]]))
    np.testing.assert_allclose(both, np.stack([found["layer_0"]["q"], found["layer_2"]["q"]]), atol=1e-6)


def test_logits_that_ask_for_nothing(rng):
    w, u = numbers(rng, MODEL, HEADS, DIM), numbers(rng, MODEL, HEADS, DIM)
    step = compiled(qk_clip(projections=QUERY, alpha=1.0))
    for bad in (np.nan, np.inf, -np.inf, -5.0, 0.0, 1e-40):
        logits = LOGITS.copy()
        logits[2] = bad
        found = np.asarray(step(u, w, logits))
        np.testing.assert_array_equal(found[:, [1, 2, 3]], u[:, [1, 2, 3]], err_msg=str(bad))  # bit for bit
        np.testing.assert_allclose(w[:, 0] + found[:, 0], 0.25 * (w[:, 0] + u[:, 0]), atol=1e-6)


def test_no_logits_at_a_step(rng):
    w, u = numbers(rng, MODEL, HEADS, DIM), numbers(rng, MODEL, HEADS, DIM)
    tx = qk_clip(projections=QUERY, alpha=1.0)
    np.testing.assert_array_equal(tx.update(u, tx.init(w), w, max_logits=None)[0], u)


@pytest.mark.parametrize("size", [1e38, 3e38])
def test_extreme_logits(rng, size):
    w = numbers(rng, MODEL, HEADS, DIM)
    found = after(qk_clip(1e-3, projections=QUERY, alpha=1.0), w, zeros(w), np.full(HEADS, size, np.float32))
    assert np.all(np.isfinite(found))
    np.testing.assert_allclose(found, 0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_weights(rng, dtype):
    w, u = (numbers(rng, MODEL, HEADS, DIM, dtype=dtype, scale=scale) for scale in (1.0, 0.1))
    found = compiled(qk_clip(projections=QUERY, alpha=1.0))(u, w, LOGITS)
    assert found.dtype == w.dtype
    expected = reference(np.float64(w) + np.float64(u), "query", LOGITS, 1, alpha=1.0)
    np.testing.assert_allclose(np.float64(w) + np.float64(found), expected, atol=4 * float(jnp.finfo(dtype).eps))


def test_none_updates_are_left_and_a_chain_hands_the_logits_on(rng):
    params = {"q": numbers(rng, MODEL, HEADS, DIM), "k": numbers(rng, MODEL, HEADS, DIM)}
    tx = optax.chain(oc.clip_by_global_norm(1.0), optax.adam(0.1), qk_clip(projections={"q": QUERY, "k": KEY}))
    grads = jax.tree.map(np.ones_like, params)
    step = jax.jit(lambda state, logits: tx.update(grads, state, params, max_logits=logits))
    state = jax.jit(tx.init)(params)
    for _ in range(2):
        updates, state = step(state, LOGITS)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(updates))
    alone = qk_clip(projections={"q": QUERY, "k": KEY})
    assert jax.eval_shape(compiled(alone), {"q": grads["q"], "k": None}, params, LOGITS)["k"] is None


@pytest.mark.parametrize("split", [True, False], ids=["heads on several devices", "the model"])
def test_in_shard_map(rng, split):
    w, u = numbers(rng, 8, HEADS, DIM), numbers(rng, 8, HEADS, DIM)
    tx = qk_clip(projections=QUERY, alpha=1.0)
    spec, logits = (P(None, "data"), P("data")) if split else (P("data"), P())
    step = jax.shard_map(
        lambda u, w, logits: tx.update(u, tx.init(w), w, max_logits=logits)[0],
        mesh=AUTO,
        in_specs=(spec, spec, logits),
        out_specs=spec,
    )
    expected = reference(np.float64(w) + u, "query", LOGITS, 1, alpha=1.0)
    np.testing.assert_allclose(w + jax.jit(step)(u, w, LOGITS), expected, atol=1e-6)


def test_logits_that_differ_between_devices_are_refused(rng):
    w = numbers(rng, MODEL, HEADS, DIM)
    tx = qk_clip(projections=QUERY, alpha=1.0)
    step = jax.shard_map(
        lambda w, logits: tx.update(w, tx.init(w), w, max_logits=logits)[0],
        mesh=AUTO,
        in_specs=(P(), P("data")),
        out_specs=P(),
    )
    with pytest.raises(ValueError, match=r"max_logits differ between the devices along mesh axes \('data',\).*pmax"):
        jax.eval_shape(step, w, np.ones(4 * HEADS, np.float32))


@pytest.mark.parametrize("on", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize("logits_spec", [P(), P("data")], ids=str)
def test_under_jit_on_a_mesh(rng, on, logits_spec):
    w, u = numbers(rng, MODEL, HEADS, DIM), numbers(rng, MODEL, HEADS, DIM)
    spec = P(None, "data")
    laid_out = put((u, w, LOGITS), (spec, spec, logits_spec), on)
    with jax.set_mesh(on):
        found = compiled(qk_clip(projections=QUERY, alpha=1.0))(*laid_out)
    expected = reference(np.float64(w) + u, "query", LOGITS, 1, alpha=1.0)
    np.testing.assert_allclose(w + np.asarray(found), expected, atol=1e-6)
    assert found.sharding.is_equivalent_to(laid_out[0].sharding, 3)


BAD = {
    "a word": (lambda: Projection("value"), "kind must be one of 'query', 'key', got 'value'"),
    "an axis": (lambda: Projection("key", 1.5), "axis must be a whole number, got 1.5"),
    "a tail": (lambda: Projection("key", tail=-1), "tail must be a whole number of at least 0, got -1"),
    "a bound of 0": (lambda: qk_clip(0.0, projections=QUERY), "max_logit must be more than 0, got 0.0"),
    "alpha": (lambda: qk_clip(projections=QUERY, alpha=1.5), "alpha must be at least 0 and at most 1, got 1.5"),
    "names": (lambda: qk_clip(projections={"q": "query"}), "projections must be Projections and None.*got 'query'"),
    "nothing": (lambda: qk_clip(projections={"q": None}), "names no leaf"),
    "no group": (lambda: qk_clip(projections=QUERY, queries_per_key=0), "queries_per_key must be a whole number"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    build, words = BAD[name]
    with pytest.raises(ValueError, match=words):
        build()


@pytest.mark.parametrize(
    ("options", "logits", "words"),
    [
        ({}, np.ones(3), r"leaf 'q' of shape \(3, 4, 6\) has no heads of shape \(3,\)"),
        ({}, np.ones((2, HEADS)), r"no heads of shape \(2, 4\)"),
        ({"queries_per_key": 3}, LOGITS, "max_logits must have a multiple of queries_per_key=3 heads, got 4"),
        ({}, 400.0, "max_logits must hold arrays of real numbers, one per head, got 400.0"),
        ({}, {"k": LOGITS}, "max_logits has no entry for the leaf 'q'; it has 'k'"),
        ({}, {"q": LOGITS, "k": LOGITS}, "max_logits has an entry for 'k', but projections names no leaf there"),
        ({"projections": Projection("query", tail=7)}, LOGITS, "tail must fit into a head of 6 entries"),
        (
            {"projections": lambda path: "query"},
            LOGITS,
            "projections must give a Projection or None for each leaf, got 'query'",
        ),
        (
            {},
            [400.0, 50.0, 1e4, 100.0],
            r"got 400.0 at '0'; pass a list of numbers as an array, jnp.asarray\(max_logits\)",
        ),
        ({}, {"q": [400.0]}, "got 400.0 at 'q/0'; pass a list of numbers"),
        ({}, np.ones(0), r"no heads of shape \(0,\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_logits(rng, options, logits, words):
    params = {"q": numbers(rng, MODEL, HEADS, DIM)}
    tx = qk_clip(**{"projections": QUERY, "alpha": 1.0} | options)
    with pytest.raises(ValueError, match=words):
        tx.update(params, tx.init(params), params, max_logits=logits)


def test_missing_logits_and_parameters(rng):
    w = numbers(rng, MODEL, HEADS, DIM)
    tx = qk_clip(projections=QUERY, alpha=1.0)
    with pytest.raises(ValueError, match=r"qk_clip needs the largest logit.*call update\(\.\.\., max_logits=\.\.\.\)"):
        tx.update(w, tx.init(w), w)
    with pytest.raises(ValueError, match="not passing `params`"):
        tx.update(w, tx.init(w), max_logits=LOGITS)


# Projections that would clip nothing, or a part, unnoticed.


def nested(rng, **leaves):
    return {"layers": {"attn": {name: numbers(rng, *shape) for name, shape in leaves.items()}}}


HEADED = {"q": (MODEL, HEADS, DIM), "k": (MODEL, HEADS, DIM)}
SPECS = {"q": QUERY, "k": KEY}


def once(tx, params, updates=None, logits=LOGITS):
    return tx.update(params if updates is None else updates, tx.init(params), params, max_logits=logits)[0]


@pytest.mark.parametrize("logits", [LOGITS, None], ids=["logits", "none"])
def test_a_function_that_names_no_leaf_is_refused(rng, logits):
    tx = qk_clip(projections=SPECS.get)  # the paths are whole
    with pytest.raises(ValueError, match="projections names no leaf of 'layers/attn/k', 'layers/attn/q'"):
        once(tx, nested(rng, **HEADED), logits=logits)


def test_named_leaves_may_be_missing(rng):
    """None, masked one by one or with all of a layer, or no leaf at all."""
    tx = qk_clip(projections=lambda path: SPECS.get(path.split("/")[-1]))
    params = nested(rng, **HEADED, out=(3,))
    out = params["layers"]["attn"]["out"]
    frozen = {"layers": {"attn": {"q": None, "k": None, "out": out}}}
    hidden = optax.MaskedNode()
    trees = [{"layers": {"attn": {"q": hidden, "k": hidden, "out": out}}}, {"layers": hidden, "out": out}, {}]
    alone = jax.jit(lambda trees: [once(tx, tree, logits=None) for tree in trees])([frozen, *trees])
    assert jax.tree.all(jax.tree.map(np.array_equal, alone, [frozen, *trees]))
    found = compiled(tx)(frozen, params, LOGITS)
    assert found["layers"]["attn"]["q"] is None
    np.testing.assert_array_equal(found["layers"]["attn"]["out"], out)


@pytest.mark.parametrize(
    ("names", "alpha", "words"),
    [
        ("q", 0.5, "names queries but no keys, so at alpha=0.5 .* pass alpha=1"),
        ("q", 0.0, "names queries but no keys"),
        ("k", 0.5, "names keys but no queries, so at alpha=0.5 .* pass alpha=0"),
        ("k", 1.0, "names keys but no queries"),
        ("q", 1.0, None),
        ("k", 0.0, None),
        ("qk", 0.5, None),
    ],
)
@pytest.mark.parametrize("by_path", [False, True], ids=["tree", "function"])
def test_queries_or_keys_alone_need_all_of_the_factor(rng, names, alpha, words, by_path):
    params = {name: numbers(rng, *shape) for name, shape in HEADED.items()}
    specs = {name: SPECS[name] if name in names else None for name in params}
    tx = qk_clip(projections=specs.get if by_path else specs, alpha=alpha)
    if words:
        with pytest.raises(ValueError, match=words):
            once(tx, params)
    else:
        found = after(tx, params, zeros(params), LOGITS)
        for name, kind in (("q", "query"), ("k", "key")):
            expected = reference(params[name], kind, LOGITS, 1, alpha=alpha) if name in names else params[name]
            np.testing.assert_allclose(found[name], expected, atol=1e-6)


def test_queries_alone_where_something_else_is_there(rng):
    """A rotary tail, keys that are frozen or another transformation's, and an alpha that is traced."""
    q = {"q": numbers(rng, *HEADED["q"])}
    for projections, params in (
        ({"q": Projection("query", tail=2)}, q),
        (SPECS.get, q | {"k": None}),
        (lambda path: SPECS["q"], q | {"k": optax.MaskedNode()}),
    ):
        tx = qk_clip(projections=projections)
        jax.eval_shape(compiled(tx), params, params, LOGITS)
    jax.eval_shape(lambda alpha: once(qk_clip(projections={"q": QUERY}, alpha=alpha), q), 0.5)


def test_entries_of_the_logits_may_be_as_fine_as_the_leaves(rng):
    params = {name: numbers(rng, *shape) for name, shape in HEADED.items()}
    tx = qk_clip(projections=SPECS)
    step = compiled(tx)
    one, each = step(params, params, LOGITS), step(params, params, {"q": LOGITS, "k": LOGITS.copy()})
    assert jax.tree.all(jax.tree.map(np.array_equal, one, each))


FLAT_QUERY, FLAT_KEY = Projection("query", -1), Projection("key", -1)


@pytest.mark.parametrize("number", [4, 8])
@pytest.mark.parametrize("stacked", [False, True])
def test_flat_heads_of_two_sizes_are_refused(rng, number, stacked):
    """Eight query heads and four key heads of four entries each, and nobody says so."""
    front = (2,) if stacked else ()
    params = {"q": numbers(rng, *front, MODEL, 32), "k": numbers(rng, *front, MODEL, 16)}
    logits = np.full((*front, number), 400.0)
    sizes = {4: "8 entries, .* 'k' have 4", 8: "4 entries, .* 'k' have 2"}[number]
    tx = qk_clip(projections={"q": FLAT_QUERY, "k": FLAT_KEY})
    with pytest.raises(ValueError, match=rf"leaf 'q' have {sizes} \(without tails\): queries_per_key=1"):
        once(tx, params, logits=logits)


@pytest.mark.parametrize("name", ["grouped", "two sizes of layers", "tails", "all tail", "biases", "entries in front"])
def test_heads_that_fit(rng, name):
    """What has heads of one size in a layer, or heads of which the size is not known."""
    shapes, specs, options = {
        "grouped": ([(3, 32), (3, 16)], [FLAT_QUERY, FLAT_KEY], {"queries_per_key": 2}),
        "two sizes of layers": ([(3, 16), (3, 32), (3, 16), (3, 32)], [FLAT_QUERY, FLAT_QUERY, FLAT_KEY, FLAT_KEY], {}),
        "tails": ([(3, 32), (3, 40)], [Projection("query", -1, 2), Projection("key", -1, 4)], {}),
        "all tail": ([(3, 16), (3, 8), (3, 16)], [FLAT_QUERY, Projection("query", -1, 2), FLAT_KEY], {}),
        "biases": ([(3, 16), (16,), (4, 2)], [FLAT_QUERY, FLAT_QUERY, KEY], {}),
        "entries in front": ([(4, 3, 2), (3, 16)], [Projection("query", 0), FLAT_KEY], {}),
    }[name]
    logits = np.full(8 if name in ("grouped", "tails", "all tail") else 4, 400.0)
    logits = logits[:4] if name in ("tails", "all tail") else logits
    params = [numbers(rng, *shape) for shape in shapes]
    tx = qk_clip(projections=specs, **options)
    assert jax.tree.map(jnp.shape, jax.eval_shape(lambda params: once(tx, params, logits=logits), params)) == shapes


@pytest.mark.parametrize(
    "dtypes", [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16")], ids=str
)
def test_no_head_rounds_to_0(rng, dtypes):
    """However large its logit. What is left of it is at most the precision of the weights, plus rounding."""
    kind, update_kind = dtypes
    step = compiled(qk_clip(projections=QUERY, alpha=1.0))
    for moving in (0.0, 0.01):
        w = numbers(rng, MODEL, HEADS, DIM, dtype=kind)
        u = numbers(rng, MODEL, HEADS, DIM, dtype=update_kind, scale=moving)
        for factor in (1e-3, 1e-6, 1e-30):
            found = np.asarray(step(u, w, np.full(HEADS, 100 / factor, np.float32)))
            left = np.abs(np.float64((w + found).astype(w.dtype)))
            assert np.all(np.max(left, axis=(0, 2)) > 0), (moving, factor)
            size = np.abs(np.float64(w) + np.float64(u))
            assert np.all(left <= 2 * size / 128 + np.abs(np.float64(w)) / 256), (moving, factor)


def test_the_logits_of_the_last_micro_batch_count(rng):
    params = {name: numbers(rng, *shape) for name, shape in HEADED.items()}
    tx = optax.MultiSteps(qk_clip(projections=SPECS), 2)
    state, step = tx.init(params), jax.jit(tx.update)
    for logits in (LOGITS, np.full(HEADS, 400.0, np.float32)):
        updates, state = step(zeros(params), state, params, max_logits=logits)
    np.testing.assert_allclose(params["q"] + updates["q"], 0.5 * params["q"], atol=1e-6)
