"""The figure of norms, limits and clipped steps: what is drawn, and that nothing overlaps."""

import itertools
import math
import sys

import numpy as np
import pytest
from matplotlib.text import Text

import optaxclip
from optaxclip import diagnostics
from tests.support.histories import lognormal, recorded, with_spikes

FIXED = optaxclip.clip_by_global_norm(3.0)


def legend(figure):
    (found,) = figure.legends
    return [text.get_text() for text in found.get_texts()]


def curve(axes, label):
    return next(line for line in axes.lines if line.get_label() == label)


def ticks(axes):
    """From where to where the lower edge is marked."""
    (bars,) = (each for each in axes.collections if each.get_label() == "clipped steps")
    return [(path.vertices[:, 0].min(), path.vertices[:, 0].max()) for path in bars.get_paths()]


def assert_nothing_overlaps(figure):
    figure.draw_without_rendering()
    ours = {*legend(figure), figure.get_supxlabel(), figure.get_supylabel()}
    for axes in figure.axes:
        ours |= {axes.get_title(loc="left"), axes.get_xlabel(), axes.get_ylabel(), *(t.get_text() for t in axes.texts)}
    texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_text() in ours]
    width, height = figure.canvas.get_width_height()
    boxes = [(text, text.get_window_extent()) for text in texts]
    for text, box in boxes:
        assert min(box.x0, box.y0, width - box.x1, height - box.y1) >= 0, text
    for (one, box), (other, other_box) in itertools.combinations(boxes, 2):
        assert not box.overlaps(other_box), (one, other)


# One norm.


def test_a_history_with_spikes_lost_steps_and_a_bound(rng):
    norms, at = with_spikes(rng, 400)
    norms[100:110] = np.nan
    figure = diagnostics.plot(norms, fixed=FIXED)
    assert_nothing_overlaps(figure)
    history, histogram, share = figure.axes
    clipped = 100 * diagnostics.summary(norms).clipped_share(3.0)
    fixed = f"fixed, clips {clipped:.1f} %"
    assert legend(figure) == ["norm", fixed, "clipped steps", "spike", "not finite"]
    np.testing.assert_array_equal(curve(history, "norm").get_ydata(), np.float32(norms))
    assert set(curve(history, fixed).get_ydata()) == {3.0}
    spikes = set(curve(history, "spike").get_xdata())
    assert spikes == set(diagnostics.summary(norms).spikes) >= set(at) - set(range(101, 111))
    assert [(span.get_x(), span.get_width()) for span in history.patches] == [(100.5, 10.0)]
    marked = [step for start, stop in ticks(history) for step in np.arange(start + 0.5, stop)]
    np.testing.assert_array_equal(marked, np.flatnonzero(np.nan_to_num(norms) > 3) + 1)
    assert sum(bar.get_height() for bar in histogram.patches) == 390
    assert histogram.lines[0].get_xdata()[0] == pytest.approx(math.log10(3))
    steps = share.lines[0]
    place = np.searchsorted(steps.get_xdata(), 3.0, side="right") - 1
    assert steps.get_ydata()[place] == pytest.approx(clipped)
    assert [float(each) for each in share.lines[2].get_xydata()[0]] == pytest.approx([3.0, clipped])


def test_limits_of_several_clippers_are_told_apart_without_colour(rng):
    norms, _ = with_spikes(rng, 150)
    clippers = {f"bound{bound}": optaxclip.clip_by_global_norm(float(bound)) for bound in range(1, 5)}
    figure = diagnostics.plot(norms, zclip=optaxclip.zclip(max_norm=None), **clippers)
    assert_nothing_overlaps(figure)
    axes = figure.axes[0]
    lines = [line for line in axes.lines if "clips" in line.get_label()]
    assert [line.get_label().split(",")[0] for line in lines] == ["zclip", *clippers]
    assert len({repr(line._dash_pattern) for line in lines}) == 5
    expected = diagnostics.replay(norms, optaxclip.zclip(max_norm=None)).clippers["clipper 1"].limit
    np.testing.assert_array_equal(lines[0].get_ydata(), np.where(np.isinf(expected), np.nan, expected))
    assert not axes.collections  # whose the ticks would be, nobody could tell
    with pytest.raises(ValueError, match="clippers must be at most 5 in one figure, got 6"):
        diagnostics.plot(norms, FIXED, zclip=optaxclip.zclip(), **clippers)


def test_a_record_shows_its_own_limit_and_steps(rng):
    norms = lognormal(rng, 60, spread=0.1)
    norms[[45, 46, 50]] = 40.0
    state = recorded(norms, optaxclip.clip_by_history(5.0, warmup_steps=10, record=40))
    figure = diagnostics.plot(state)
    axes = figure.axes[0]
    stats = optaxclip.clip_stats(state, history=True)
    label = f"limit, clips {100 * np.mean(stats['clip_scale'] != 1):.1f} %"
    np.testing.assert_array_equal(curve(axes, "norm").get_xdata(), stats["clip_steps"])
    np.testing.assert_array_equal(curve(axes, label).get_ydata(), stats["clip_limit"])
    assert ticks(axes) == [(45.5, 47.5), (50.5, 51.5)]
    assert axes.get_xlim() == (20.5, 60.5)
    beside = diagnostics.plot(state, fixed=FIXED)
    assert [label.split(",")[0] for label in legend(beside)[:3]] == ["norm", "recorded limit", "fixed"]
    assert ticks(beside.axes[0]) == [(45.5, 47.5), (50.5, 51.5)]  # those of the run


def test_the_ring_that_led_to_the_first_nonfinite_step():
    state = recorded([1, 2, np.nan, *range(4, 100)], optaxclip.clip_by_global_norm(1.0, record=10))
    axes = diagnostics.plot(state, history="first_nonfinite").axes[0]
    assert axes.get_xlim() == (0.5, 4.5)
    assert [(span.get_x(), span.get_width()) for span in axes.patches] == [(2.5, 1.0)]


def test_norms_far_beyond_the_others_do_not_squeeze_the_axes(rng):
    norms = lognormal(rng, 300)
    norms[2] = 1e25
    figure = diagnostics.plot(norms)
    assert_nothing_overlaps(figure)
    history = figure.axes[0]
    assert history.get_ylim()[1] < 1e5
    assert curve(history, "beyond the axis").get_xydata().tolist() == [[3.0, history.get_ylim()[1]]]
    assert [text.get_text() for text in history.texts] == [r"up to $1.0\times10^{25}$"]


def test_zeros_and_infinite_norms_are_gaps(rng):
    norms = lognormal(rng, 50)
    norms[[10, 12, 20]] = 0.0, 0.0, np.inf
    line = curve(diagnostics.plot(norms).axes[0], "norm")
    assert np.flatnonzero(np.isnan(line.get_ydata())).tolist() == [10, 12, 20]
    assert line.get_markevery() == [11]  # without neighbours, a dot


@pytest.mark.parametrize(
    ("norms", "bound"),
    [([0.0, np.nan, 2.0, np.inf], 0.0), (np.full(100, 2.0), math.inf), ([1e-40, 3e38], 1e-30)],
    ids=["gaps", "constant", "wide"],
)
def test_every_history_with_a_norm_can_be_drawn(norms, bound):
    figure = diagnostics.plot(norms, optaxclip.clip_by_global_norm(bound))
    figure.draw_without_rendering()
    assert figure.canvas.get_width_height() == (1440, 1120)


def test_a_figure_is_saved_in_its_size_even_of_one_norm(tmp_path):
    diagnostics.plot([1.0], optaxclip.clip_by_global_norm(2.0)).savefig(tmp_path / "norms.png")
    width, height = np.frombuffer((tmp_path / "norms.png").read_bytes()[16:24], ">u4")
    assert (width, height) == (1440, 1120)


# Several groups.


def test_the_groups_furthest_outside_have_a_panel_each(rng):
    rows = np.stack([lognormal(rng, 40, spread=0.1) for _ in range(8)], axis=1)
    rows[20] = 1, 9, 8, 2, 3, 7, np.nan, 6
    state = recorded(rows, optaxclip.clip_by_leaf_norm(1.5, record=40))
    figure = diagnostics.plot(state, double=optaxclip.clip_by_leaf_norm(3.0))
    assert_nothing_overlaps(figure)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["b", "c", "e", "f", "g", "h"]
    assert figure.get_supxlabel() == "step; 6 of 8 groups, those furthest outside their bands"
    for axes, group in zip(figure.axes, (1, 2, 4, 5, 6, 7), strict=True):
        np.testing.assert_array_equal(curve(axes, "norm").get_ydata(), np.float32(rows[:, group]))
        assert {ydata for line in axes.lines[1:] for ydata in line.get_ydata()} == {1.5, 3.0}
        assert len(axes.patches) == (group == 6)  # hatched
    assert ticks(figure.axes[0]) == [(20.5, 21.5)]


def test_groups_that_all_have_a_panel_need_no_explanation(rng):
    state = recorded(lognormal(rng, 20).reshape(10, 2), optaxclip.clip_by_leaf_norm(0.5, record=10))
    figure = diagnostics.plot(state)
    assert ([axes.get_title(loc="left") for axes in figure.axes], figure.get_supxlabel()) == (["a", "b"], "step")


# What can't be drawn.


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"optaxclip\[demo\]"):
        diagnostics.plot([1.0])


def test_without_a_positive_norm_there_is_nothing_to_draw():
    empty = optaxclip.clip_by_global_norm(1.0, record=3).init(np.zeros(2, np.float32))
    for norms in ([0.0, math.inf], [], empty):
        with pytest.raises(ValueError, match="no finite, positive norm to draw"):
            diagnostics.plot(norms)


def test_what_can_not_be_replayed_can_not_be_drawn():
    with pytest.raises(ValueError, match="leaf can't be replayed"):
        diagnostics.plot([1.0], leaf=optaxclip.clip_by_leaf_norm(1.0))
