"""Two spellings of one model are one model; any other difference is named."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest

from r1_megatron.checkpoint.same_model import check_same_model
from r1_megatron.config.schema import ModelConfig

DENSE = ModelConfig(architecture="qwen3", num_attention_heads=4)


@pytest.mark.parametrize(
    "model, changes",
    [
        (ModelConfig(), {"preset": "demo", "init_method_std": 1.0, "mtp_loss_scaling_factor": 3.0}),
        (ModelConfig(), {"head_dim": 7, "num_query_groups": 2, "mscale": 0.5, "rotary_scaling_factor": 2.0}),
        (
            ModelConfig(moe_router_num_groups=None, moe_router_group_topk=None),
            {"moe_router_num_groups": 1, "moe_router_group_topk": 1},
        ),
        (ModelConfig(first_k_dense_replace=4), {"num_moe_experts": 99}),
        (DENSE, {"head_dim": 16, "num_query_groups": 4, "kv_lora_rank": 1, "num_moe_experts": 2, "mtp_num_layers": 1}),
        (replace(DENSE, architecture="qwen2"), {"attention_bias": True}),
    ],
)
def test_one_function(model: ModelConfig, changes: dict[str, Any]) -> None:
    check_same_model("x", model, asdict(model) | changes, "checkpoint.load")


@pytest.mark.parametrize(
    "model, name, value, shown",
    [
        (ModelConfig(), "num_layers", 5, "model.num_layers=4, there 5"),
        (ModelConfig(), "q_lora_rank", None, "model.q_lora_rank=48, there null"),
        (ModelConfig(), "moe_router_num_groups", 8, "model.moe_router_num_groups=4, there 8"),
        (ModelConfig(rope_type="yarn"), "mscale", 0.707, "model.mscale=1.0, there 0.707"),
        (DENSE, "head_dim", 8, "model.head_dim=null, there 8"),
        (DENSE, "architecture", "llama", 'model.architecture="qwen3", there "llama"'),
    ],
)
def test_another_function(model: ModelConfig, name: str, value: Any, shown: str) -> None:
    with pytest.raises(ValueError, match="holds another model") as refused:
        check_same_model("runs/x", model, asdict(model) | {name: value}, "checkpoint.load")
    assert shown in str(refused.value) and "checkpoint.load: runs/x" in str(refused.value)


def test_fields_of_later_versions_do_not_matter() -> None:
    model = ModelConfig()
    written = {name: value for name, value in asdict(model).items() if name != "architecture"}
    check_same_model("x", model, written | {"not_known_yet": 1}, "checkpoint.load")
    check_same_model("x", model, {}, "checkpoint.load")
