"""The naming table against the model and the checkpoints that training builds and writes."""

from __future__ import annotations

from pathlib import Path

from r1_megatron.checkpoint.naming import entries
from tests.rank_pool import RankPool
from tests.tiny import TINY, TINY_FULL_RANK_QUERY, TINY_MTP, TINY_TIED

MODELS = {"tiny": TINY, "full_rank_query": TINY_FULL_RANK_QUERY, "mtp": TINY_MTP, "tied": TINY_TIED}


def test_keys_and_shapes_are_those_of_a_written_checkpoint(ranks: RankPool, tmp_path: Path) -> None:
    answers = ranks.run("tests.distributed.naming_checks:keys_and_names", 1, models=MODELS, folder=str(tmp_path))
    for name, model in MODELS.items():
        table = entries(model)
        assert {entry.name: entry.shape for entry in table} == answers[0][name]["names"]
        keys = {}
        for entry in table:
            stacked = () if entry.expert is None else (model.num_moe_experts,)
            keys[entry.key] = (*stacked, *entry.shape)
        assert keys == answers[0][name]["keys"]
