"""A rollout that is stopped and goes on, elsewhere if need be, ends in the tokens it would have had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed import in_flight_checks as checks
from tests.distributed.layouts import LAYOUTS, layout, world_size
from tests.rank_pool import RankPool

# Largest difference of a log-probability, in nats: a prompt's forward rounds otherwise than one token after the other.
TOLERANCE = 1e-4
CASES: dict[str, dict[str, Any]] = {
    **{name: {"parallel": LAYOUTS[name]} for name in ("one", "pp2_uneven", "pp2vpp2", "ep2", "tp2pp2ep2")},
    "ep2_uneven": {"parallel": LAYOUTS["ep2"], "uneven": True},
    # The first replica has no prompt at all.
    "dp2_uneven": {"parallel": LAYOUTS["dp2"], "uneven": True},
}


@pytest.mark.parametrize("name", CASES)
def test_stopped_and_resumed(ranks: RankPool, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    answers = ranks.run(checks.check_stopped, world_size(case["parallel"]), folder=str(tmp_path), **case)
    for kind in ("finished", "unfinished", "queued"):
        assert sum(answer[kind] for answer in answers) > 0, kind
    diff, training_diff = (max(answer[kind] for answer in answers) for kind in ("diff", "training_diff"))
    print(f"{name}: resumed against whole {diff:.1e}, against the training forward {training_diff:.1e}")
    assert diff <= TOLERANCE and training_diff <= TOLERANCE


@pytest.mark.parametrize(
    ("first", "second"),
    [(layout(tp=2, pp=2), layout(ep=2, dp=2)), (layout(ep=2, dp=2), layout(pp=2)), (layout(pp=2, vpp=2), layout(tp=2))],
    ids=["tp2pp2_to_ep2", "ep2_to_pp2", "pp2vpp2_to_tp2"],
)
def test_another_layout_goes_on(ranks: RankPool, tmp_path: Path, first: Any, second: Any) -> None:
    begun = ranks.run(checks.stop_and_save, world_size(first), parallel=first, folder=str(tmp_path))
    answers = ranks.run(checks.resume_elsewhere, world_size(second), parallel=second, folder=str(tmp_path))
    assert {r for rank in begun for r in rank} == {r for answer in answers for r in answer["loaded"]}
    for answer in answers:
        assert answer["diff"] <= TOLERANCE and answer["training_diff"] <= TOLERANCE


def test_stop_strings(ranks: RankPool) -> None:
    ((num_cut, num_split),) = ranks.run(checks.check_stop_strings, 1)
    assert num_cut >= num_split >= 3
