"""The benchmark of decode steps, at tiny lengths; no figure is looked at but how they are derived."""

from __future__ import annotations

import dataclasses

import pytest

from r1_megatron.config.presets import PRESETS
from r1_megatron.config.schema import ModelConfig
from tools import bench_decode, trl_side
from tools.bench_decode import Decode, cells
from tools.bench_vs_trl import DP2
from tools.decode_side import SEGMENT, prompt_length
from tools.rl_workload import Workload


@pytest.fixture(scope="module")
def decode(tmp_path_factory) -> Decode:
    model = ModelConfig(**PRESETS["tiny"])
    decode = Decode(tmp_path_factory.mktemp("bench_decode"), model, "tiny", [28, 40], segments=1, repeats=2, samples=2)
    decode.prepare()
    return decode


def test_segments_are_timed_on_all_ranks_at_every_context(decode, monkeypatch):
    monkeypatch.setattr(bench_decode, "BATCH", 4)
    seconds, floors = decode.ours(DP2)
    assert len(seconds) == len(floors) == 2 and min(seconds) > 0 and max(seconds) < 10
    assert floors[0] == seconds[0] and floors[1] > floors[0]


def test_transformers_tokens_are_timed_one_by_one(decode):
    workload = Workload(2, 2, 4, 4)
    found = trl_side.decode(str(decode.folder / "model"), workload, ["w2 w3 w4 w5", "w6 w7 w8 w9"], 5, repeats=2)
    assert len(found["steps"]) == 2 * 4 and min(found["steps"]) > 0


def test_what_counts_has_the_context_in_its_middle():
    for segments in (1, 4):
        first = prompt_length(128, segments) + SEGMENT  # the segment with the prompts does not count
        assert first + SEGMENT * segments / 2 == 128


def test_operations_are_those_of_absorbed_attention(decode):
    model = dataclasses.replace(decode.model, num_layers=1, num_attention_heads=1, kv_lora_rank=1)
    one = dataclasses.replace(decode, model=model)
    # A score and a value are a multiplication and an addition for each number of the latent, rotary ones score only.
    assert one.operations(1) == bench_decode.BATCH * (2 * (1 + model.qk_pos_emb_head_dim) + 2 * 1)


def test_growth_is_judged():
    assert cells("ours", [1.0, 1.2], 1.1, True)[1:] == ["1000.00", "1200.00", "+20%", "+10%", "< 15%", "NO"]
    assert cells("ours", [1.0, 1.1], 1.05, True)[-1] == "yes"
    assert cells("ours", [1.0, 1.1], 1.05, False)[-3:] == ["+5%", "", ""]
    assert cells("theirs", [1.0, 3.0], None, True)[-4:] == ["+200%", "", "", ""]
