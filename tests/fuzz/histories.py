"""What a threshold that follows the history of norms should permit, in NumPy longdouble, for many sequences at once.

Each oracle is a rule: from the norms of one step and a state, both with one entry per sequence, to the band and the
next state. Where float32 may decide the other way, and what follows depends on it, the rule says that it is in doubt:
from there on that sequence is not compared.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

L = np.longdouble
NEAR = L(1e-4)
MAX, TINY = L(np.finfo(np.float32).max), L(np.finfo(np.float32).tiny)
Array = np.ndarray
State = dict[str, Array]


class Judged(NamedTuple):
    """What a rule says of one step.

    Attributes:
      slack: by how much the bound may be off in addition.
    """

    low: Any
    high: Any
    state: State
    doubt: Any = False
    slack: Any = 0


class Run(NamedTuple):
    """By sequence and step: the norms afterwards, by how much they may be off, and whether they are certain at all."""

    after: Array
    slack: Array
    certain: Array


Rule = Callable[[Array, State], Judged]


def follow(rule: Rule, start: State, norms: Array, *, takes_zero: bool = False) -> Run:
    """A rule over sequences of norms, with its statistics guarded: only finite, positive norms are taken in."""
    number, steps = norms.shape
    state = {name: np.broadcast_to(value, (number, *np.shape(value))).copy() for name, value in start.items()}
    run = Run(*(np.zeros(norms.shape, L) for _ in range(2)), np.ones(norms.shape, bool))
    certain = np.ones(number, bool)
    for t in range(steps):
        n = zero_if_subnormal(norms[:, t].astype(L))
        seen = np.isfinite(n) & ((n > 0) | takes_zero)
        with np.errstate(all="ignore"):
            judged = rule(np.where(seen, n, 1), state)
            after = np.minimum(np.maximum(n, judged.low), judged.high)
        certain &= ~(np.broadcast_to(judged.doubt, (number,)) & seen)
        run.after[:, t] = np.where(seen & (n > 0), after, n)
        run.slack[:, t], run.certain[:, t] = judged.slack, certain
        state = choose(seen, judged.state, state)
    return run


def choose(flag: Array, new: State, old: State) -> State:
    return {name: np.where(flag.reshape(-1, *[1] * (old[name].ndim - 1)), new[name], old[name]) for name in old}


def zero_if_subnormal(n: Array) -> Array:
    return np.where(np.abs(n) < TINY, L(0), n)


def near(n: Array, edge: Array) -> Array:
    return np.abs(n - edge) <= NEAR * np.maximum(n, edge) + 8 * TINY


def wide(value: Any) -> Any:
    return np.asarray(value).astype(L)


# Spikes in a row, of which rounding may have made fewer or more.


def counted(spikes: Array, is_spike: Array, is_near: Array) -> Array:
    """The least and the largest number of spikes in a row: an array of sequences by two."""
    least = np.where(is_spike & ~is_near, spikes[:, 0] + 1, 0)
    most = np.where(is_spike | is_near, spikes[:, 1] + 1, 0)
    return np.stack([least, most], axis=1)


def taken(patience: int | None, spikes: Array, is_spike: Array, n: Array, bound: Array) -> tuple[Array, Array]:
    """What is taken in, and whether that is in doubt."""
    kept_out = is_spike & ((spikes <= patience) if patience is not None else np.ones_like(spikes, bool)).T
    value = np.where(kept_out[1], bound, n)
    return value, (kept_out[0] != kept_out[1]) & ~near(n, bound)


NO_SPIKES = {"spikes": np.zeros(2, int)}


# Rules. Each is (rule, first state); `o` are the numbers of each sequence.


def zscore(o: Any, *, warmup: int, patience: int | None, clip_to: str) -> tuple[Rule, State]:
    """METHODS.md, zclip."""
    most, d = wide(o["z"]), wide(o["decay"])

    def rule(n: Array, s: State) -> Judged:
        warm, count = s["count"] < warmup, s["count"] + 1
        mean, std = s["mean"], np.sqrt(np.maximum(s["var"], 0))
        z = (n - mean) / (std + L(1e-6))
        edge = mean + most * (std + (0 if clip_to == "edge" else L(1e-6)))
        bound = {"reciprocal": mean + most * std * most / z, "mean": mean, "edge": mean + most * std}[clip_to]
        is_spike, is_near = ~warm & (n > edge), ~warm & near(n, edge)
        spikes = counted(s["spikes"], is_spike, is_near)
        value, doubt = taken(patience, spikes, is_spike, n, bound)
        total, squares = s["sum"] + n, s["squares"] + n * n
        new_mean = np.where(warm, total / count, d * mean + (1 - d) * value)
        var = np.where(warm, squares / count - new_mean**2, d * s["var"] + (1 - d) * (value - new_mean) ** 2)
        # A deviation that is nearly subnormal has lost digits.
        doubt |= (is_near & ~near(n, bound)) | ((std > 0) & (std < TINY * 2**10))
        state = {"mean": new_mean, "var": var, "count": count, "sum": total, "squares": squares, "spikes": spikes}
        return Judged(0, np.where(is_spike, bound, np.inf), state, doubt)

    zero = L(0)
    return rule, {"mean": zero, "var": zero, "count": np.array(0), "sum": zero, "squares": zero} | NO_SPIKES


def at_most(rule: Rule, c: Any) -> Rule:
    """The chain with a constant."""

    def both(n: Array, s: State) -> Judged:
        judged = rule(n, s)
        return judged._replace(high=np.minimum(judged.high, wide(c)))

    return both


def mean_std(
    o: Any, *, window: int, warmup_steps: int, ddof: int, current: bool, raw: bool, patience: int | None
) -> tuple[Rule, State]:
    """METHODS.md, thresholds.mean_std and clip_by_history."""
    k = wide(o["num_std"])

    def rule(n: Array, s: State) -> Judged:
        ring, count = s["ring"], s["count"]
        place = (count % window)[:, None]
        with_n = ring.copy()
        np.put_along_axis(with_n, place, n[:, None], 1)
        values, number = (with_n, count + 1) if current else (ring, count)
        number = np.minimum(number, window)
        there = np.arange(window) < number[:, None]
        mean = np.sum(np.where(there, values, 0), axis=1) / np.maximum(number, 1)
        away = np.sum(np.where(there, (values - mean[:, None]) ** 2, 0), axis=1)
        std = np.sqrt(away / np.maximum(number - ddof, 1))
        active = (count + 1 if current else count) >= warmup_steps
        bound = mean + k * np.maximum(std, L(1e-6) * np.maximum(mean, 1))
        is_spike, is_near = active & (n > bound), active & near(n, bound)
        spikes = counted(s["spikes"], is_spike, is_near)
        value, doubt = taken(patience, spikes, is_spike, n, bound)
        new = ring.copy()
        np.put_along_axis(new, place, (n if raw else value)[:, None], 1)
        doubt &= not raw
        return Judged(0, np.where(active, bound, np.inf), {"ring": new, "count": count + 1, "spikes": spikes}, doubt)

    return rule, {"ring": np.zeros(window, L), "count": np.array(0)} | NO_SPIKES


def quantile(o: Any, *, window: int) -> tuple[Rule, State]:
    """numpy.quantile of the last norms, this one among them."""
    q = wide(o["q"])

    def rule(n: Array, s: State) -> Judged:
        ring, count = s["ring"].copy(), s["count"]
        np.put_along_axis(ring, (count % window)[:, None], n[:, None], 1)
        ordered, number = np.sort(ring, axis=1), np.minimum(count + 1, window)
        place = (number - 1) * q
        below, above = np.floor(place).astype(int), np.minimum(np.floor(place).astype(int) + 1, number - 1)
        low, high = (np.take_along_axis(ordered, i[:, None], 1)[:, 0] for i in (below, above))
        bound = low + (place - below) * (high - low)
        # The place is off by a rounding, and may be just below a whole number: the next norm below may matter.
        return Judged(0, bound, {"ring": ring, "count": count + 1}, slack=L(3e-7) * number * high)

    return rule, {"ring": np.full(window, L(np.inf)), "count": np.array(0)}


def order_statistic(o: Any, *, percentile: float, window: int) -> tuple[Rule, State]:
    """METHODS.md, percentile_clip."""
    del o
    k = min(int(np.floor(L(percentile) * window / 100)), window - 1)

    def rule(n: Array, s: State) -> Judged:
        ring, count = np.where(s["count"][:, None] == 0, n[:, None], s["ring"]), s["count"]
        np.put_along_axis(ring, (count % window)[:, None], n[:, None], 1)
        return Judged(0, np.sort(ring, axis=1)[:, k], {"ring": ring, "count": count + 1})

    return rule, {"ring": np.zeros(window, L), "count": np.array(0)}


def tracked_quantile(o: Any) -> tuple[Rule, State]:
    """METHODS.md, clip_by_tracked_quantile."""
    q, rate, first = wide(o["q"]), wide(o["rate"]), np.log(wide(o["initial"]))

    def rule(n: Array, s: State) -> Judged:
        log = first + s["moved"]
        after = np.clip(log - rate * ((n <= np.exp(log)) - q), np.log(TINY), np.log(MAX))
        return Judged(0, np.exp(log), {"moved": after - first}, near(n, np.exp(log)) & (rate > 0))

    return rule, {"moved": L(0)}


def ema_band(o: Any, *, min_ratio: Any, max_down: Any, max_up: Any, initial: Any) -> tuple[Rule, State]:
    """METHODS.md, aggc."""
    d, ratio, least = wide(o["decay"]), wide(o["ratio"]), wide(o["min_norm"])

    def rule(n: Array, s: State) -> Judged:
        average = np.where((s["count"] == 0) & (initial is None), n, s["average"])
        upper = np.where(average > 0, ratio * average, np.inf)
        lower = np.maximum(0 if min_ratio is None else L(min_ratio) * average, least)
        cut = upper if max_down is None else np.maximum(upper, L(max_down) * n)
        raised = lower if max_up is None else np.minimum(lower, L(max_up) * n)
        after = np.where(n > upper, cut, np.where(n < lower, raised, n))
        state = {"average": d * average + (1 - d) * after, "count": s["count"] + 1}
        lost = (average > 0) & (average < TINY)  # none to float32
        return Judged(after, after, state, lost | (near(n, upper) & (lower > upper)))

    return rule, {"average": L(0 if initial is None else initial), "count": np.array(0)}


def average(o: Any) -> tuple[Rule, State]:
    """METHODS.md, AdaClip."""
    d = wide(o["decay"])

    def rule(n: Array, s: State) -> Judged:
        moving, count = d * s["moving"] + (1 - d) * n, s["count"] + 1
        return Judged(0, moving / (1 - d**count), {"moving": moving, "count": count})

    return rule, {"moving": L(0), "count": np.array(0)}


def growth(o: Any) -> tuple[Rule, State]:
    """METHODS.md, clip_norm_growth."""
    most = wide(o["growth"])

    def rule(n: Array, s: State) -> Judged:
        bound = np.where(s["last"] > 0, most * (s["last"] + L(1e-8)), np.inf)
        return Judged(0, bound, {"last": np.minimum(n, bound)})

    return rule, {"last": L(0)}


def normalised(o: Any) -> tuple[Rule, State]:
    """METHODS.md, AdaGN. Zeros are taken in."""
    b1, b2, eps = wide(o["b1"]), wide(o["b2"]), wide(o["eps"])

    def rule(n: Array, s: State) -> Judged:
        m, v, count = b1 * s["m"] + (1 - b1) * n, b2 * s["v"] + (1 - b2) * n * n, s["count"] + 1
        root = np.sqrt(v / (1 - b2**count)) + eps
        goal = m / (1 - b1**count) / np.where(root > 0, root, 1)
        # Averages that are nearly subnormal have lost digits, and so has what is close to the size of them.
        lost = (m < TINY * 2**20) | (np.sqrt(v) < TINY * 2**20)
        return Judged(goal, goal, {"m": m, "v": v, "count": count}, slack=np.where(lost, np.inf, 0))

    return rule, {"m": L(0), "v": L(0), "count": np.array(0)}


def adagc(norms: Array, o: Any, *, warmup: int, max_norm: Any) -> Run:
    """METHODS.md, adagc: sequences by steps by leaves."""
    ratio, d = (wide(o[name])[:, None] for name in ("ratio", "decay"))
    gamma, count = np.zeros(norms.shape[::2], L), np.zeros(norms.shape[::2], int)
    run = Run(*(np.zeros(norms.shape, L) for _ in range(2)), np.ones(norms.shape, bool))
    for t in range(norms.shape[1]):
        n = zero_if_subnormal(norms[:, t].astype(L))
        with np.errstate(all="ignore"):
            total = np.sqrt(np.sum(n * n, axis=1, keepdims=True))
            warm = (count == 0) | (count + 1 < warmup)
            factor = np.minimum(1, L(np.inf if max_norm is None else max_norm) / (total + L(1e-8)))
            upper = np.where(warm, n * factor, ratio * np.maximum(gamma, L(1e-8)))
            after = np.minimum(n, upper)
            new = np.where(warm, np.where(count == 0, after, np.minimum(gamma, after)), d * gamma + (1 - d) * after)
        seen = np.isfinite(total) & (n > 0)
        run.after[:, t], run.certain[:, t] = np.where(seen, after, n), total <= MAX * (1 - NEAR)
        gamma, count = np.where(seen, new, gamma), count + seen
    return run._replace(certain=np.logical_and.accumulate(run.certain | ~np.isfinite(norms).all(2)[..., None], axis=1))


def skips(rule: Rule, start: State, norms: Array, max_consecutive: int) -> Run:
    """METHODS.md, skip_spikes around the identity: 0 where a step is left out."""
    number, steps = norms.shape
    state = {name: np.broadcast_to(value, (number, *np.shape(value))).copy() for name, value in start.items()}
    run = Run(*(np.zeros(norms.shape, L) for _ in range(2)), np.ones(norms.shape, bool))
    in_row, certain = np.zeros(number, int), np.ones(number, bool)
    for t in range(steps):
        n = zero_if_subnormal(norms[:, t].astype(L))
        finite, seen = np.isfinite(n), np.isfinite(n) & (n > 0)
        with np.errstate(all="ignore"):
            judged = rule(np.where(seen, n, 1), state)
            stands_out = seen & (n > judged.high)
            certain &= ~((near(n, judged.high) | judged.doubt) & seen)
        rejected = ~finite | (stands_out & (in_row < max_consecutive))
        run.after[:, t], run.certain[:, t] = np.where(rejected, 0, norms[:, t]), certain
        state = choose(seen & ~rejected, judged.state, state)
        in_row = np.where(stands_out, in_row + 1, np.where(finite, 0, in_row))
    return run


# Coordinates: sequences by steps of signed numbers.


class Signed:
    """A moving average of signed numbers, and by how much it may be off where they cancel."""

    def __init__(self, number: int) -> None:
        self.value, self.error = np.zeros(number, L), np.zeros(number, L)

    def next(self, x: Array, d: Array) -> tuple[Array, Array]:
        parts = [d * self.value, (1 - d) * x]
        return parts[0] + parts[1], d * self.error + L(2e-6) * (np.abs(parts[0]) + np.abs(parts[1]))

    def take(self, flag: Array, value: Array, error: Array) -> None:
        self.value, self.error = np.where(flag, value, self.value), np.where(flag, error, self.error)


def by_step(step: Callable[[int, Array], tuple[Array, Array]], x: Array) -> Run:
    """`step`: (number from 1, coordinates) -> (what comes out, by how much it may be off)."""
    run = Run(*(np.zeros(x.shape, L) for _ in range(2)), np.ones(x.shape, bool))
    with np.errstate(all="ignore"):
        for t in range(x.shape[1]):
            run.after[:, t], run.slack[:, t] = step(t + 1, zero_if_subnormal(x[:, t].astype(L)))
    return run


def spam_clip(x: Array, o: Any, *, idle: int, period: int | None) -> Run:
    """METHODS.md, spam_clip; neither an infinite coordinate nor NaN enters the average."""
    theta, d = wide(o["ratio"]), wide(o["decay"])
    v, doubt = np.zeros(len(x), L), np.zeros(len(x), bool)

    def step(t: int, g: Array) -> tuple[Array, Array]:
        nonlocal v, doubt
        phase = t if period is None else t % period
        v = np.zeros_like(v) if phase == 0 else v
        bound, size = np.sqrt(theta * v), np.abs(g)
        bound = np.where(bound > MAX, np.inf, bound)
        spikes = (size > bound) & (v > 0) & (phase > idle)
        out = np.where(spikes, np.sign(g) * bound, g)
        v = np.where(np.isfinite(g), d * v + (1 - d) * np.abs(out) ** 2, v)
        # A root that float32 flushes is no average there, and one here.
        doubt |= (v > 0) & (np.sqrt(v) < TINY * 4)
        return out, np.where(doubt, np.inf, 0)

    return by_step(step, x)


def acclip(x: Array, o: Any, *, alpha: float) -> Run:
    """METHODS.md, scale_by_acclip."""
    b1, b2, eps = (wide(o[name]) for name in ("b1", "b2", "eps"))
    m, power = Signed(len(x)), np.zeros(len(x), L)

    def step(t: int, g: Array) -> tuple[Array, Array]:
        nonlocal power
        del t
        good = np.isfinite(g)
        new, error = m.next(g, b1)
        tau = b2 * power + (1 - b2) * np.abs(g) ** L(alpha)
        m.take(good, new, error)
        power = np.where(good, tau, power)
        size = np.maximum(np.abs(new) + eps, TINY)
        out = new * np.minimum(1, tau ** (1 / L(alpha)) / size)
        # A share of a small size is subnormal, and lost.
        return np.where(good, out, g), np.where(good, error + 8 * TINY / (1 - b2), 0)

    return by_step(step, x)


def stable_adam(x: Array, o: Any) -> Run:
    """METHODS.md, scale_by_stable_adam, of leaves of one number."""
    b1, b2, eps = (wide(o[name]) for name in ("b1", "b2", "eps"))
    m, v, seen = Signed(len(x)), np.zeros(len(x), L), np.zeros(len(x), L)

    def step(_: int, g: Array) -> tuple[Array, Array]:
        nonlocal v, seen
        good = np.isfinite(g)
        t = seen + 1  # what is not finite is no step of its leaf
        seen = np.where(good, t, seen)
        new, error = m.next(g, b1)
        squares = b2 * v + (1 - b2) * np.abs(g) ** 2
        m.take(good, new, error)
        v = np.where(good, squares, v)
        root = np.sqrt(squares / (1 - b2**t))
        excess = np.maximum(1, np.abs(g) / np.maximum(np.maximum(root, eps), TINY))
        whole = (1 - b1**t) * np.where(root + eps > 0, root + eps, 1) * excess
        lost = TINY * 8 / whole  # what float32 flushes of the averages, in units of what comes out
        return np.where(good, new / whole, g), np.where(good, error / whole + lost, 0)

    return by_step(step, x)


def _cut(x: Array, c: Array) -> Array:
    return np.sign(x) * np.minimum(np.abs(x), c)


def _soft(x: Array, c: Array) -> Array:
    return np.where(np.isinf(c), x, np.where(x == 0, 0, x * c / (c + np.abs(x))))


def clipped_momentum(x: Array, o: Any) -> Run:
    """METHODS.md, clipped_momentum, of one coordinate in all."""
    c, d = wide(o["c"]), wide(o["decay"])
    kept = Signed(len(x))

    def step(t: int, g: Array) -> tuple[Array, Array]:
        del t
        good = np.isfinite(g)
        new, error = kept.next(g, d)
        out = _cut(new, c)
        kept.take(good, out, np.minimum(error, 2 * c))
        return np.where(good, out, g), np.where(good, error, 0)

    return by_step(step, x)


def mixed_clip(x: Array, o: Any, *, smooth: bool) -> Run:
    """METHODS.md, mixed_clip, of one coordinate in all."""
    c, d, mix = (wide(o[name]) for name in ("c", "decay", "mix"))
    m, cut = Signed(len(x)), _soft if smooth else _cut

    def step(t: int, g: Array) -> tuple[Array, Array]:
        del t
        good = np.isfinite(g)
        new, error = m.next(g, d)
        m.take(good, new, error)
        one, other = mix * cut(new, c), (1 - mix) * cut(g, c)
        return np.where(good, one + other, g), np.where(good, error + L(2e-6) * (np.abs(one) + np.abs(other)), 0)

    return by_step(step, x)


def centered_clip(x: Array, o: Any) -> Run:
    """METHODS.md, centred clip, of one coordinate in all; a difference stops at the largest float."""
    c = wide(o["c"])
    center, most = np.zeros(len(x), L), np.zeros(len(x), L)

    def step(t: int, g: Array) -> tuple[Array, Array]:
        nonlocal center, most
        good = np.isfinite(g)
        away = np.clip(g - center, -MAX, MAX)
        out = np.where(good & (np.abs(away) > c), center + _cut(away, c), g)
        center = np.where(good, out, center)
        most = np.where(good, np.maximum(most, np.abs(g)), most)
        return out, L(4e-6) * most + (t + 1) * TINY  # a subnormal bound may be 0

    return by_step(step, x)


def with_carry(x: Array, o: Any, *, by_value: bool) -> Run:
    """METHODS.md, with_carry, around a clip by value or by norm; sums stop at the largest float."""
    c = wide(o["c"])
    carry, most = np.zeros(len(x), L), np.zeros(len(x), L)

    def step(t: int, g: Array) -> tuple[Array, Array]:
        nonlocal carry, most
        del t
        good = np.isfinite(g)
        total = np.where(good, np.clip(g + carry, -MAX, MAX), g)
        out = _cut(total, c) if by_value else np.where(good, _cut(total, c), total)
        carry = np.where(good, total - out, carry)
        most = np.where(good, np.maximum(most, np.abs(total)), most)
        return out, L(4e-6) * most

    return by_step(step, x)
