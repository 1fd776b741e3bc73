"""Every token is fed with its own past in its pages, and every sample is what it would be alone, in any memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from r1_megatron.rollout.scheduler import Request, Scheduler, StepPlan
from r1_megatron.rollout.speculation import Acceptance

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
        prompt = rng.integers(5, VOCAB, rng.integers(1, 15))
        max_new_tokens = int(rng.integers(1, 25))
        for sample in range(rng.integers(1, 7)):
            name = number * 100 + sample
            requests.append(Request(name, name * 7919, number, prompt, max_new_tokens))
    return requests


def scheduler(requests: list[Request], **options: Any) -> Scheduler:
    given = {"num_lanes": 1, "max_sequences": 4, "max_len": MAX_LEN, "page_size": 4, "stop_tokens": STOPS, **options}
    pages = given["max_sequences"] * -(-given["max_len"] // given["page_size"])
    return Scheduler(requests, **{"num_pages": pages, "max_prefill_tokens": 1000, **given})


def answer(
    lanes: Scheduler,
    lane: int,
    plan: StepPlan,
    tokens: list[int] | np.ndarray,
    drafts: list[int] | None = None,
    acceptance: Acceptance | None = None,
) -> list[Any]:
    tokens = np.array(tokens, dtype=np.int64)
    stopped = np.zeros(plan.num_sampled, dtype=bool)
    for places, rows in (acceptance or Acceptance()).turns(plan, tokens, stopped):
        sequences = plan.sequences[places]
        stopped[places] = lanes.append(sequences, tokens[rows], -tokens[rows].astype(np.float64))
        if drafts is not None:
            lanes.expect(sequences, np.array(drafts, dtype=np.int64)[rows])
    return lanes.retire(lane, plan, stopped)


class Driver:
    """Runs lanes by turns over a cache of plain token ids, in the engine's order, and checks the invariants each step.

    There are two layers in two chunks: a lane's second one runs when all lanes have planned and run their first. Tokens
    are taken as late as a first pipeline stage takes them, before the lane's next plan.

    ``hits``: chance that a draft is right, if there are any. The drafting layer, in the second chunk, keeps of each
    token the one behind it.
    """

    def __init__(self, lanes: Scheduler, page_size: int = 4, hits: float | None = None):
        self.lanes, self.page_size, self.hits = lanes, page_size, hits
        self.layers, self.drafting = np.split(np.full((3, lanes.pool.num_pages, page_size), -1), [2])
        self.answers: dict[int, list[int]] = {}
        self.count: Counter[str] = Counter()
        self.acceptance, self.rng = Acceptance(), np.random.default_rng(0)
        self.steps: list[tuple[StepPlan, list[int], list[int] | None] | None] = [None] * len(lanes.lanes)

    def run(self) -> dict[int, list[int]]:
        rounds = 0
        while self.lanes.has_work:
            rounds += 1
            assert rounds < 5000, "no progress"
            plans = [self.begin(lane) for lane in range(len(self.steps))]
            for lane, plan in enumerate(plans):
                self.forward(plan, layer=1)
                self.steps[lane] = plan, *self.draw(plan)
            if not any(len(plan.tokens) for plan in plans):
                assert not self.lanes.has_work
        assert self.lanes.pool.num_free == self.lanes.pool.num_pages, "pages leaked"
        return self.answers

    def begin(self, lane: int) -> StepPlan:
        if (step := self.steps[lane]) is not None and step[0].num_sampled:
            for sequence, stopped in answer(self.lanes, lane, *step, self.acceptance):
                self.check_past(sequence)
                assert sequence.logprobs.tolist() == (-sequence.tokens[len(sequence.request.prompt) :]).tolist()
                assert stopped == (sequence.tokens[-1] in STOPS)
                self.answers[sequence.request.request] = sequence.tokens.tolist()
        before = {row: int((self.lanes._fed - self.lanes._again)[row]) for live in self.lanes.lanes for row in live}
        plan = self.lanes.plan(lane)
        for sequence in plan.given_up:
            self.check_past(sequence)
        self.check_plan(lane, plan, before)
        self.forward(plan, layer=0)
        self.count.update(
            fed=len(plan.tokens), prompts=len(plan.prefill_lengths), copies=len(plan.copies), steps=len(plan.tokens) > 0
        )
        return plan

    def check_past(self, sequence: Any) -> None:
        """The pages still hold all tokens but the last one, in both layers."""
        for layer in self.layers:
            assert layer[sequence.pages].flatten()[: len(sequence.tokens) - 1].tolist() == sequence.tokens[:-1].tolist()
        if self.hits is not None:
            # What follows the last prompt token may be that of the sample that fed the prompt.
            kept = self.drafting[0][sequence.pages].flatten()[: len(sequence.tokens) - 2]
            assert kept.tolist() == sequence.tokens[1:-1].tolist()

    def check_plan(self, lane: int, plan: StepPlan, before: dict[int, int]) -> None:
        lanes = self.lanes
        held = Counter(page for pages in lanes._prompts.values() for page in pages.tolist())
        looked_back_on: set[int] = set()
        for row in (row for live in lanes.lanes for row in live):
            pages = lanes._table[row, : lanes._num_pages[row]].tolist()
            held.update(pages)
            kept = np.arange(before.get(row, 0))
            looked_back_on |= {pages[p // self.page_size] * self.page_size + p % self.page_size for p in kept}
        assert held == Counter(dict(enumerate(lanes.pool.holders.tolist()))), "holders are miscounted"
        assert sorted(lanes.pool._free) == [page for page in range(lanes.pool.num_pages) if not held[page]]
        written = plan.cache_rows.tolist()
        assert len(set(written)) == len(written) and not looked_back_on & set(written)
        targets = [copy.target for copy in plan.copies]
        assert len(set(targets)) == len(targets) and all(held[page] == 1 for page in targets)
        assert plan.num_decode + sum(plan.prefill_lengths) == len(plan.tokens)
        assert len(set(plan.sequences.tolist())) == plan.num_sampled <= len(lanes.lanes[lane])
        share = -(-lanes._max_sequences // len(lanes.lanes))
        assert len(lanes.lanes[lane]) <= share

    def forward(self, plan: StepPlan, layer: int) -> None:
        cache = self.layers[layer]
        copies = np.array(plan.copies, dtype=np.int64).reshape(-1, 2)
        cache[copies[:, 1]] = cache[copies[:, 0]]
        cache.reshape(-1)[plan.cache_rows] = plan.tokens
        if layer == 1:
            self.drafting[0][copies[:, 1]] = self.drafting[0][copies[:, 0]]

    def draw(self, plan: StepPlan) -> tuple[list[int], list[int] | None]:
        """The tokens that follow what the sampled rows look back on, and drafts of what follows them."""
        prefixes = []
        for row in plan.sampled_rows.tolist():
            if row < plan.num_decode:
                (prefix,) = {
                    tuple(layer[plan.page_table[row]].flatten()[: plan.positions[row] + 1].tolist())
                    for layer in self.layers
                }
            else:
                prefix = plan.tokens[row - plan.positions[row] : row + 1]
                assert plan.positions[row - plan.positions[row]] == 0
            prefixes.append(np.array(prefix))
        drawing = [*plan.sequences.tolist(), *plan.sequences[plan.draft_of].tolist()]
        for prefix, sequence, position in zip(prefixes, drawing, plan.sample_positions.tolist(), strict=True):
            request = self.lanes.request(sequence)
            assert len(prefix) == position
            assert prefix.tolist()[: len(request.prompt)] == request.prompt.tolist()
        tokens = [next_token(prefix, int(key)) for prefix, key in zip(prefixes, plan.keys, strict=True)]
        return tokens, None if self.hits is None else self.draft(plan, prefixes, tokens)

    def draft(self, plan: StepPlan, prefixes: list[np.ndarray], tokens: list[int]) -> list[int]:
        """The drafting layer has, at every row that draws for itself, each token behind those that the row sees."""
        following = [token if token >= 0 else tokens[~token] for token in plan.following.tolist()]
        assert len(following) == len(plan.tokens)
        self.drafting[0].reshape(-1)[plan.cache_rows] = following
        right = np.array(tokens)[plan.draft_of] == plan.tokens[plan.sampled_rows[plan.num_sampled :]]
        drafts = []
        for i, (prefix, token) in enumerate(zip(prefixes, tokens)):
            is_draft = i >= plan.num_sampled
            sequence = plan.sequences[plan.draft_of[i - plan.num_sampled] if is_draft else i]
            if not self.lanes._again[sequence] and (not is_draft or right[i - plan.num_sampled]):
                kept = self.drafting[0][self.lanes._table[sequence]].flatten()[: len(prefix)]
                assert kept.tolist() == [*prefix[1:].tolist(), token]
            known = next_token(np.append(prefix, token), int(plan.keys[i]))
            drafts.append(known if self.rng.random() < self.hits else int(self.rng.integers(VOCAB)))
        return drafts


def random_shape(rng: np.random.Generator, tight: bool) -> dict[str, Any]:
    num_lanes, page_size = int(rng.integers(1, 4)), int(rng.integers(1, 9))
    max_sequences = num_lanes * int(rng.integers(1, 8))
    per_sequence = -(-MAX_LEN // page_size)
    num_pages = int(per_sequence * rng.uniform(1, 2)) if tight else per_sequence * max_sequences
    return {
        "num_lanes": num_lanes,
        "page_size": page_size,
        "max_sequences": max_sequences,
        "num_pages": num_pages,
        "max_prefill_tokens": int(rng.integers(1, 40)),
    }


@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("seed", range(25))
def test_samples_do_not_depend_on_places_and_pages(seed: int, tight: bool) -> None:
    rng = np.random.default_rng(seed)
    requests = random_requests(rng, num_prompts=int(rng.integers(0, 9)))
    shape = random_shape(rng, tight)
    lanes = scheduler(requests, **shape)
    assert Driver(lanes, shape["page_size"]).run() == {request.request: alone(request) for request in requests}
    if not tight:
        assert lanes.num_given_up == 0, "pages for all places at full length: nobody has to make room"


@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("seed", range(25))
def test_resumed_samples_end_as_if_never_stopped(seed: int, tight: bool) -> None:
    """Any of the samples had come any distance; places and pages are as they happen to be."""
    rng = np.random.default_rng(100 + seed)
    requests = random_requests(rng, num_prompts=int(rng.integers(1, 9)))
    expected = {request.request: alone(request) for request in requests}
    begun = []
    for request in requests:
        whole = np.array(expected[request.request][len(request.prompt) :])
        response = whole[: rng.integers(0, len(whole))] if rng.random() < 0.6 else whole[:0]
        begun.append(replace(request, response=response, logprobs=-response.astype(np.float32)))
    shape = random_shape(rng, tight)
    assert Driver(scheduler(begun, **shape), shape["page_size"]).run() == expected


@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("hits", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("seed", range(12))
def test_drafts_change_no_sample(seed: int, hits: float, tight: bool) -> None:
    rng = np.random.default_rng(200 + seed)
    requests = random_requests(rng, num_prompts=int(rng.integers(1, 9)))
    expected = {request.request: alone(request) for request in requests}
    shape = random_shape(rng, tight)
    lanes = scheduler(requests, **shape, with_drafts=True)
    driver = Driver(lanes, shape["page_size"], hits)
    assert driver.run() == expected
    if not tight:
        assert lanes.num_given_up == 0, "nobody makes room for a draft"
    drafted, accepted = driver.acceptance.num_drafted, driver.acceptance.num_accepted
    assert accepted == drafted if hits == 1 else accepted <= (0.2 + hits) * drafted + 5


def test_right_drafts_halve_the_forwards() -> None:
    """One draw of the first token, with the prompt; the second draw has a draft; the last token of ten needs none."""
    requests = [Request(0, 0, 0, np.full(3, 9), 10)]
    lanes = scheduler(requests, with_drafts=True, stop_tokens=())
    driver = Driver(lanes, hits=1.0)
    driver.run()
    assert (lanes.num_steps, driver.count["fed"]) == (6, 3 + 4 * 2 + 1)
    assert (driver.acceptance.num_drafted, driver.acceptance.num_draws) == (4, 6)
    assert driver.acceptance.metrics(10) == {
        "rollout/num_drafts": 4,
        "rollout/num_draws": 6,
        "rollout/draft_acceptance": 1.0,
        "rollout/tokens_per_draw": 10 / 6,
    }


def test_a_sample_that_began_on_anothers_forward_feeds_the_last_prompt_token_again() -> None:
    """The prompt fills its two pages: one sample keeps the second as its own, the other one takes a copy."""
    requests = [Request(sample, sample, 0, np.arange(5, 13), 6) for sample in range(2)]
    lanes = scheduler(requests, max_sequences=2, stop_tokens=(), with_drafts=True)
    plan = lanes.plan(0)
    assert plan.sampled_rows.tolist() == [7, 7] and plan.following.tolist() == [*range(6, 13), ~0]
    answer(lanes, 0, plan, [20, 30], drafts=[21, 31])
    plan = lanes.plan(0)
    assert plan.tokens.tolist() == [20, 21, 12, 30] and plan.positions.tolist() == [8, 9, 7, 8]
    assert plan.following.tolist() == [~0, ~2, 30, ~1] and plan.sampled_rows.tolist() == [0, 3, 1]
    assert plan.sample_positions.tolist() == [9, 9, 10] and plan.draft_of.tolist() == [0]
    assert len(plan.copies) == 1 and lanes.pool.num_pages - lanes.pool.num_free == 1 + 2 + 2


def test_a_copy_that_is_still_to_be_made_is_not_looked_into() -> None:
    """Six pages of four: all three get a page of their own for the last prompt token, but one has none for the next."""
    requests = [Request(sample, sample, 0, np.arange(5, 13), 6) for sample in range(3)]
    lanes = scheduler(requests, num_pages=6, max_len=14, max_sequences=3, stop_tokens=(), with_drafts=True)
    plan = lanes.plan(0)
    prompt_pages = (plan.cache_rows[[0, 4]] // 4).tolist()
    answer(lanes, 0, plan, [20, 30, 40], drafts=[21, 31, 41])
    plan = lanes.plan(0)
    (given_up,) = plan.given_up
    assert given_up.tokens.tolist() == [*range(5, 13), 40] and given_up.pages.tolist() == prompt_pages
    assert [copy.source for copy in plan.copies] == prompt_pages[1:], "only the other one's is made"


def test_the_youngest_makes_room() -> None:
    """Six pages of four: three sequences of up to twelve tokens begin with one page each, and two of them can go on."""
    requests = [Request(n, n, n, np.full(3, 9), 9) for n in range(3)]
    lanes = scheduler(requests, num_pages=6, max_len=12)
    given_up, live = [], []
    for _ in range(10):
        plan = lanes.plan(0)
        given_up.append([sequence.request.request for sequence in plan.given_up])
        live.append([lanes.request(row).request for row in lanes.lanes[0]])
        answer(lanes, 0, plan, [9] * plan.num_sampled)
    assert given_up == [[]] * 6 + [[2]] + [[]] * 3
    assert live == [[0, 1, 2]] * 6 + [[0, 1]] * 3 + [[2]]
    assert lanes.num_given_up == 1 and lanes.pool.peak == 6
    assert lanes.request(lanes.lanes[0][0]).response.tolist() == [9] * 6
    assert plan.prefill_lengths == (9,), "prompt and response are one piece"


def test_a_request_waits_for_pages_that_the_others_may_need() -> None:
    """Five pages: two sequences take one each and may need one more each, the third would leave too few."""
    requests = [Request(n, n, n, np.full(3, 9), 5) for n in range(3)]
    lanes = scheduler(requests, num_pages=5, max_len=8)
    plan = lanes.plan(0)
    assert plan.prefill_lengths == (3, 3) and [request.request for request in lanes.queue] == [2]


def test_a_new_sample_takes_its_prompt_from_a_resumed_one() -> None:
    """Sample 1 was stopped after three tokens: it is fed as one piece of 15, and the others begin within that piece."""
    prompt, response = np.arange(5, 17), np.array([20, 21, 22])
    requests = [Request(sample, sample, 0, prompt, 6) for sample in range(3)]
    requests[0] = replace(requests[0], response=response, logprobs=np.zeros(3, np.float32))
    lanes = scheduler(requests, max_sequences=3, page_size=5)
    plan = lanes.plan(0)
    assert plan.prefill_lengths == (15,) and plan.tokens.tolist() == [*prompt, *response]
    assert plan.sampled_rows.tolist() == [14, 11, 11]
    assert plan.sample_positions.tolist() == [15, 12, 12]
    assert lanes.pool.holders[:3].tolist() == [3, 3, 3] and lanes.pool.num_free == 24 - 3
    answer(lanes, 0, plan, [9, 9, 9])
    assert sorted(lanes.plan(0).copies) == [(2, 4), (2, 5)] or lanes.pool.holders[2] == 1


def test_resumed_samples_count_towards_the_prefill_of_a_forward() -> None:
    prompt = np.array([9, 9])
    requests = [Request(n, n, n, prompt, 20, np.full(n, 9), np.zeros(n, np.float32)) for n in (8, 3, 2, 12)]
    lanes = scheduler(requests, max_prefill_tokens=10, stop_tokens=())
    fed = []
    for _ in range(5):
        plan = lanes.plan(0)
        fed.append((plan.prefill_lengths, plan.num_decode))
        answer(lanes, 0, plan, [9] * plan.num_sampled)
    assert fed == [((10,), 0), ((5, 4), 1), ((10,), 3), ((), 3 + 4), ((), 4)]


def test_live_sequences_are_told_as_they_stand() -> None:
    requests = [Request(n, n, n, np.full(2, 9), 6) for n in range(3)]
    lanes = scheduler(requests, max_sequences=2)
    for tokens in ([7, 8], [9, 10]):
        answer(lanes, 0, lanes.plan(0), tokens)
    told = [(live.request.request, live.tokens.tolist(), live.logprobs.tolist()) for live in lanes.sequences()]
    assert told == [(0, [9, 9, 7, 9], [-7.0, -9.0]), (1, [9, 9, 8, 10], [-8.0, -10.0])]
    assert [len(live.pages) for live in lanes.sequences()] == [1, 1]
    assert [request.request for request in lanes.queue] == [2]


def test_a_shared_prompt_is_fed_once_into_shared_pages() -> None:
    """Three pages for the prompt; in the next forward the last, half filled one is copied for all but one sample."""
    prompt = np.arange(5, 15)
    requests = [Request(sample, sample, 0, prompt, 6) for sample in range(8)]
    lanes = scheduler(requests, max_sequences=8)
    plan = lanes.plan(0)
    assert plan.prefill_lengths == (10,) and len(plan.tokens) == 10
    assert plan.sampled_rows.tolist() == [9] * 8
    assert lanes.pool.num_pages - lanes.pool.num_free == 3
    answer(lanes, 0, plan, [9] * 8)
    plan = lanes.plan(0)
    assert [copy.source for copy in plan.copies] == [plan.copies[0].source] * 7
    assert lanes.pool.num_pages - lanes.pool.num_free == 2 + 8
    assert plan.page_table[:, :2].tolist() == [plan.page_table[0, :2].tolist()] * 8
    assert len(set(plan.page_table[:, 2].tolist())) == 8


def test_late_samples_join_by_their_last_prompt_token() -> None:
    """Three places for eight samples that end at different times: the prompt's eleven other tokens are never refed."""
    prompt = np.arange(5, 17)
    requests = [Request(sample, sample, 0, prompt, 3 + sample % 3) for sample in range(8)]
    driver = Driver(scheduler(requests, max_sequences=3))
    expected = {request.request: alone(request) for request in requests}
    assert driver.run() == expected
    drawn = sum(len(tokens) - len(prompt) for tokens in expected.values())
    assert driver.count["prompts"] == 1
    assert driver.count["fed"] == len(prompt) + (drawn - 8) + 5


def test_a_prompt_is_kept_for_samples_that_wait() -> None:
    """Also where nobody in flight has it any more."""
    prompt = np.arange(5, 10)
    requests = [Request(sample, sample, 0, prompt, 1) for sample in range(4)]
    driver = Driver(scheduler(requests, max_sequences=2))
    driver.run()
    assert driver.count["prompts"] == 1 and driver.count["fed"] == 5 + 2


def test_a_kept_prompt_gives_way_to_sequences_in_flight() -> None:
    """Three pages, which the first sample comes to need all: it has a copy of the prompt's page by then."""
    requests = [Request(sample, sample, 0, np.arange(5, 8), 9) for sample in range(2)]
    lanes = scheduler(requests, max_sequences=1, num_pages=3, max_len=12, stop_tokens=())
    expected = {request.request: 12 for request in requests}
    driver = Driver(lanes)
    assert {name: len(tokens) for name, tokens in driver.run().items()} == expected
    assert driver.count["prompts"] == 2 and lanes.num_given_up == 0


def test_short_prompts_wait_for_a_forward_and_long_ones_are_fed_in_chunks() -> None:
    requests = [Request(n, n, n, np.full(length, 9), 4) for n, length in enumerate((5, 5, 24, 5))]
    lanes = scheduler(requests, max_prefill_tokens=10)
    fed = []
    while lanes.has_work:
        plan = lanes.plan(0)
        fed.append((plan.prefill_lengths, plan.num_decode, plan.num_sampled))
        answer(lanes, 0, plan, [9] * plan.num_sampled)
    # The long prompt: a first chunk, packed; a later one of ten; one of four, with which another prompt fits in.
    assert fed[:5] == [((5, 5), 0, 2), ((10,), 2, 2), ((), 2 + 10, 2), ((5,), 2 + 4, 4), ((), 2, 2)]


def test_samples_of_a_prompt_in_chunks_begin_with_its_last_one() -> None:
    requests = [Request(sample, sample, 0, np.arange(5, 17), 4) for sample in range(3)]
    requests.append(Request(9, 9, 1, np.full(2, 9), 4))
    lanes = scheduler(requests, max_prefill_tokens=5)
    seen = []
    for _ in range(4):
        plan = lanes.plan(0)
        seen.append((plan.tokens.tolist(), plan.sampled_rows.tolist()))
        answer(lanes, 0, plan, [9] * plan.num_sampled)
    prompt = list(range(5, 17))
    assert seen[:2] == [(prompt[:5], []), (prompt[5:10], [])]
    assert seen[2] == ([*prompt[10:], 9, 9], [1, 3, 1, 1])
    assert seen[3] == ([9] * 4, [0, 1, 2, 3])


def test_a_place_is_taken_in_the_very_next_forward() -> None:
    requests = [Request(n, n, n, np.full(2, 9), 1 + 3 * (n == 1)) for n in range(4)]
    lanes = scheduler(requests, max_sequences=2)
    live = []
    while lanes.has_work:
        plan = lanes.plan(0)
        live.append([lanes.request(row).request for row in lanes.lanes[0]])
        answer(lanes, 0, plan, [9] * plan.num_sampled)
    assert live == [[0, 1], [1, 2], [1, 3], [1]]
    assert (lanes.num_steps, lanes.num_stepped) == (4, 7)


def test_lanes_share_one_queue_evenly() -> None:
    """22 requests, 18 places: 5, 5, 4 and 4. Of six requests, two go to each of the first lanes, one to the others."""
    for num_requests, expected in ((22, [5, 5, 4, 4]), (6, [2, 2, 1, 1]), (3, [1, 1, 1, 0])):
        requests = [Request(n, n, n // 4, np.array([9]), 1) for n in range(num_requests)]
        lanes = scheduler(requests, num_lanes=4, max_sequences=18)
        for lane in range(4):
            lanes.plan(lane)
        assert [len(live) for live in lanes.lanes] == expected


def test_a_lane_that_ends_early_takes_from_the_queue_first() -> None:
    """The requests of one lane end at once: all that waits goes to that lane, none is bound to the other."""
    requests = [Request(n, n, n, np.full(2, 9), 1 if n % 2 or n > 1 else 9) for n in range(6)]
    lanes = scheduler(requests, num_lanes=2, max_sequences=2)
    served: list[list[int]] = [[], []]
    while lanes.has_work:
        for lane in range(2):
            plan = lanes.plan(lane)
            served[lane] += [lanes.request(row).request for row in plan.sequences.tolist()]
            answer(lanes, lane, plan, [9] * plan.num_sampled)
    assert served == [[0] * 9, [1, 2, 3, 4, 5]]


@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("seed", range(25))
def test_less_may_be_drawn_than_was_asked_for(seed: int, tight: bool) -> None:
    """Limits fall while sequences are on their way: each draws what it may, and one token more at most."""
    rng = np.random.default_rng(200 + seed)
    requests = random_requests(rng, num_prompts=int(rng.integers(1, 9)))
    most = {request.request: request.max_new_tokens for request in requests}
    shape = random_shape(rng, tight)
    lanes = scheduler(requests, **shape)
    driver = Driver(lanes, shape["page_size"])
    begin, seen = driver.begin, dict.fromkeys(most, 0)

    def cut_now_and_then(lane: int) -> StepPlan:
        if lane == 0 and rng.random() < 0.3:
            for row in (row for live in lanes.lanes for row in live):
                name = lanes.request(row).request
                seen[name] = max(seen[name], int(lanes._length[row] - lanes._prompt_len[row]))
            for name in most.keys() - driver.answers.keys():
                most[name] = min(most[name], int(rng.integers(0, 25)))
            lanes.cut(lambda request: most[request.request])
        return begin(lane)

    driver.begin = cut_now_and_then
    answers = driver.run()
    expected = {request.request: alone(request) for request in requests}
    prompts = {request.request: len(request.prompt) for request in requests}
    for name, tokens in expected.items():
        may = prompts[name] + most[name]
        if name not in answers:
            assert most[name] == 0 or len(tokens) > may, "only what may draw nothing more is forgotten"
            continue
        assert answers[name] == tokens[: len(answers[name])]
        assert len(answers[name]) >= min(len(tokens), may)
        assert len(answers[name]) <= max(may, prompts[name] + seen[name]) + 1
