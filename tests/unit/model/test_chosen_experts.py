"""Which experts ``train.moe_experts`` means where."""

from __future__ import annotations

import pytest

from r1_megatron.config.schema import TrainConfig
from r1_megatron.model.deepseek_v3 import chosen_experts


@pytest.mark.parametrize(
    ("device", "transformer_engine", "expected"),
    [("cpu", False, "grouped"), ("cuda", True, "transformer_engine"), ("cuda", False, "sequential")],
)
def test_auto_takes_what_has_been_run_there(device: str, transformer_engine: bool, expected: str) -> None:
    assert chosen_experts(TrainConfig(), device, transformer_engine) == expected
    for asked in ("grouped", "sequential"):
        assert chosen_experts(TrainConfig(moe_experts=asked), device, transformer_engine) == asked


def test_what_only_the_machine_knows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"moe_experts=transformer_engine: this run on cuda has no Transformer Engine"):
        chosen_experts(TrainConfig(moe_experts="transformer_engine"), "cuda", False)
    recompute = TrainConfig(recompute_granularity="selective", recompute_modules=("moe_act",))
    assert chosen_experts(recompute, "cpu", False) == "grouped"
    with pytest.raises(ValueError, match=r"moe_act does not go with the sequential experts .*=auto means on cuda"):
        chosen_experts(recompute, "cuda", False)
