"""A history of norms as a figure. Dashes, triangles and hatching tell things apart in black and white."""

import math
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from optaxclip._arguments import checks
from optaxclip._arrays.trees import Tree
from optaxclip.diagnostics.histories import ordinary, ordinary_norms
from optaxclip.diagnostics.summaries import Summary, summary

INK, MARK, BAND = "#202020", "#c51b00", "#a6bddb"
BEYOND = 1000.0  # times the 95th percentile: larger norms leave the axes
STYLE: dict[Any, Any] = {
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "font.size": 8,
    "hatch.linewidth": 0.5,
    "legend.frameon": False,
    "savefig.dpi": 200,
}


def plot(norms: Tree, file: Path | str, bound: float | None = None) -> None:
    """Draws a history of norms: over the steps, as a histogram, and what share of the steps each bound would clip.

    Spikes, as `summary` counts them, are marked, and steps whose norm is infinite or NaN are hatched. Norms more than
    1,000 times the 95th percentile are drawn at the axes' end. Norms of 0 have no place on logarithmic axes.

    Args:
      norms: a history of norms, a vector or list, one per step.
      file: where the PNG goes.
      bound: a bound to draw in all three panels; None draws none.

    Raises:
      ImportError: if matplotlib is missing; it comes with the extra `demo`.
      ValueError: if `norms` is no vector of real numbers, a norm is negative, or none is finite and positive; if
        `file` is no path, or `bound` no number of at least 0.

    Example:
      >>> import pathlib, tempfile
      >>> from optaxclip import diagnostics
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "norms.png")
      ...     diagnostics.plot([0.5, 1.0, 2.0, 40.0], path, bound=3.0)
      ...     print(path.read_bytes()[1:4].decode())
      PNG

    See also:
      `summary`, for the same in numbers.

      Notebook: `notebooks/choosing_a_threshold.ipynb`, how to choose a bound.
    """
    checks.path("file", file)
    if bound is not None:
        bound = float(checks.number("bound", bound))
    found = summary(norms)
    if not len(ordinary_norms(found.norms)):
        raise ValueError("norms has no finite, positive norm to draw")
    _require_matplotlib()
    # Not pyplot, which looks for a screen and keeps every figure: a plain Figure draws PNGs with Agg.
    import matplotlib as mpl  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    top = _top(found, bound)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 5.6), layout="constrained")
        panels: Any = figure.subplot_mosaic([["history", "history"], ["histogram", "share"]])
        _draw_history(panels["history"], found, bound, top)
        _draw_histogram(panels["histogram"], found, bound, top)
        _draw_share(panels["share"], found, bound, top)
        figure.savefig(file, format="png")


def _require_matplotlib() -> None:
    """Raises ImportError, with what to install, if matplotlib is missing."""
    try:
        import_module("matplotlib")
    except ImportError as error:
        raise ImportError("plots of a history need matplotlib: pip install 'optaxclip[demo]'") from error


def _top(found: Summary, bound: float | None) -> float:
    """Where the axes end. A norm of 1e25 would squeeze all others into a line, so what is far larger is drawn there."""
    positive = ordinary_norms(found.norms)
    wanted = 0.0 if bound is None or not math.isfinite(bound) else 10 * bound
    return float(min(positive.max(), max(BEYOND * np.quantile(positive, 0.95), wanted)))


def _draw_history(axes: Any, found: Summary, bound: float | None, top: float) -> None:
    steps = np.arange(1, found.steps + 1)
    shown = np.where(ordinary(found.norms), np.minimum(found.norms, top), np.nan)
    axes.plot(steps, shown, color=INK, linewidth=0.7, label="norm")
    alone = np.isnan(np.concatenate([[np.nan], shown, [np.nan]]))
    axes.plot(steps[alone[:-2] & alone[2:]], shown[alone[:-2] & alone[2:]], ".", color=INK, markersize=3)
    spikes = np.array(found.spikes, int)
    if len(spikes):
        axes.plot(spikes, shown[spikes - 1], "^", color=MARK, markersize=4.5, fillstyle="none", label="spike")
    if len(beyond := steps[np.isfinite(found.norms) & (found.norms > top)]):
        label = f"beyond the axis, up to {found.percentiles[100]:.1e}"
        axes.plot(beyond, np.full(len(beyond), top), "^", color=MARK, markersize=5, clip_on=False, label=label)
    _hatch(axes, ~np.isfinite(found.norms))
    if bound is not None:
        axes.axhline(bound, color=MARK, linewidth=1.1, linestyle=(0, (5, 2)), label=f"bound {bound:g}")
    axes.set_yscale("log")
    axes.set_xlim(0.5, found.steps + 0.5)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(title="History", xlabel="step", ylabel="norm")
    axes.legend(loc="upper right", ncols=5, bbox_to_anchor=(1.0, 1.13), borderaxespad=0)


def _hatch(axes: Any, lost: np.ndarray) -> None:
    """Hatches each run of steps that are not finite."""
    edges = np.flatnonzero(np.diff(lost.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
    for number, (start, stop) in enumerate(edges):
        label = "not finite" if number == 0 else None
        axes.axvspan(start + 0.5, stop + 0.5, facecolor="none", edgecolor="0.6", hatch="////", linewidth=0, label=label)


def _draw_histogram(axes: Any, found: Summary, bound: float | None, top: float) -> None:
    logs = np.log10(np.minimum(ordinary_norms(found.norms), top))
    bins = int(np.clip(2 * math.sqrt(len(logs)), 10, 80))
    axes.hist(logs, bins=bins, color=BAND, edgecolor=INK, linewidth=0.4)
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7)  # one step is a bar too
    _mark(axes, None if bound is None else _log(bound))
    label = "log10 of the norm" + ("; the last bar is that and beyond" if found.percentiles[100] > top else "")
    axes.set(title="Histogram", xlabel=label, ylabel="steps")


def _draw_share(axes: Any, found: Summary, bound: float | None, top: float) -> None:
    positive = np.sort(np.minimum(ordinary_norms(found.norms), top))
    bounds = np.concatenate([[positive[0] / 2], positive, [2 * top]])
    axes.step(bounds, 100 * found.clipped_share(bounds), where="post", color=INK, linewidth=1.0)
    axes.set_xscale("log")
    axes.set_ylim(0, 103)
    _mark(axes, bound)
    if bound is not None:
        share = 100 * found.clipped_share(bound)
        axes.plot(bound, share, "o", color=MARK, markersize=4, zorder=3)
        axes.annotate(f"{bound:g} clips {share:.1f} %", (bound, share), (8, 10), textcoords="offset points")
    axes.set(title="What a bound would have clipped", xlabel="bound", ylabel="steps clipped (%)")


def _log(bound: float) -> float | None:
    return math.log10(bound) if 0 < bound < math.inf else None


def _mark(axes: Any, place: float | None) -> None:
    if place is not None:
        axes.axvline(place, color=MARK, linewidth=1.1, linestyle=(0, (5, 2)))
