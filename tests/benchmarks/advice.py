"""How good the advisor's bound is on the main job, beside a sweep over 12 bounds.

The main job's model, text and optimizer, with `clip_by_global_norm`: 12 bounds from 0.01 to 100, evenly spaced on a
logarithmic axis, per seed, all of them in one compiled program. Besides, the sweep again with every bound a
hundred-thousandth larger: what that changes is chance. `diagnostics.advise` is asked twice per seed: with the norms of
a run clipped to 1, and with those of one that is not clipped. The bound that it recommends is then trained with.

Claim: the loss at the recommended bound is within 2 % of the best of the sweep, or the advice says that the history
does not tell. On the main job it says so: the best of 12 is largely chance, and the bound that wins misses the 2 %
itself where it is nudged, for two of three seeds.

    python -m tests.benchmarks.advice
    python -m tests.benchmarks.advice --learning-rate 0.003
    python -m tests.benchmarks.advice --seeds 0 --steps 100 --json advice.json

Losses are in bits per character of the held-out text, after the last step. On two busy cores a seed takes
three minutes.
"""

import argparse
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optaxclip
from optaxclip import diagnostics
from optaxclip.demo import model
from optaxclip.demo.batches import random_batch, sequences
from optaxclip.demo.corpus import Corpus, language_reference
from tests.benchmarks import show_environment, write_json

BOUNDS = np.geomspace(0.01, 100, 12)
NUDGE = 1.00001
RECORDED_UNDER = {"clipped to 1": 1.0, "unclipped": math.inf}
TOLERANCE = 1.02


class Runs(NamedTuple):
    """One run per bound: the held-out loss at the end, and the norm in every step."""

    losses: np.ndarray
    norms: np.ndarray


class Asked(NamedTuple):
    """What the advisor said of a history, the bound that was then trained with, and the loss it reached."""

    advice: diagnostics.Advice
    loss: float


class Outcome(NamedTuple):
    """What came of one seed: the sweep, the same nudged, and per history the advice."""

    sweep: np.ndarray
    again: np.ndarray
    asked: dict[str, Asked]


def main() -> None:
    args = parse_arguments()
    show_environment()
    corpus = language_reference()
    outcomes: dict[int, Outcome] = {}
    for seed in args.seeds:
        outcomes[seed] = measure(corpus, seed, args.steps, args.learning_rate)
        print(f"seed {seed} is done", file=sys.stderr, flush=True)
    show(outcomes)
    found = {str(seed): as_json(outcome) for seed, outcome in outcomes.items()}
    write_json(args.json, bounds=list(BOUNDS), seeds=found)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one sweep each (0 1 2)")
    parser.add_argument("--steps", type=int, default=400, help="of every run (400, as in the main job)")
    parser.add_argument("--learning-rate", type=float, default=0.03, help="of Adam (0.03, as in the main job)")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    return parser.parse_args()


def measure(corpus: Corpus, seed: int, steps: int, learning_rate: float = 0.03) -> Outcome:
    """Sweeps, asks, and trains with what was recommended."""
    count = len(BOUNDS)
    runs = train([*BOUNDS, *BOUNDS * NUDGE, *RECORDED_UNDER.values()], corpus, seed, steps, learning_rate)
    advice = [diagnostics.advise(norms) for norms in runs.norms[2 * count :]]
    bounds = [math.nan if each.bound is None else each.bound for each in advice]
    # A NaN bound clips nothing, and says nothing of advice without one.
    losses = np.where(np.isnan(bounds), math.nan, train(bounds, corpus, seed, steps, learning_rate).losses)
    asked = {name: Asked(each, float(loss)) for name, each, loss in zip(RECORDED_UNDER, advice, losses, strict=True)}
    return Outcome(runs.losses[:count], runs.losses[count : 2 * count], asked)


def train(bounds: Any, corpus: Corpus, seed: int, steps: int, learning_rate: float) -> Runs:
    """The main job, once per bound and all at once: equal seeds see the same parameters and batches."""
    keys = jax.random.split(jax.random.key(seed))
    text, held_out = jnp.asarray(corpus.train), sequences(corpus.held_out)
    bounds = jnp.asarray(bounds, jnp.float32)
    runs = _train(bounds, learning_rate, keys, text, held_out, characters=len(corpus.alphabet), steps=steps)
    return Runs(*(np.asarray(each, np.float64) for each in runs))


@partial(jax.jit, static_argnames=("characters", "steps"))
def _train(
    bounds: Any, learning_rate: Any, keys: Any, text: Any, held_out: Any, *, characters: int, steps: int
) -> tuple[Any, Any]:
    init_key, batch_key = keys

    def run(bound: Any) -> tuple[Any, Any]:
        tx = optax.chain(optaxclip.clip_by_global_norm(bound), optax.adam(learning_rate))
        params = model.init(init_key, characters)

        def step(carry: Any, number: Any) -> tuple[Any, Any]:
            params, state = carry
            batch = random_batch(jax.random.fold_in(batch_key, number), text)
            grads = jax.grad(model.batch_loss)(params, batch)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), optaxclip.global_norm(grads)

        (params, _), norms = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(steps))
        losses = jax.lax.map(lambda sequence: model.sequence_loss(params, sequence), held_out, batch_size=256)
        return losses.mean() / math.log(2), norms

    return jax.vmap(run)(bounds)


def is_met(outcome: Outcome, name: str) -> bool:
    """Whether the advice is within 2 % of the best of the sweep, or says that the history does not tell."""
    asked = outcome.asked[name]
    return not asked.advice.tells or asked.loss <= TOLERANCE * outcome.sweep.min()


def show(outcomes: dict[int, Outcome]) -> None:
    """Prints the sweep, what chance changes in it, and the advice, as Markdown tables."""
    seeds = list(outcomes)
    print(
        "\n| bound | " + " | ".join(f"seed {seed}, and nudged" for seed in seeds) + " |\n|---:|" + "---:|" * len(seeds)
    )
    for row, bound in enumerate(BOUNDS):
        pairs = [f"{outcomes[seed].sweep[row]:.3f} / {outcomes[seed].again[row]:.3f}" for seed in seeds]
        print(f"| {bound:.3g} | " + " | ".join(pairs) + " |")
    for seed, outcome in outcomes.items():
        change = np.abs(outcome.again / outcome.sweep - 1)
        best = outcome.sweep.argmin()
        print(
            f"\nseed {seed}: best {outcome.sweep[best]:.3f} at {BOUNDS[best]:.3g}, which nudged gives "
            f"{outcome.again[best]:.3f}; a nudge changes the loss by {np.median(change):.1%} in the median, "
            f"at most by {change.max():.1%}"
        )
    print("\n| history | seed | advice | tells | loss | above the best | met |\n|---|---:|---|---|---:|---:|---|")
    for seed, outcome in outcomes.items():
        for name, (advice, loss) in outcome.asked.items():
            above = loss / outcome.sweep.min() - 1
            met = is_met(outcome, name)
            print(f"| {name} | {seed} | {advice.method} | {advice.tells} | {loss:.3f} | {above:+.1%} | {met} |")


def as_json(outcome: Outcome) -> dict[str, Any]:
    asked = {
        name: {"method": advice.method, "bound": advice.bound, "tells": advice.tells, "loss": loss}
        for name, (advice, loss) in outcome.asked.items()
    }
    return {"sweep": list(outcome.sweep), "again": list(outcome.again), "asked": asked}


if __name__ == "__main__":
    main()
