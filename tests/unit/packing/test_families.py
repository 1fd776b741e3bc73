"""Families: what may be shared, plans that keep it together, and what a plan is worth."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from r1_megatron.data.balance import Plan, plan_step
from r1_megatron.data.families import Outline, plan_families, shared_tokens
from r1_megatron.types import TrainSample


def work(length: int, after: int = 0) -> float:
    """Attention costs as much as all else at 100 tokens."""
    return length + (length * after + length * length / 2) / 50


def sample(*tokens: int, prompt_len: int, routed: int | None = None) -> TrainSample:
    zeros = np.zeros(len(tokens), np.float32)
    experts = None if routed is None else np.full((len(tokens) - 1, 2, 3), routed)
    return TrainSample(np.array(tokens), zeros > 0, zeros, zeros, routed_experts=experts, prompt_len=prompt_len)


def test_what_may_be_shared() -> None:
    one, two = sample(7, 8, 9, 1, 2, prompt_len=3), sample(7, 8, 9, 5, prompt_len=3)
    assert shared_tokens([one, two, one]) == [0, 2, 2]
    assert shared_tokens([one, two], predicted=2) == [0, 1]
    assert shared_tokens([one, two], predicted=3) == [0, 0]
    # Another prompt, another length of it, none said; a response that begins alike is no prompt.
    assert shared_tokens([one, sample(7, 8, 1, 5, prompt_len=3), two]) == [0, 0, 0]
    assert shared_tokens([one, replace(two, prompt_len=2)]) == [0, 0]
    assert shared_tokens([replace(one, prompt_len=0), replace(two, prompt_len=0)]) == [0, 0]
    assert shared_tokens([one, sample(7, 8, 9, 1, 2, 6, prompt_len=3)]) == [0, 2]
    assert shared_tokens([]) == []


def test_experts_have_to_be_the_same() -> None:
    tokens = (7, 8, 9, 1, 2)
    one, other = sample(*tokens, prompt_len=3, routed=1), sample(*tokens, prompt_len=3, routed=2)
    assert shared_tokens([one, one, other, other, one]) == [0, 2, 0, 2, 0]
    assert shared_tokens([one, replace(one, routed_experts=None)]) == [0, 0]
    experts = one.routed_experts
    assert experts is not None
    after = experts.copy()
    after[2:] = 5  # the last token of the prompt and the response are each sample's own
    assert shared_tokens([one, replace(one, routed_experts=after)]) == [0, 2]


def random_outlines(rng: np.random.Generator) -> list[Outline]:
    outlines = []
    for _ in range(rng.integers(0, 8)):
        shared = int(rng.integers(0, 30))
        for member in range(rng.integers(1, 9)):
            outlines.append(Outline(shared + int(rng.integers(1, 40)), shared if member else 0))
    return outlines


def computed(indices: list[int], common: list[int], outlines: list[Outline]) -> int:
    return sum(outlines[i].length - n for i, n in zip(indices, common, strict=True))


def longest_rank(plans: list[Plan], shared: list[Plan], outlines: list[Outline]) -> float:
    """Work of the rank that has most, beginnings counted where they are computed."""
    loads = []
    for plan, commons in zip(plans, shared):
        pairs = [pair for m, c in zip(plan, commons) for pair in zip(m, c)]
        loads.append(sum(work(outlines[i].length - n, n) for i, n in pairs))
    return max(loads)


@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize("seed", range(30))
def test_invariants(seed: int, lockstep: bool) -> None:
    rng = np.random.default_rng(seed)
    outlines, limit = random_outlines(rng), int(rng.integers(1, 200))
    num_ranks, multiple = int(rng.integers(1, 5)), int(rng.integers(1, 4))
    options = {"max_tokens": limit, "num_ranks": num_ranks, "multiple": multiple, "lockstep": lockstep}
    plans, shared = plan_families(outlines, work, **options)
    family = list(itertools.accumulate(outline.shared == 0 for outline in outlines))
    assert sorted(itertools.chain(*itertools.chain(*plans))) == list(range(len(outlines)))
    (count,) = {len(plan) for plan in plans}
    assert len(plans) == num_ranks and count >= 1 and count % multiple == 0
    for indices, common in zip(itertools.chain(*plans), itertools.chain(*shared), strict=True):
        assert computed(indices, common, outlines) <= limit or len(indices) == 1
        for (i, before), (j, n) in itertools.pairwise(zip(indices, common)):
            assert n == 0 or (family[i] == family[j] and before in (0, n))
        for i, n in zip(indices, common):
            assert n in (0, max(o.shared for o, f in zip(outlines, family) if f == family[i]))
        assert not common or common[0] == 0
    assert (plans, shared) == plan_families(tuple(outlines), work, **options)


def test_sequences_without_a_family_are_planned_as_ever() -> None:
    lengths = [int(n) for n in np.random.default_rng(2).integers(1, 90, 60)]
    options = {"max_tokens": 128, "num_ranks": 2, "multiple": 2, "lockstep": True}
    plans, shared = plan_families([Outline(n) for n in lengths], work, **options)
    assert plans == plan_step(lengths, work, **options)
    assert not any(itertools.chain(*itertools.chain(*shared)))


def group(prompt: int, *responses: int) -> list[Outline]:
    return [Outline(prompt + n, prompt if i else 0) for i, n in enumerate(responses)]


def test_known_answers() -> None:
    # Together, longest first.
    assert plan_families(group(50, 10, 20, 10), work, max_tokens=100) == ([[[1, 0, 2]]], [[[0, 50, 50]]])
    # Two groups, two ranks: nobody computes a prompt twice.
    plans, shared = plan_families(group(50, 9, 9, 9) + group(50, 9, 9, 9), work, max_tokens=100, num_ranks=2)
    assert sorted(plans) == [[[0, 1, 2]], [[3, 4, 5]]] and shared == [[[0, 50, 50]]] * 2
    # The budget cuts: 30 + 4 * 20 tokens do not fit into 80.
    plans, shared = plan_families(group(30, 20, 20, 20, 20), work, max_tokens=80)
    assert plans == [[[0, 2], [1, 3]]] and shared == [[[0, 30], [0, 30]]]
    # A sample that is longer than the budget stands alone, and the others are together.
    plans, shared = plan_families(group(30, 20, 90, 20, 20), work, max_tokens=100)
    assert plans == [[[1], [0, 2, 3]]] and shared == [[[0], [0, 30, 30]]]
    # One group, two ranks: each computes the prompt, for half of the samples.
    plans, shared = plan_families(group(40, *[60] * 8), work, max_tokens=2048, num_ranks=2)
    assert [len(plan[0]) for plan in plans] == [4, 4] and shared == [[[0, 40, 40, 40]]] * 2
    # Attention is nearly everything and the prompt next to nothing: a mask would cost more than it saves.
    plans, shared = plan_families(group(4, 4000, 4000), work, max_tokens=10**4)
    assert shared == [[[0, 0]]]


@pytest.mark.parametrize("num_ranks", [1, 2, 8])
@pytest.mark.parametrize("prompt", [16, 400])
def test_worth(num_ranks: int, prompt: int) -> None:
    """16 groups of 12 whose responses have a long tail: never later than each sample alone, and little
    later than if the ranks could be filled to the brim with prompts computed once."""
    rng = np.random.default_rng(prompt + num_ranks)
    outlines = []
    for _ in range(16):
        outlines += group(prompt, *(int(n) for n in np.clip(rng.lognormal(5, 1, 12), 8, 1500)))
    plans, shared = plan_families(outlines, work, max_tokens=2048, num_ranks=num_ranks)
    alone = plan_step([outline.length for outline in outlines], work, max_tokens=2048, num_ranks=num_ranks)
    separate = longest_rank(alone, [[[0] * len(m) for m in plan] for plan in alone], outlines)
    once = sum(work(outline.length - outline.shared, outline.shared) for outline in outlines) / num_ranks
    assert longest_rank(plans, shared, outlines) <= min(separate, 1.15 * once)
