"""Under `jax_debug_infs` an infinity in any intermediate result is an error: there is none on ordinary gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optaxclip import thresholds

THRESHOLDS = {
    "constant": lambda: thresholds.constant(1.0),
    "between": lambda: thresholds.between(0.1, 1.0),
    "exactly": lambda: thresholds.exactly(1.0),
    "smooth": lambda: thresholds.smooth(1.0),
    "smooth, without a bound": lambda: thresholds.smooth(np.inf),
    "relative_to_params": lambda: thresholds.relative_to_params(0.1, floor=1e-3),
    "chain": lambda: thresholds.chain(thresholds.zscore(warmup_steps=2), thresholds.constant(np.inf)),
    "quantile": lambda: thresholds.quantile(0.1),
    "quantile, 1": lambda: thresholds.quantile(1.0),
    "quantile of a window": lambda: thresholds.quantile(0.1, window=4),
    "order_statistic": lambda: thresholds.order_statistic(5, window=4),
    "tracked_quantile": lambda: thresholds.tracked_quantile(0.5),
    "zscore": lambda: thresholds.zscore(warmup_steps=2),
    "mean_std": lambda: thresholds.mean_std(window=4, min_count=2),
    "ema_ratio": lambda: thresholds.ema_ratio(warmup_steps=2, warmup_max_norm=1.0),
    "ema_band": lambda: thresholds.ema_band(2.0, low=0.5),
    "ema_band from 0": lambda: thresholds.ema_band(2.0, initial=0.0, max_down=0.9),
    "average": lambda: thresholds.average(0.9),
    "average, decay 0": lambda: thresholds.average(0.0),
    "growth": thresholds.growth,
    "normalised": thresholds.normalised,
    "normalised, decay 0": lambda: thresholds.normalised(0.0, 0.0, eps=0.0),
}


@pytest.fixture
def infinities_are_errors():
    jax.config.update("jax_debug_infs", True)
    yield
    jax.config.update("jax_debug_infs", False)


@pytest.mark.usefixtures("infinities_are_errors")
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", THRESHOLDS)
def test_no_threshold_makes_one(name, jit):
    threshold = THRESHOLDS[name]()

    def limit(norms, state):
        return threshold.limit(norms, state, lambda: norms)

    step = jax.jit(limit) if jit else limit
    state = threshold.init({"a": jnp.float32(1), "b": jnp.float32(1)})
    for size in (1.0, 2.0, 0.0, 3.0, 1e30, 1e-30):
        (_, upper), state = step({"a": jnp.float32(size), "b": jnp.float32(2 * size)}, state)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((upper, state)))
