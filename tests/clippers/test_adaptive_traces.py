"""Traces of the methods that follow a history of norms, which can be checked by hand."""

import numpy as np
import pytest

from optaxclip import clip_by, contrib, norms, thresholds
from tests.support import published
from tests.support.driving import drive, drive_all, driver, fields


def close(ours, trace, case=""):
    """To the six digits that the traces give, and what float32 adds to them."""
    np.testing.assert_allclose(ours, trace, rtol=2e-6, atol=5e-7, err_msg=str(case))


ZCLIP = [1, 1.2, 0.8, 1, 3, 1, 10, 0.1]


def test_zclip():
    traces = {"mean": [1, 1.2, 0.8, 1, 1, 1, 1, 0.1], "edge": [1, 1.2, 0.8, 1, 1.353553, 1, 1.383146, 0.1]}
    txs = {clip_to: published.zclip(warmup_steps=4, max_norm=None, clip_to=clip_to) for clip_to in traces}
    for clip_to, (ours, _) in drive_all(txs, ZCLIP).items():
        close(ours, traces[clip_to], clip_to)


def test_zclip_by_default_and_its_statistics():
    ours, seen = drive(published.zclip(warmup_steps=4, max_norm=None), ZCLIP, fields("zscore_mean", "zscore_std"))
    # Half a unit of the last digit: 1.01496 has one less than the others.
    assert np.all(np.abs(ours - [1, 1.2, 0.8, 1, 1.0625, 1, 1.01496, 0.1]) <= [1e-6] * 6 + [5e-6, 1e-6])
    close(seen["zscore_mean"][3:, 0], [1, 1.001875, 1.001819, 1.002213, 0.975147])
    close(seen["zscore_std"][3:, 0] ** 2, [0.02, 0.019510, 0.018925, 0.018362, 0.040788])


def test_zclip_with_a_cap():
    tx = published.zclip(warmup_steps=4, max_norm=1.0)
    after, seen = drive(tx, [2, 2.4, 1.6, 2, 3, 0.5, 10, 2], fields("zscore_mean", "zscore_std"))
    close(after, [1, 1, 1, 1, 1, 0.5, 1, 1])
    close(seen["zscore_mean"][-1, 0], 1.973791)
    close(seen["zscore_std"][-1, 0] ** 2, 0.138601)


AUTOCLIP = [1, 2, 0.5, 4, 1, 8, 0.25, 1]


def test_autoclip():
    traces = {  # by percentile and window
        (10, 8): [1, 1.1, 0.6, 0.65, 0.7, 0.75, 0.4, 0.425],
        (50, 3): [1, 1.5, 1, 2, 1, 4, 1, 1],
    }
    txs = {case: published.autoclip(case[0], window=case[1]) for case in traces}
    for case, (after, _) in drive_all(txs, AUTOCLIP).items():
        close(after, np.minimum(AUTOCLIP, traces[case]), case)


def test_autoclip_of_the_whole_history():
    """The same to 0.9 %."""
    run = driver(published.autoclip(10))
    bounds = [1, 1.1, 0.6, 0.65, 0.7, 0.75, 0.4, 0.425]
    np.testing.assert_allclose(run(AUTOCLIP)[0], np.minimum(AUTOCLIP, bounds), rtol=0.009)
    np.testing.assert_allclose(run([1, 100, *AUTOCLIP[2:]])[0][:2], [1, 10.9], rtol=0.009)


def test_autoclip_beyond_the_norms_that_it_has_exactly(rng):
    given = np.float32(rng.lognormal(size=200))
    after, _ = drive(published.autoclip(30), given)
    bounds = [np.quantile(given[: i + 1], 0.3) for i in range(200)]
    np.testing.assert_allclose(after, np.minimum(given, bounds), rtol=0.009)


PERCENTILE_CLIP = [2, 1, 4, 1, 1, 1, 1, 1, 3, 0.5]


def test_percentile_clip():
    traces = {(5, 100): [2] * 7 + [1] * 3, (25, 4): [2] * 3 + [1] * 7, (100, 100): [np.inf] * 10}
    txs = {case: contrib.percentile_clip(case[0], window=case[1]) for case in traces}
    for case, (after, _) in drive_all(txs, PERCENTILE_CLIP).items():
        close(after, np.minimum(PERCENTILE_CLIP, traces[case]), case)


def test_adagc():
    tx = published.adagc(warmup_steps=4)
    after, seen = drive(tx, np.array([[2, 0.5, 3, 1, 2, 0.4, 10, 1]]).T, fields("norm_average"))
    close(after[:, 0], [1, 0.5, 1, 0.525, 0.525525, 0.4, 0.523930, 0.524453])
    close(seen["norm_average"][:, 0], [1, 0.5, 0.5, 0.5005, 0.501001, 0.498980, 0.499479, 0.499979])


def test_adagc_of_two_tensors():
    tensors = [(3, 4), (0.3, 0.4), (1, 0.2), (0.5, 0.1), (9, 0.1), (0.3, 3)]
    after, seen = drive(published.adagc(warmup_steps=3), np.array(tensors), fields("norm_average"))
    close(after, [(0.6, 0.8), (0.3, 0.4), (0.315, 0.2), (0.315315, 0.1), (0.315630, 0.1), (0.3, 0.403492)])
    close(seen["norm_average"][-1], [0.300883, 0.384663])


@pytest.mark.parametrize(
    ("scales", "after", "average"),
    [
        ({}, [1, 0.75, 0.9375, 1.171875, 0.78125], [0.5, 0.625, 0.78125, 0.976562, 0.878906]),
        ({"max_down": 0.9, "max_up": 1.1}, [1, 0.9, 1, 3.6, 0.11], [0.5, 0.7, 0.85, 2.225, 1.1675]),
    ],
)
def test_aggc(scales, after, average):
    tx = contrib.aggc("all", 1.5, min_ratio=0.8, decay=0.5, min_norm=0.01, initial=0.0, **scales)
    ours, seen = drive(tx, [1, 1, 1, 4, 0.1], fields("norm_average"))
    close(ours, after)
    close(seen["norm_average"][:, 0], average)


HISTORY = [1, 1.2, 0.8, 1, 3, 10, 1, 1, 10]


def test_clip_by_history():
    raw, _ = drive(published.clip_by_history(3.0, window=8, warmup_steps=4, take_in="raw"), HISTORY)
    close(raw, [1, 1.2, 0.8, 1, 1.424264, 3.829815, 1, 1, 10])
    clipped, _ = drive(published.clip_by_history(3.0, window=8, warmup_steps=4), HISTORY)
    close(clipped, [1, 1.2, 0.8, 1, 1.424264, 1.719833, 1, 1, 1.974491])


def test_mean_std_is_the_test_of_skip_step():
    """OLMo-core keeps a step whose norm is not above the bound; window 8 is active from step 4, so after 3 norms."""
    given = [1, 1.2, 0.8, 1, 5, 5, 1, 1]
    for take_in, kept in (("raw", [1, 1, 1, 1, 0, 1, 1, 1]), ("clipped", [1, 1, 1, 1, 0, 0, 1, 1])):
        threshold = thresholds.mean_std(3.0, window=8, warmup_steps=3, ddof=1, take_in=take_in)
        after, _ = drive(clip_by(norms.global_norm(), threshold), given)
        np.testing.assert_array_equal(after == np.float32(given), kept)


def test_clip_by_tracked_quantile():
    given = [2, 2, 1, 0.5, 1, 3, 1.1]
    after, seen = drive(contrib.clip_by_tracked_quantile(), given, fields("tracked_log_norm"))
    close(after, np.minimum(given, [1, 1.105171, 1.221403, 1.105171, 1, 0.904837, 1]))
    close(np.exp(seen["tracked_log_norm"][:, 0]), [1.105171, 1.221403, 1.105171, 1, 0.904837, 1, 1.105171])


def test_clip_norm_growth():
    after, _ = drive(contrib.clip_norm_growth(), [1, 1.005, 2, 2, 0.5, 0.6])
    np.testing.assert_allclose(after, [1, 1.005, 1.01505001, 1.02520052, 0.5, 0.50500001], rtol=3e-7)


def test_zclip_takes_a_lasting_rise_for_a_new_level():
    """From the third spike in a row on, which the mean takes in as it is; two that stood alone do not count."""
    given = [1, 1.2, 0.8, 1, 3, 1, 3, 1, 3, 3, 3, 3]
    tx = published.zclip(warmup_steps=4, max_norm=None, patience=2)
    after, seen = drive(tx, given, fields("zscore_mean", "zscore_spikes"))
    close(after[4:], [1.0625, 1, 1.061014, 1, 1.059531, 1.059855, 1.060163, 1.482472])
    close(seen["zscore_mean"][8:, 0], [1.005168, 1.006809, 1.066604, 1.124606])
    np.testing.assert_array_equal(seen["zscore_spikes"][:, 0], [0, 0, 0, 0, 1, 0, 1, 0, 1, 2, 3, 4])


def test_adagc_stands_still_where_a_tensor_is_not_finite():
    tx = published.adagc(warmup_steps=4)
    after, seen = drive(tx, np.array([(3, 4), (np.nan, 0.1), (1, 2)]), fields("norm_average"))
    close(after, [(0.6, 0.8), (np.nan, 0.1), (1 / np.sqrt(5), 2 / np.sqrt(5))])
    close(seen["norm_average"], [(0.6, 0.8), (0.6, 0.8), (1 / np.sqrt(5), 0.8)])


def test_aggc_raises_past_an_upper_end_that_is_lower():
    tx = contrib.aggc("all", 1.5, decay=0.5, min_norm=2.0, initial=1.0)
    after, seen = drive(tx, [0.5, 3, 1], fields("norm_average"))
    close(after, [2, 2.25, 2])
    close(seen["norm_average"][:, 0], [1.5, 1.875, 1.9375])
