"""The formula against torch's own count of the products that Transformers' models make."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from r1_megatron.config.presets import PRESETS, count_parameters
from r1_megatron.config.schema import ModelConfig
from r1_megatron.planner.flops import ModelFlops, model_flops
from tests import oracle
from tests.tiny import TINY, TINY_FULL_RANK_QUERY, TINY_MTP, VARIANTS

MODELS = {"tiny": TINY, "full_rank_query": TINY_FULL_RANK_QUERY} | {
    name: replace(VARIANTS[name], mtp_num_layers=0)
    for name in ("only_experts", "no_experts", "qwen2", "qwen3", "llama")
}


@pytest.mark.parametrize("length", [1, 24])
@pytest.mark.parametrize("name", MODELS)
def test_transformers_makes_these_products(name: str, length: int) -> None:
    """Eager attention multiplies all pairs of positions, the later ones too."""
    model = oracle.hf_model(MODELS[name]).eval()
    model.set_attn_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.arange(length)[None])
    flops = model_flops(MODELS[name])
    assert counter.get_total_flops() == flops.per_token * length + flops.per_pair * length**2


def test_causal_pairs() -> None:
    flops = ModelFlops(per_token=10, per_pair=2)
    assert flops.forward(3) == 3 * 10 + (1 + 2 + 3) * 2
    assert flops.training([3, 1]) == 3 * (42 + 12)
    # The first two tokens were computed for another: one token is left, which looks back on three.
    assert flops.forward(2) + flops.forward(1, after=2) == flops.forward(3)
    assert flops.training([3, 1], shared=[2, 0]) == 3 * (10 + 3 * 2 + 12)
    assert flops.work(3) * flops.per_token == pytest.approx(flops.forward(3))


def test_deepseek_v3() -> None:
    """Two operations for each of the 37 B active parameters (the paper's count; norms and embedding do not multiply),
    and one more layer, joining projection and head for multi-token prediction."""
    model = ModelConfig(**PRESETS["deepseek_v3_671b"])
    without = model_flops(replace(model, mtp_num_layers=0))
    assert without.per_token == pytest.approx(2 * count_parameters(model)[1], rel=1e-4)
    assert model_flops(model).per_token > without.per_token
    assert without.per_pair == 2 * 61 * 128 * (192 + 128)


def test_multi_token_prediction_adds_a_layer_and_a_head() -> None:
    added = model_flops(TINY_MTP).per_token - model_flops(TINY).per_token
    one_layer = model_flops(replace(TINY, num_layers=5)).per_token - model_flops(TINY).per_token
    assert added == one_layer + 2 * (2 * TINY.hidden_size**2 + TINY.hidden_size * TINY.vocab_size)
