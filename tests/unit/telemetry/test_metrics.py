"""Metrics merge to the same numbers however the values were split, against numpy on all values at once."""

from __future__ import annotations

import math

import numpy as np
import pytest

from r1_megatron.telemetry.clock import Clock
from r1_megatron.telemetry.metrics import Metrics


def _collect(values: np.ndarray, weights: np.ndarray) -> Metrics:
    metrics = Metrics()
    for value, weight in zip(values, weights):
        metrics.mean("mean", value, weight)
        metrics.sum("sum", value)
        metrics.max("max", value)
        metrics.min("min", value)
    metrics.distribution("d", values, ("mean", "std", "max"))
    return metrics


@pytest.mark.parametrize("cuts", [(), (1,), (7, 8), (0, 30, 30)])
def test_any_split_over_ranks_gives_the_numbers_of_all_values(cuts):
    rng = np.random.default_rng(0)
    values, weights = rng.normal(1e3, 2.0, 50), rng.integers(1, 9, 50).astype(float)
    parts = [_collect(v, w) for v, w in zip(np.split(values, cuts), np.split(weights, cuts))]
    result = parts[0].reduce(lambda mine: parts).result()
    expected = {
        "mean": np.average(values, weights=weights),
        "sum": values.sum(),
        "max": values.max(),
        "min": values.min(),
        "d/mean": values.mean(),
        "d/std": values.std(),
        "d/max": values.max(),
    }
    assert result == pytest.approx(expected, rel=1e-12)


def test_ranks_may_hold_different_names():
    left, right = Metrics(), Metrics()
    left.mean("only/left", 1.0)
    right.mean("only/right", 3.0)
    assert left.reduce(lambda mine: [mine, right]).result() == {"only/left": 1.0, "only/right": 3.0}


@pytest.mark.parametrize("order", [(1.0, math.nan), (math.nan, 1.0)])
def test_nan_is_never_swallowed(order):
    metrics = Metrics()
    for value in order:
        metrics.max("max", value)
        metrics.mean("mean", value)
    assert all(math.isnan(value) for value in metrics.result().values())


def test_weight_zero_says_nothing():
    metrics = Metrics()
    metrics.mean("empty", 5.0, weight=0.0)
    assert metrics.result() == {}
    metrics.mean("empty", 2.0, weight=1.0)
    assert metrics.result() == {"empty": 2.0}


def test_one_name_has_one_statistic():
    metrics = Metrics()
    metrics.mean("x", 1.0)
    with pytest.raises(AssertionError, match="collected as mean"):
        metrics.max("x", 1.0)


def test_clock_adds_up_phases_and_leaves_out_what_is_between_steps():
    now = [100.0]
    clock = Clock(lambda: now[0])

    def phase(name: str, seconds: float) -> None:
        with clock(name):
            now[0] += seconds

    now[0] += 50.0  # loading
    phase("rollout", 2.0)
    now[0] += 0.5
    phase("train", 1.0)
    phase("train", 1.5)
    assert clock.take() == pytest.approx({"timing_s/rollout": 2.0, "timing_s/train": 2.5, "timing_s/step": 5.0})
    now[0] += 9.0  # a checkpoint
    phase("rollout", 3.0)
    assert clock.take() == pytest.approx({"timing_s/rollout": 3.0, "timing_s/step": 3.0})
    assert clock.take() == {}


def test_clock_counts_a_phase_that_raises():
    now = [0.0]
    clock = Clock(lambda: now[0])
    with pytest.raises(RuntimeError), clock("reward"):
        now[0] += 4.0
        raise RuntimeError
    assert clock.take()["timing_s/reward"] == 4.0
