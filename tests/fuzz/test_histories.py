"""Sequences of norms through everything that has a history, step by step against longdouble.

One program runs many sequences, one after the other, each with numbers of its own for what may be traced.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip as oc
from optaxclip import contrib, norms, thresholds
from tests.fuzz import histories as h
from tests.fuzz import inputs
from tests.support import published

STEPS = 48
DECAYS = [0.0, 1e-6, 1e-3, 0.1, 0.5, 0.9, 0.99, 0.999, 1 - 2.0**-20]
ROUNDING = 2e-4  # of a history of float32


class Method(NamedTuple):
    """Something with a history, beside its oracle.

    Attributes:
      make: one number of each of the options, traced -> transformation.
      expect: (sequences, options) -> what comes out.
      options: what to draw each number from.
      leaves: of how many leaves of one number a gradient is.
      signed: whether signs matter to the oracle.
    """

    make: Callable[[Any], Any]
    expect: Callable[[np.ndarray, Any], h.Run]
    options: dict[str, list[float]]
    leaves: int = 1
    signed: bool = False


def by_rule(oracle, threshold, options, *, takes_zero=False, **static):
    """A threshold beside its rule."""

    def expect(x, o):
        rule, start = oracle(o, **static)
        return h.follow(rule, start, x, takes_zero=takes_zero)

    return Method(lambda o: oc.clip_by(norms.leaf_norm(), threshold(o)), expect, options)


def zscore(clip_to, warmup, patience):
    return by_rule(
        h.zscore,
        lambda o: thresholds.zscore(o["z"], decay=o["decay"], warmup_steps=warmup, patience=patience, clip_to=clip_to),
        {"z": [0.1, 1.0, 2.5, 10.0], "decay": DECAYS},
        warmup=warmup,
        patience=patience,
        clip_to=clip_to,
    )


def zclip(warmup):
    def expect(x, o):
        rule, start = h.zscore(o, warmup=warmup, patience=33, clip_to="reciprocal")
        return h.follow(h.at_most(rule, o["c"]), start, x)

    return Method(
        lambda o: published.zclip(o["z"], decay=o["decay"], warmup_steps=warmup, max_norm=o["c"]),
        expect,
        {"z": [2.5], "decay": [0.9, 0.97], "c": [0.0, 1e-3, 1.0, 1e20, np.inf]},
    )


def mean_std(window, warmup_steps, ddof=0, *, current=False, raw=False, patience=None):
    return by_rule(
        h.mean_std,
        lambda o: thresholds.mean_std(
            o["num_std"],
            window=window,
            warmup_steps=warmup_steps,
            ddof=ddof,
            include_current=current,
            take_in="raw" if raw else "clipped",
            patience=patience,
        ),
        {"num_std": [0.0, 0.5, 3.0, 1e3]},
        window=window,
        warmup_steps=warmup_steps,
        ddof=ddof,
        current=current,
        raw=raw,
        patience=patience,
    )


def quantile(window):
    return by_rule(
        h.quantile,
        lambda o: thresholds.quantile(o["q"], window=window),
        {"q": [0.0, 0.1, 0.25, 0.5, 0.9, 1.0]},
        window=window or STEPS,  # all are exact up to 64
    )


def order_statistic(percentile, window):
    return by_rule(
        h.order_statistic,
        lambda o: thresholds.order_statistic(percentile, window=window),
        {},
        percentile=percentile,
        window=window,
    )


def ema_band(**static):
    return by_rule(
        h.ema_band,
        lambda o: thresholds.ema_band(o["ratio"], decay=o["decay"], min_norm=o["min_norm"], **static),
        {"ratio": [1.0, 1.5, 10.0], "decay": DECAYS, "min_norm": [0.0, 1e-30, 1e-3]},
        **static,
    )


def adagc(warmup, max_norm):
    return Method(
        lambda o: published.adagc(o["ratio"], decay=o["decay"], warmup_steps=warmup, warmup_max_norm=max_norm),
        lambda x, o: h.adagc(x, o, warmup=warmup, max_norm=max_norm),
        {"ratio": [1.0, 1.05, 2.0], "decay": DECAYS},
        leaves=2,
    )


def skips(threshold, oracle, options, max_consecutive, **static):
    return Method(
        lambda o: oc.skip_spikes(optax.identity(), threshold(o), max_consecutive=max_consecutive),
        lambda x, o: h.skips(*oracle(o, **static), x, max_consecutive),
        options,
    )


def nothing_spikes(o):
    return lambda n, s: h.Judged(0, np.full(n.shape, h.L(np.inf)), s), {}


def spam(idle, period):
    return Method(
        lambda o: contrib.spam_clip(o["ratio"], decay=o["decay"], warmup_steps=idle, period=period),
        lambda x, o: h.spam_clip(x, o, idle=idle, period=period),
        {"ratio": [1.0, 4.0, 5000.0], "decay": DECAYS},
        signed=True,
    )


def acclip(alpha):
    return Method(
        lambda o: contrib.scale_by_acclip(o["b1"], o["b2"], alpha=alpha, eps=o["eps"]),
        lambda x, o: h.acclip(x, o, alpha=alpha),
        {"b1": DECAYS, "b2": DECAYS, "eps": [0.0, 1e-5]},
        signed=True,
    )


def mixed(smooth):
    return Method(
        lambda o: contrib.mixed_clip(o["c"], decay=o["decay"], mix=o["mix"], smooth=smooth),
        lambda x, o: h.mixed_clip(x, o, smooth=smooth),
        {"c": inputs.BOUNDS[3:], "decay": DECAYS, "mix": [0.0, 0.3, 0.7, 1.0]},
        signed=True,
    )


def carry(by_value):
    return Method(
        lambda o: oc.with_carry((oc.clip if by_value else oc.clip_by_global_norm)(o["c"])),
        lambda x, o: h.with_carry(x, o, by_value=by_value),
        {"c": inputs.BOUNDS[3:]},
        signed=True,
    )


BOTH = {"b1": DECAYS, "b2": DECAYS}
NO_LIMITS = {"min_ratio": None, "max_down": None, "max_up": None, "initial": None}
QUICK = {
    "zscore": zscore("reciprocal", 4, 3),
    "mean_std": mean_std(4, 2, patience=2),
    "quantile, all": quantile(None),
    "order_statistic": order_statistic(25.0, 4),
    "tracked_quantile": by_rule(
        h.tracked_quantile,
        lambda o: thresholds.tracked_quantile(o["q"], learning_rate=o["rate"], initial=o["initial"]),
        {"q": [0.0, 0.5, 0.9, 1.0], "rate": [0.0, 0.2, 5.0, 100.0], "initial": [inputs.TINY, 1.0, 3e38]},
    ),
    "ema_band": ema_band(**NO_LIMITS),
    "adagc": adagc(4, 1.0),
    "average": by_rule(h.average, lambda o: thresholds.average(o["decay"]), {"decay": DECAYS}),
    "growth": by_rule(h.growth, lambda o: thresholds.growth(o["growth"]), {"growth": [1e-3, 1.0, 1.01, 2.0, 1e30]}),
    "normalised": by_rule(
        h.normalised,
        lambda o: thresholds.normalised(o["b1"], o["b2"], eps=o["eps"]),
        BOTH | {"eps": [0.0, 1e-8]},
        takes_zero=True,
    ),
    "spam_clip": spam(2, None),
    "scale_by_acclip": acclip(1.0),
    "scale_by_stable_adam": Method(
        lambda o: contrib.scale_by_stable_adam(o["b1"], o["b2"], eps=o["eps"]),
        h.stable_adam,
        BOTH | {"eps": [1e-6, 1e-12]},
        signed=True,
    ),
    "clipped_momentum": Method(
        lambda o: oc.clipped_momentum(o["c"], o["decay"]),
        h.clipped_momentum,
        {"c": inputs.BOUNDS[3:], "decay": DECAYS},
        signed=True,
    ),
    "mixed_clip": mixed(smooth=False),
    "with_carry": carry(by_value=True),
    "skip_spikes": skips(lambda o: thresholds.growth(o["growth"]), h.growth, {"growth": [1.5, 3.0]}, max_consecutive=2),
    "skip_nonfinite": Method(
        lambda o: oc.skip_nonfinite(optax.identity()), lambda x, o: h.skips(*nothing_spikes(o), x, 20), {}
    ),
}
SLOW = {
    "zscore, mean": zscore("mean", 1, None),
    "zscore, edge": zscore("edge", 8, 1),
    "zclip": zclip(4),
    "mean_std, window 1": mean_std(1, 1),
    "mean_std, raw": mean_std(8, 4, ddof=1, current=True, raw=True),
    "mean_std, current": mean_std(3, 1, ddof=1, current=True, patience=1),
    "quantile, window 1": quantile(1),
    "quantile, window 7": quantile(7),
    "order_statistic, 0": order_statistic(0.0, 5),
    "order_statistic, 100": order_statistic(100.0, 1),
    "ema_band, all limits": ema_band(min_ratio=0.8, max_down=0.9, max_up=1.1, initial=0.0),
    "ema_band, min_ratio": ema_band(min_ratio=1.0, max_down=None, max_up=None, initial=1.0),
    "adagc, at once": adagc(0, None),
    "adagc, small": adagc(12, 1e-3),
    "spam_clip, period": spam(1, 7),
    "spam_clip, never idle": spam(0, None),
    "scale_by_acclip, alpha 2": acclip(2.0),
    "scale_by_acclip, alpha 1.5": acclip(1.5),
    "mixed_clip, smooth": mixed(smooth=True),
    "centered_clip": Method(
        lambda o: contrib.centered_clip(o["c"]), h.centered_clip, {"c": inputs.BOUNDS[3:]}, signed=True
    ),
    "with_carry, norm": carry(by_value=False),
    "skip_spikes, mean_std": skips(
        lambda o: thresholds.mean_std(o["num_std"], window=4, warmup_steps=2),
        h.mean_std,
        {"num_std": [1.0, 3.0]},
        0,
        window=4,
        warmup_steps=2,
        ddof=0,
        current=False,
        raw=False,
        patience=None,
    ),
}
METHODS = QUICK | SLOW


def sequences_and_options(name: str, seed: int, number: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The inputs of a method: sequences by steps by leaves, and the options of each sequence."""
    method, rng = METHODS[name], np.random.default_rng(seed)
    x = inputs.sequences(seed, number * method.leaves, STEPS).reshape(number, method.leaves, STEPS)
    x = np.moveaxis(x, 1, 2) * rng.choice(np.float32([-1, 1]), (number, STEPS, method.leaves))
    return x, {key: rng.choice(np.float32(values), number) for key, values in method.options.items()}


def run(method: Method, x: Any, options: Any) -> Any:
    """What comes out of each sequence."""

    def one(each):
        sequence, o = each
        tx = method.make(o)
        state = tx.init([jnp.zeros(1)] * method.leaves)

        def step(state, row):
            updates, state = tx.update([row[i, None] for i in range(method.leaves)], state)
            return state, jnp.concatenate(updates)

        return jax.lax.scan(step, state, sequence)[1]

    return jax.jit(lambda *each: jax.lax.map(one, each))(x, options)


def problems(name: str, seed: int, number: int) -> list[str]:
    method = METHODS[name]
    x, options = sequences_and_options(name, seed, number)
    after = np.asarray(run(method, x, options))
    given = x if method.signed else np.abs(x)
    want = method.expect(given if method.leaves > 1 else given[..., 0], options)
    want = h.Run(*(each.reshape(x.shape) for each in want))
    # What is beyond the largest float saturates there, unless it is not finite itself.
    want = want._replace(
        after=np.where(np.isfinite(want.after), np.clip(want.after, -inputs.LARGEST, inputs.LARGEST), want.after)
    )
    ours = after.astype(h.L) if method.signed else np.abs(after.astype(h.L))
    with np.errstate(all="ignore"):
        room = h.L(ROUNDING) * np.abs(want.after) + want.slack + 4 * h.TINY
        off = np.abs(ours - want.after) > room
    off = np.where(np.isfinite(want.after), off, ~((ours == want.after) | (np.isnan(ours) & np.isnan(want.after))))
    lost = np.isfinite(x) & ~np.isfinite(after)
    turned = np.isfinite(x) & (np.sign(x) * np.sign(after) < 0) & (not method.signed)
    found = []
    for s in np.flatnonzero(np.any((off & want.certain) | lost | turned, axis=(1, 2))):
        t = int(np.flatnonzero(np.any((off & want.certain) | lost | turned, axis=2)[s])[0])
        numbers = {key: float(values[s]) for key, values in options.items()}
        found.append(
            f"{name}, seed {seed}, sequence {s}, step {t + 1}: {after[s, t]}, not "
            f"{want.after[s, t].astype(float)}; {numbers}\n    x = {x[s, : t + 1].tolist()}"
        )
    return found


def check(name, seed, number):
    found = problems(name, seed, number)
    assert not found, f"{len(found)} of {number} sequences\n" + "\n".join(sorted(found, key=len)[:3])


@pytest.mark.parametrize("name", QUICK)
def test_some(name):
    check(name, 0, 100)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_many(name):
    check(name, 1, 2000)
