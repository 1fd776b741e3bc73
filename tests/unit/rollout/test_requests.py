"""Sequences in flight are resumed only where the call asks for the very samples they begin."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from r1_megatron.config.schema import SamplingConfig
from r1_megatron.rollout.in_flight import InFlight
from r1_megatron.rollout.race import Race
from r1_megatron.rollout.requests import Call, check_call, make_requests
from r1_megatron.rollout.sampler import request_key
from r1_megatron.types import Prompt

SEED, REQUEST = 11, (4 << 20) + 1
CALL = Call(
    prompts=[Prompt(index=4, text="", tokens=(7, 8, 9)), Prompt(index=6, text="", tokens=(5,))],
    samples_per_prompt=3,
    sampling=SamplingConfig(max_new_tokens=5),
    seed=SEED,
    policy_version=2,
    routing_shape=([1, 3], 2),
)
BEGUN = InFlight(
    request=REQUEST,
    key=request_key(SEED, REQUEST),
    tokens=np.array([7, 8, 9, 30, 31]),
    prompt_len=3,
    logprobs=np.array([-1.5, -0.5], dtype=np.float32),
    finish=None,
    policy_version=2,
    routed_experts={layer: np.zeros((4, 2), dtype=np.uint8) for layer in (1, 3)},
)


def check(*begun: InFlight, **changes: Any) -> None:
    check_call(replace(CALL, in_flight=begun, **changes), vocab_size=40, max_len=20)


def test_what_is_left_to_draw() -> None:
    """A finished sample is asked for no more, an unfinished one goes on, the others are as new; in order."""
    finished = replace(
        BEGUN, request=6 << 20, key=request_key(SEED, 6 << 20), finish="stop", tokens=np.array([5, 1, 1])
    )
    finished = replace(finished, prompt_len=1, routed_experts={layer: np.zeros((2, 2), np.uint8) for layer in (1, 3)})
    check(finished, BEGUN)
    requests = make_requests(replace(CALL, in_flight=[finished, BEGUN]))
    assert [request.request for request in requests] == [(4 << 20) + n for n in range(3)] + [
        (6 << 20) + n for n in (1, 2)
    ]
    assert [request.response.tolist() for request in requests] == [[], [30, 31], [], [], []]
    assert requests[1].logprobs.tolist() == [-1.5, -0.5]
    assert [request.prompt_number for request in requests] == [0, 0, 0, 1, 1]
    assert all(request.key == request_key(SEED, request.request) for request in requests)
    assert all(request.max_new_tokens == 5 for request in requests)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"request": 5 << 20}, "(prompt 5, sample 0) is none of the 3 samples of prompts [4, 6]"),
        ({"request": (4 << 20) + 3}, "(prompt 4, sample 3) is none of the 3 samples"),
        ({"tokens": np.array([7, 8, 8, 30, 31])}, "begins with other tokens than prompt 4"),
        ({"prompt_len": 2}, "begins with other tokens than prompt 4"),
        ({"key": 5}, "was drawn with another seed than 11"),
        ({"policy_version": 1}, "was drawn by version 1 of the policy, this is version 2"),
        ({"tokens": np.array([7, 8, 9, 30, 40])}, "has tokens [40], outside [0, 40)"),
        ({"logprobs": np.zeros(3, np.float32)}, "has 2 drawn tokens and 3 log-probabilities"),
        ({"tokens": np.array([7, 8, 9]), "logprobs": np.zeros(0, np.float32)}, "has 0 drawn tokens"),
        ({"routed_experts": None}, "has no experts [4, 2] of layers [1, 3]"),
        ({"routed_experts": {1: np.zeros((4, 2))}}, "has no experts [4, 2] of layers [3]"),
    ],
)
def test_a_sequence_of_another_call_is_refused(change: dict[str, Any], text: str) -> None:
    check(BEGUN)
    with pytest.raises(ValueError, match="cannot resume the rollouts in flight: request ") as refusal:
        check(replace(BEGUN, **change))
    assert text in str(refusal.value)


def test_tokens_of_earlier_versions_are_carried_where_groups_race() -> None:
    carried = replace(BEGUN, carried_versions=np.array([1], dtype=np.int32))
    race = Race([4, 6], 1, keeps_rest=True)
    check(carried, race=race)
    check(carried.carried(), race=race, policy_version=3)
    for begun, changes, text in (
        (carried, {}, "has 1 tokens of earlier steps (rollout.over_sampling_prompts is 0)"),
        (carried, {"policy_version": 3, "race": race}, "was drawn by version 2 of the policy, this is version 3"),
        (
            carried.carried(),
            {"policy_version": 1, "race": race},
            "was drawn by version 2 of the policy, this is version 1",
        ),
    ):
        with pytest.raises(ValueError, match="cannot resume the rollouts in flight: request ") as refusal:
            check(begun, **changes)
        assert text in str(refusal.value)


def test_a_sequence_at_its_limit_is_finished_or_refused() -> None:
    short = replace(CALL.sampling, max_new_tokens=2)
    check(replace(BEGUN, finish="length"), sampling=short)
    with pytest.raises(ValueError, match=r"is on its way with 2 tokens, sampling.max_new_tokens=2"):
        check(BEGUN, sampling=short)
    with pytest.raises(ValueError, match=r"is finished with 2 tokens, sampling.max_new_tokens=1"):
        check(replace(BEGUN, finish="stop"), sampling=replace(short, max_new_tokens=1))


def test_all_problems_are_told_together() -> None:
    with pytest.raises(
        ValueError, match=rf"request {REQUEST} is given twice; request {REQUEST} was drawn by version 1"
    ):
        check(BEGUN, replace(BEGUN, policy_version=1))


def test_experts_are_needed_only_where_they_are_recorded() -> None:
    check(replace(BEGUN, routed_experts=None), routing_shape=None)
    check(replace(BEGUN, routed_experts=None), routing_shape=([], 2))
