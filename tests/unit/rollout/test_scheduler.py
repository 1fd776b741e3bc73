"""Every token is fed with its own past in its slot, and every sample is what it would be alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from r1_megatron.rollout.scheduler import Lane, Request, split_lanes

VOCAB, MAX_LEN, STOPS = 50, 40, (3, 4)


def next_token(prefix: np.ndarray, key: int) -> int:
    """A "model": the next token depends on the whole prefix and on the request."""
    return hash((key, *prefix.tolist())) % VOCAB


def alone(request: Request) -> list[int]:
    """What the request draws by itself."""
    tokens = request.prompt.tolist()
    while len(tokens) - len(request.prompt) < request.max_new_tokens:
        tokens.append(next_token(np.array(tokens), request.key))
        if tokens[-1] in STOPS:
            break
    return tokens


def random_requests(rng: np.random.Generator, num_prompts: int) -> list[Request]:
    requests = []
    for number in range(num_prompts):
        prompt = rng.integers(5, VOCAB, rng.integers(1, 9))
        max_new_tokens = int(rng.integers(1, 25))
        for sample in range(rng.integers(1, 7)):
            name = number * 100 + sample
            requests.append(Request(name, name * 7919, number, prompt, max_new_tokens))
    return requests


def drive(lanes: list[Lane], num_slots: int) -> tuple[dict[int, list[int]], dict[str, int]]:
    """Run lanes over a cache of plain token ids and check the invariants at every step."""
    cache = np.full((num_slots, MAX_LEN), -1)
    answers: dict[int, list[int]] = {}
    count = {"fed": 0, "steps": 0, "late": 0, "prompts": 0}

    def carry_out(copies) -> None:
        assert not {c.source for c in copies} & {c.target for c in copies}
        for copy in copies:
            cache[copy.target, : copy.length] = cache[copy.source, : copy.length]

    for lane in lanes:
        own = slice(lane.first_slot, lane.first_slot + lane.num_slots)
        others = np.delete(cache, np.r_[own], axis=0).copy()
        while lane.has_work:
            plan = lane.plan()
            assert 0 < lane.num_live <= lane.num_slots
            carry_out(plan.copies_before)
            cache[lane.first_slot + plan.slots, plan.positions] = plan.tokens
            # Decode tokens: one a slot, the first slots, each with its whole past behind it.
            assert plan.slots[: plan.num_decode].tolist() == list(range(plan.num_decode))
            assert sum(plan.prefill_lengths) == len(plan.tokens) - plan.num_decode
            prefixes = []
            for row, slot in zip(plan.sampled_rows, range(lane.num_live)):
                source, position = lane.first_slot + plan.slots[row], plan.positions[row]
                prefixes.append(cache[source, : position + 1].copy())
                assert position + 1 == plan.sample_positions[slot]
            carry_out(plan.copies_after)
            for slot, prefix in enumerate(prefixes):
                assert cache[lane.first_slot + slot, : len(prefix)].tolist() == prefix.tolist()
                assert prefix[: len(lane.live[slot].prompt)].tolist() == lane.live[slot].prompt.tolist()
            tokens = np.array([next_token(p, int(k)) for p, k in zip(prefixes, plan.keys)])
            finished, copies = lane.retire(lane.append(tokens, -tokens.astype(np.float64)))
            for end in finished:
                assert cache[end.slot, : len(end.tokens) - 1].tolist() == end.tokens[:-1].tolist()
                assert end.logprobs.tolist() == (-end.tokens[len(end.request.prompt) :]).tolist()
                assert end.stopped == (end.tokens[-1] in STOPS)
                answers[end.request.request] = end.tokens.tolist()
            carry_out(copies)
            count["fed"] += len(plan.tokens)
            count["steps"] += 1
            count["late"] += len(plan.copies_before)
            count["prompts"] += len(plan.prefill_lengths)
        assert np.array_equal(np.delete(cache, np.r_[own], axis=0), others), "a lane keeps to its slots"
    return answers, count


@pytest.mark.parametrize("seed", range(12))
def test_samples_do_not_depend_on_slots_and_lanes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    requests = random_requests(rng, num_prompts=int(rng.integers(0, 9)))
    num_lanes = int(rng.integers(1, 4))
    num_slots = num_lanes * int(rng.integers(1, 8))
    lanes = split_lanes(requests, num_lanes, num_slots, MAX_LEN, STOPS)
    for lane in lanes:
        lane.max_prefill_tokens = int(rng.integers(1, 40))
    answers, _ = drive(lanes, num_slots)
    assert answers == {request.request: alone(request) for request in requests}


@pytest.mark.parametrize("seed", range(12))
def test_resumed_samples_end_as_if_never_stopped(seed: int) -> None:
    """Any of the samples had come any distance; slots and lanes are as they happen to be."""
    rng = np.random.default_rng(100 + seed)
    requests = random_requests(rng, num_prompts=int(rng.integers(1, 9)))
    expected = {request.request: alone(request) for request in requests}
    begun = []
    for request in requests:
        whole = np.array(expected[request.request][len(request.prompt) :])
        response = whole[: rng.integers(0, len(whole))] if rng.random() < 0.6 else whole[:0]
        begun.append(replace(request, response=response, logprobs=-response.astype(np.float32)))
    num_lanes = int(rng.integers(1, 4))
    num_slots = num_lanes * int(rng.integers(1, 8))
    lanes = split_lanes(begun, num_lanes, num_slots, MAX_LEN, STOPS)
    for lane in lanes:
        lane.max_prefill_tokens = int(rng.integers(1, 60))
    answers, _ = drive(lanes, num_slots)
    assert answers == expected


def test_a_new_sample_takes_its_prompt_from_a_resumed_one() -> None:
    """Sample 1 was stopped after three tokens: it is fed as one piece of 15, and the others begin within that piece."""
    prompt, response = np.arange(5, 17), np.array([20, 21, 22])
    requests = [Request(sample, sample, 0, prompt, 6) for sample in range(3)]
    requests[0] = replace(requests[0], response=response, logprobs=np.zeros(3, np.float32))
    plan = Lane(requests, 0, 3, MAX_LEN, ()).plan()
    assert plan.prefill_lengths == (15,) and plan.tokens.tolist() == [*prompt, *response]
    assert plan.sampled_rows.tolist() == [14, 11, 11]
    assert plan.sample_positions.tolist() == [15, 12, 12]
    assert [(c.source, c.target, c.length) for c in plan.copies_after] == [(0, 1, 12), (0, 2, 12)]


def test_resumed_samples_count_towards_the_prefill_of_a_forward() -> None:
    prompt = np.array([9, 9])
    requests = [Request(n, n, 0, prompt, 20, np.full(n, 9), np.zeros(n, np.float32)) for n in (8, 3, 3, 12)]
    lane = Lane(requests, 0, 4, MAX_LEN, (), max_prefill_tokens=10)
    fed = []
    for _ in range(4):
        plan = lane.plan()
        fed.append(plan.prefill_lengths)
        lane.append(np.full(plan.num_sampled, 9), np.zeros(plan.num_sampled))
    assert fed == [(10,), (5, 5), (14,), ()]


def test_live_sequences_are_told_as_they_stand() -> None:
    requests = [Request(n, n, n, np.full(2, 9), 6) for n in range(3)]
    lane = Lane(requests, 4, 2, MAX_LEN, STOPS)
    for tokens in ([7, 8], [9, 10]):
        lane.plan()
        lane.append(np.array(tokens), -np.array(tokens, dtype=np.float64))
    told = [
        (live.request.request, live.tokens.tolist(), live.logprobs.tolist(), live.slot) for live in lane.sequences()
    ]
    assert told == [(0, [9, 9, 7, 9], [-7.0, -9.0], 4), (1, [9, 9, 8, 10], [-8.0, -10.0], 5)]
    assert [request.request for request in lane.queue] == [2]


def test_a_shared_prompt_is_fed_once() -> None:
    prompt = np.arange(5, 17)
    requests = [Request(sample, sample, 0, prompt, 6) for sample in range(8)]
    lane = Lane(requests, 0, 8, MAX_LEN, ())
    plan = lane.plan()
    assert plan.prefill_lengths == (12,) and len(plan.tokens) == 12
    assert plan.sampled_rows.tolist() == [11] * 8
    assert [(c.source, c.target, c.length) for c in plan.copies_after] == [(0, slot, 12) for slot in range(1, 8)]


def test_late_samples_join_by_their_last_prompt_token() -> None:
    """Three slots for eight samples that end at different times: the prompt's eleven other tokens are never refed."""
    prompt = np.arange(5, 17)
    requests = [Request(sample, sample, 0, prompt, 3 + sample % 3) for sample in range(8)]
    answers, count = drive([Lane(requests, 0, 3, MAX_LEN, ())], 3)
    assert len(answers) == 8
    assert count["prompts"] == 1 and count["late"] == 5
    drawn = sum(3 + sample % 3 for sample in range(8))
    assert count["fed"] == len(prompt) + (drawn - 8) + count["late"]


def test_a_prompt_nobody_holds_any_more_is_fed_again() -> None:
    prompt = np.arange(5, 10)
    requests = [Request(sample, sample, 0, prompt, 1) for sample in range(4)]
    _, count = drive([Lane(requests, 0, 2, MAX_LEN, ())], 2)
    assert count["prompts"] == 2 and count["late"] == 0


def test_prefill_is_bounded_but_a_long_prompt_still_passes() -> None:
    requests = [Request(n, n, n, np.full(length, 9), 4) for n, length in enumerate((5, 5, 20, 5))]
    lane = Lane(requests, 0, 4, MAX_LEN, (), max_prefill_tokens=10)
    fed = []
    while lane.has_work:
        plan = lane.plan()
        fed.append(plan.prefill_lengths)
        lane.retire(lane.append(np.full(plan.num_sampled, 9), np.zeros(plan.num_sampled)))
    assert fed[:4] == [(5, 5), (20,), (5,), ()]


def test_requests_are_shared_out_evenly_and_in_order() -> None:
    requests = [Request(n, n, n // 4, np.array([9]), 1) for n in range(22)]
    lanes = split_lanes(requests, 4, 18, MAX_LEN, ())
    assert [request.request for lane in lanes for request in lane.queue] == list(range(22))
    assert sorted(len(lane.queue) for lane in lanes) == [5, 5, 6, 6]
    assert [(lane.first_slot, lane.num_slots) for lane in lanes] == [(0, 4), (4, 4), (8, 4), (12, 4)]
    with pytest.raises(ValueError, match=r"max_sequences=3 is less than the 4 groups"):
        split_lanes(requests, 4, 3, MAX_LEN, ())
