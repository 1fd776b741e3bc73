"""Experts on other replicas: every row gets the sum over all its experts, whichever way it travels."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from r1_megatron.model.expert_exchange import rows_in_vain
from tests.distributed import exchange_checks as checks
from tests.distributed.layouts import LAYOUTS, layout, world_size
from tests.rank_pool import RankPool


@pytest.mark.parametrize(
    ("parallel", "dtype", "tolerance"),
    [
        (LAYOUTS["ep2"], torch.float32, 1e-5),
        (LAYOUTS["tp2dp2ep4"], torch.bfloat16, 2e-2),
        (layout(dp=4, ep=2, etp=2), torch.float32, 1e-5),
    ],
    ids=["ep2", "ep4_bf16", "ep2etp2"],
)
def test_rows_meet_their_experts(
    ranks: RankPool, parallel: checks.ParallelConfig, dtype: torch.dtype, tolerance: float
) -> None:
    answers = ranks.run(checks.compare, world_size(parallel), parallel=parallel, dtype=dtype)
    for rank, answer in enumerate(answers):
        assert answer["diff"] <= tolerance, f"rank {rank}"
        assert answer["ways"], f"rank {rank}: counting the rows changes them"
        assert answer["alone"], f"rank {rank}: a row depends on its batch"
        assert answer["padding"] == 0.0
    firsts = [answer["first"] for answer in answers if answer["first"] is not None]
    assert len(firsts) > 1 and all(first == firsts[0] for first in firsts), "a row depends on its rank"


@pytest.mark.parametrize(("owners", "slices", "choices"), [(2, 1, 4), (4, 2, 3), (3, 1, 5)])
def test_rows_in_vain(owners: int, slices: int, choices: int) -> None:
    """Counted over all choices of owners: the ranks other than the sender's that have none of a row's experts."""
    cases = list(product(range(owners), repeat=choices))
    vain = sum(slices for case in cases for owner in range(1, owners) if owner not in case)
    assert rows_in_vain(7, owners, slices, choices) == pytest.approx(7 * vain / len(cases))
