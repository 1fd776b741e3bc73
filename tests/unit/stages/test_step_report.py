"""What replicas say of their rollouts, as numbers of the step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from r1_megatron.config.schema import RunConfig
from r1_megatron.rollout.speculation import Acceptance
from r1_megatron.stages.step_report import StepReport
from r1_megatron.telemetry.metrics import Metrics


def said(engine: dict[str, float], num_expired_tokens: int) -> Metrics:
    run = SimpleNamespace(cfg=RunConfig(), engine=SimpleNamespace(metrics=engine))
    report, mine = StepReport(cast(Any, run)), Metrics()
    report.num_expired_tokens = num_expired_tokens
    report._of_rollouts(mine, [])
    return mine


def test_replicas_weigh_what_they_drew() -> None:
    """One draws 100 tokens in 80 draws, another 9 in 6 and throws 50 older ones away, a third one has no groups."""
    parts = (Acceptance(40, 20, 80), 100, 0), (Acceptance(3, 3, 6), 9, 50), (Acceptance(), 0, 0)
    cancelled = {"rollout/cancelled_num_tokens": 7}
    everyone = [said(drafts.metrics(num) | cancelled, expired) for drafts, num, expired in parts]
    metrics = everyone[0].reduce(lambda _: everyone).result()
    assert metrics["rollout/draft_acceptance"] == pytest.approx(23 / 43)
    assert metrics["rollout/tokens_per_draw"] == pytest.approx(109 / 86)
    assert (metrics["rollout/num_drafts"], metrics["rollout/num_draws"]) == (43, 86)
    assert metrics["rollout/cancelled_num_tokens"] == 3 * 7 + 50
