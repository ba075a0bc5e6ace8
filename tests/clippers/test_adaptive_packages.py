"""Step by step against the published packages, in float32 as they run: zclip, pytorch_optimizer, autoclip."""

import numpy as np
import pytest

from tests.reference import packages, sequences
from tests.support import published
from tests.support.driving import drive, fields

pytestmark = pytest.mark.parity

RTOL = 2e-5

OPTIONS = {"reciprocal": {}, "edge": {"mode": "percentile"}, "mean": {"clip_option": "mean"}}


@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize(
    ("clip_to", "drift"),
    [("reciprocal", 0.1), ("reciprocal", 10.0), ("edge", 0.1), ("edge", 10.0), ("mean", 0.1)],
)
@pytest.mark.parametrize("patience", [None, 33])
def test_zclip(rng, clip_to, drift, max_norm, patience):
    """zclip 1.0.0. It has no patience: where there are no 33 spikes in a row it must not matter."""
    given = sequences.training(rng, drift=drift)
    theirs, stats = packages.zclip(given, max_grad_norm=max_norm, **OPTIONS[clip_to])
    tx = published.zclip(clip_to=clip_to, max_norm=max_norm, patience=patience)
    after, seen = drive(tx, given, fields("zscore_mean", "zscore_std", "zscore_spikes"))
    np.testing.assert_allclose(after, packages.without_eps(given, theirs), rtol=RTOL)
    np.testing.assert_allclose(seen["zscore_mean"][24:, 0], stats["mu"][24:], rtol=RTOL)
    np.testing.assert_allclose(seen["zscore_std"][24:, 0] ** 2, stats["var"][24:], rtol=2 * RTOL)
    assert 20 <= np.sum(seen["zscore_spikes"] > 0) < 500


def test_zclip_never_follows_and_ours_does(rng):
    given = sequences.with_shift(sequences.lognormal(rng, 1500, spread=0.1, drift=1.0))
    theirs, _ = packages.zclip(given, max_grad_norm=None)
    after, _ = drive(published.zclip(max_norm=None), given)
    assert np.all(theirs[499:] < 0.2 * given[499:])
    np.testing.assert_allclose(after[:532], packages.without_eps(given, theirs)[:532], rtol=RTOL)
    assert np.mean(after[540:] == given[540:].astype(np.float32)) > 0.9


@pytest.mark.parametrize("options", [{}, {"ratio": 1.5, "decay": 0.9, "warmup_steps": 0, "warmup_max_norm": 0.1}])
def test_adagc(rng, options):
    """pytorch_optimizer 4.1.0, whose names are lambda_abs, lambda_rel and beta."""
    given = sequences.tensors(rng)
    names = {"ratio": "lambda_rel", "decay": "beta", "warmup_steps": "warmup_steps", "warmup_max_norm": "lambda_abs"}
    theirs, stats = packages.adagc(given, **{names[name]: value for name, value in options.items()})
    after, seen = drive(published.adagc(**options), given, fields("norm_average"))
    np.testing.assert_allclose(after, theirs, rtol=RTOL)
    np.testing.assert_allclose(seen["norm_average"], stats["gamma"], rtol=RTOL)
    assert np.all(np.sum(after < 0.999 * given, axis=0) > 20)


@pytest.mark.parametrize("window", [1000, 50])
def test_autoclip(rng, window):
    """autoclip 0.2.1 leaves the current norm out: it clips to our bound of one step before."""
    given = sequences.training(rng)
    theirs, _ = packages.autoclip(given, quantile=0.9, history_length=window)
    tx = published.autoclip(90, window=window, record=True)
    _, bounds = drive(tx, given, lambda state: state.clip_stats.clip_limit[0])
    before = np.concatenate([[np.inf], bounds[:-1].ravel()])
    np.testing.assert_allclose(packages.without_eps(given, theirs), np.minimum(given, before), rtol=RTOL)
