"""The stacked experts are megatron-core's SequentialMLP: same values, same gradients, under every expert layout.

The gradients of whole models with stacked experts are compared with Transformers in `test_training.py`, the checkpoints
of both modules are exchanged in `test_stages.py`.
"""

from __future__ import annotations

import pytest

from tests.distributed.layouts import LAYOUTS, world_size
from tests.rank_pool import RankPool


@pytest.mark.parametrize("layout", ["one", "ep2", "tp2etp2", "tp2ep2etp2"])
def test_grouped_experts_equal_sequential_experts(ranks: RankPool, layout: str) -> None:
    parallel = LAYOUTS[layout]
    answers = ranks.run("tests.distributed.expert_checks:compare", world_size(parallel), parallel=parallel)
    for rank, loads in enumerate(answers):
        for load, distances in enumerate(loads):
            assert max(distances.values()) <= 1e-12, f"rank {rank}, load {load}: {distances}"
