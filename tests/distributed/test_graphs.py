"""Decode steps that are recorded and played: the same samples as without, and nothing a CUDA graph would refuse."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from r1_megatron.config.schema import SamplingConfig
from r1_megatron.rollout.graphs import bucket_of
from tests.distributed import graph_checks as checks
from tests.distributed.layouts import LAYOUTS, world_size
from tests.distributed.rollout_checks import MODEL, SAMPLING
from tests.distributed.variant_checks import sampled
from tests.rank_pool import RankPool
from tests.tiny import VARIANTS

TIGHT = {"cache_tokens": 64, "max_prefill_tokens": 8, "page_size": 4}
# Name: layout, recorder, options. Ten places for fifteen samples: sequences join and leave all the time.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "top-k and top-p": ("one", "trace", {"sampling": replace(SAMPLING, top_k=7, top_p=0.8, min_p=0.01)}),
    "top-p alone": ("one", "trace", {"sampling": replace(SAMPLING, top_p=0.8)}),
    # Two rows of a sequence, a token and what is drafted behind it.
    "drafts": ("one", "trace", {"model": replace(MODEL, mtp_num_layers=1), "speculative_tokens": 1}),
    # Tied embeddings, and a layer that goes through its module.
    "student": ("one", "trace", {"model": sampled(VARIANTS["qwen2"])}),
    "tp2ep2": ("tp2ep2", "run_again", TIGHT),  # pages grow, prompts come in chunks, sequences give up their places
    "pp2vpp2": ("pp2vpp2", "run_again", {"pipeline_groups": 3}),
}


@pytest.mark.parametrize("case", CASES)
def test_samples_are_those_of_plain_steps(ranks: RankPool, case: str) -> None:
    name, recorder, options = CASES[case]
    parallel = LAYOUTS[name]
    answers = ranks.run(
        checks.check_recorded, world_size(parallel), timeout_s=150, parallel=parallel, recorder=recorder, **options
    )
    for answer in answers:
        (recorded, played), (recorded_2, played_2), (recorded_3, played_3) = answer["numbers"]
        assert 2 <= recorded <= recorded_2 and played >= 5
        assert played_2 > played  # of the same recordings, with other weights
        assert recorded_3 >= 2 and played_3 >= 5  # none of them is left
        assert answer["played"] == played_3
        if "cache_tokens" in options:
            assert answer["preemptions"] > 0


@pytest.mark.parametrize(
    ("sampling", "columns"),
    [
        (SamplingConfig(temperature=0.7), 2),
        (SamplingConfig(temperature=0.0), 2),
        (SamplingConfig(top_k=5, top_p=0.9, min_p=0.01), 2),
        (SamplingConfig(top_p=0.9), MODEL.vocab_size),  # ends with the logits
    ],
    ids=str,
)
def test_nothing_in_a_recording_waits_for_the_device(ranks: RankPool, sampling: SamplingConfig, columns: int) -> None:
    (shapes,) = ranks.run(checks.check_without_values, 1, sampling=sampling)
    assert shapes[:2] == [(4, MODEL.hidden_size), (4, columns)] and set(shapes[2:]) == {(4, MODEL.moe_router_topk)}


def test_moved_weights_are_noticed(ranks: RankPool) -> None:
    assert ranks.run(checks.check_moved_weights, 1) == [(True, False)]


def test_buckets() -> None:
    for num_rows in range(1, 1000):
        for multiple in (1, 2, 8):
            bucket = bucket_of(num_rows, multiple)
            assert bucket >= num_rows and bucket % multiple == 0 and bucket_of(bucket, multiple) == bucket
            assert bucket <= max(2 * num_rows, 8) and (num_rows < 64 or bucket <= 1.125 * num_rows + multiple)
    assert len({bucket_of(n) for n in range(1, 257)}) == 27
