"""The choice of experts is Transformers' own, for every count of groups and experts."""

from __future__ import annotations

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from r1_megatron.model.routing import best_experts


@pytest.mark.parametrize(
    ("experts", "groups", "chosen_groups", "topk"),
    [
        (256, 8, 4, 8),
        (64, 1, 1, 6),
        (16, 4, 2, 1),
        (16, 4, 2, 2),
        (16, 4, 3, 5),
        (16, 4, 4, 3),
        (12, 6, 3, 6),
        (8, 4, 1, 2),
    ],
)
def test_experts_are_those_of_transformers(experts: int, groups: int, chosen_groups: int, topk: int) -> None:
    torch.manual_seed(experts + topk)
    config = DeepseekV3Config(
        hidden_size=8, n_routed_experts=experts, n_group=groups, topk_group=chosen_groups, num_experts_per_tok=topk
    )
    router = DeepseekV3TopkRouter(config)
    router.weight.data.normal_()
    router.e_score_correction_bias.normal_(std=0.5)  # some scores become negative
    hidden = torch.randn(200, 8)
    logits, _, expected = router(hidden)
    scores = logits.sigmoid() + router.e_score_correction_bias
    best, found = best_experts(scores, topk, groups, chosen_groups)
    assert torch.equal(found.sort(-1).values, expected.sort(-1).values)
    assert torch.equal(best, scores.gather(1, found))


def test_without_groups_all_experts_compete() -> None:
    scores = torch.randn(50, 16)
    assert torch.equal(best_experts(scores, 3, None, None)[1], scores.topk(3).indices)
