"""How soon clippers that follow a history of norms follow a rise that stays.

Norms are ten times larger from step 500 on, for good. The table counts the steps from there until an update keeps as
much of its norm as before, to 10 %, in the median over the 21 steps about it: for ours with their default arguments,
for what else they offer, and for the published methods, run from the transcriptions in tests/reference. Once the norms
are lognormal with a spread of 0.1, and once all the same but for the rise.

Claim: none of ours is locked for ever. ZClip as published is.

    python -m tests.benchmarks.level_shift
    python -m tests.benchmarks.level_shift --figure level_shift.png --json level_shift.json

The figure needs matplotlib: per method what is let through after the rise, beside the norms, on logarithmic axes.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np

import optaxclip
from optaxclip import contrib
from tests.benchmarks import show_environment, write_json
from tests.reference import sequences
from tests.support.driving import METHODS, drive, steps_to_follow

AT = 500
AFTER = 7000
SPREADS = {"noise": 0.1, "constant": 0.0}
# What else ours offer where a rise matters.
OPTIONS = {
    "zclip(patience=5)": lambda: optaxclip.zclip(warmup_max_norm=None, patience=5),
    "zclip(patience=None)": lambda: optaxclip.zclip(warmup_max_norm=None, patience=None),
    "zclip(clip_to='edge')": lambda: optaxclip.zclip(warmup_max_norm=None, clip_to="edge"),
    "zclip(clip_to='mean')": lambda: optaxclip.zclip(warmup_max_norm=None, clip_to="mean"),
    "clip_by_history(patience=33)": lambda: optaxclip.clip_by_history(patience=33),
    "clip_by_history(take_in='raw')": lambda: optaxclip.clip_by_history(take_in="raw"),
    "adagc(ratio=1.5)": lambda: optaxclip.adagc(1.5),
    "adagc(decay=0.8)": lambda: optaxclip.adagc(decay=0.8),
    "clip_norm_growth(1.1)": lambda: contrib.clip_norm_growth(1.1),
}
# Where the published run is not that of our defaults.
PUBLISHED = {"aggc": "initial 0, factors within 0.9 and 1.1", "clip_by_history": "raw", "zclip": "no patience"}
NEVER = "never"


class Row(NamedTuple):
    """What a method let through, per kind of sequence, and the published one; None for an option of ours."""

    ours: dict[str, np.ndarray]
    published: dict[str, np.ndarray] | None


def main() -> None:
    args = parse_arguments()
    show_environment()
    given = {kind: shifted(spread) for kind, spread in SPREADS.items()}
    rows = measure(given)
    results = steps(given, rows)
    show(results)
    if args.figure:
        draw(given["noise"], rows, args.figure)
    write_json(args.json, steps=results)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", type=Path, help="save the figure to this PNG file")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser.parse_args()


def shifted(spread: float) -> np.ndarray:
    """Norms about 1, and about 10 from step AT on."""
    rng = np.random.default_rng(0)
    return sequences.with_shift(sequences.lognormal(rng, AT + AFTER, scale=1.0, spread=spread, drift=1.0), at=AT)


def measure(given: dict[str, np.ndarray]) -> dict[str, Row]:
    rows = {}
    for name, method in METHODS.items():
        ours = {kind: drive(method.make(), norms)[0] for kind, norms in given.items()}
        rows[name] = Row(ours, {kind: method.published(norms).after for kind, norms in given.items()})
    for name, make in OPTIONS.items():
        rows[name] = Row({kind: drive(make(), norms)[0] for kind, norms in given.items()}, None)
    return rows


def steps(given: dict[str, np.ndarray], rows: dict[str, Row]) -> dict[str, dict[str, int | None]]:
    """Per method and column of the table the steps until the rise is followed; None for never."""
    return {
        name: {
            f"{whose}, {kind}": steps_to_follow(given[kind], after[kind], AT)
            for whose, after in (("ours", row.ours), ("published", row.published))
            if after is not None
            for kind in SPREADS
        }
        for name, row in rows.items()
    }


def show(results: dict[str, dict[str, int | None]]) -> None:
    """Prints the steps as a Markdown table."""
    columns = [f"{whose}, {kind}" for whose in ("ours", "published") for kind in SPREADS]
    print(f"\nsteps until a tenfold rise at step {AT} is followed; {NEVER}: not within {AFTER:,}\n")
    print(f"| {'method':30} | " + " | ".join(f"{column:>19}" for column in columns) + " |")
    print("|---|" + "---:|" * len(columns))
    for name, row in results.items():
        cells = [
            "" if column not in row else NEVER if row[column] is None else f"{row[column]:,}" for column in columns
        ]
        print(f"| {name:30} | " + " | ".join(f"{cell:>19}" for cell in cells) + " |")


def draw(norms: np.ndarray, rows: dict[str, Row], path: Path) -> None:
    """A panel per method, from step AT on."""
    import matplotlib as mpl  # noqa: PLC0415  # the table needs none
    from matplotlib.figure import Figure  # noqa: PLC0415

    shown = [name for name in METHODS if rows[name].published is not None]
    # Evenly spread on a logarithmic axis, so that early and late steps are equally dense.
    at = np.unique(np.geomspace(1, AFTER, 400).astype(int))
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(9.5, 8), layout="constrained")
        panels = figure.subplots(3, 3, sharex=True, sharey=True)
        for panel, name in zip(panels.flat, shown, strict=True):
            row = rows[name]
            panel.plot(at, norms[AT - 2 + at], ".", color="0.75", markersize=3, label="norm")
            note = f"published ({PUBLISHED[name]})" if name in PUBLISHED else "published"
            panel.plot(at, row.published["noise"][AT - 2 + at], color="0.45", linewidth=2.6, label="published")
            panel.plot(at, row.ours["noise"][AT - 2 + at], color="black", linewidth=1, label="ours")
            panel.set_title(name)
            if name in PUBLISHED:
                panel.text(0.97, 0.05, note, transform=panel.transAxes, ha="right", fontsize=7.5)
            panel.set_xscale("log")
            panel.set_yscale("log")
        panels[0, 0].legend(loc="center left", fontsize=8)
        figure.supxlabel("steps since the rise")
        figure.supylabel("norm after clipping")
        figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
