"""Plans: the invariants of ``data/balance.py``, one by one, on random lengths; how even the work becomes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from r1_megatron.data.balance import plan_step


def work(length: int) -> float:
    """Attention costs as much as all else at 100 tokens."""
    return length + length * length / 100


def random_lengths(rng) -> list[int]:
    return [int(n) for n in rng.integers(1, rng.integers(2, 60), rng.integers(0, 40))]


def long_tail(rng, number: int, longest: int) -> list[int]:
    """Log-normal, as reasoning lengths are: most are short, a few at the limit."""
    return [int(np.clip(length, 16, longest)) for length in rng.lognormal(np.log(longest / 10), 1.1, number)]


def loads(plans, lengths) -> np.ndarray:
    """``[microbatches, ranks]``."""
    return np.array([[sum(work(lengths[i]) for i in microbatch) for microbatch in plan] for plan in plans]).T


@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize("seed", range(30))
def test_invariants(seed: int, lockstep: bool) -> None:
    rng = np.random.default_rng(seed)
    lengths, limit = random_lengths(rng), int(rng.integers(1, 80))
    num_ranks, multiple = int(rng.integers(1, 5)), int(rng.integers(1, 4))
    options = {"max_tokens": limit, "num_ranks": num_ranks, "multiple": multiple, "lockstep": lockstep}
    plans = plan_step(lengths, work, **options)
    microbatches = list(itertools.chain(*plans))
    # 1. once each
    assert sorted(itertools.chain(*microbatches)) == list(range(len(lengths)))
    # 2. the budget
    for microbatch in microbatches:
        assert sum(lengths[i] for i in microbatch) <= limit or len(microbatch) == 1
        assert [lengths[i] for i in microbatch] == sorted((lengths[i] for i in microbatch), reverse=True)
    # 3. counts
    (count,) = {len(plan) for plan in plans}
    assert len(plans) == num_ranks and count >= 1 and count % multiple == 0
    # 4. order
    load = loads(plans, lengths)
    assert (np.diff(load, axis=0) <= 1e-9).all()
    assert plans == plan_step(tuple(lengths), work, **options)


def test_known_answers() -> None:
    assert plan_step([], work, max_tokens=10, num_ranks=2, multiple=3) == [[[], [], []]] * 2
    assert plan_step([3, 3, 3], work, max_tokens=3) == [[[0], [1], [2]]]
    assert plan_step([50, 2], work, max_tokens=10) == [[[0], [1]]]
    # One long sequence is as much work as all the others: they stay together.
    assert plan_step([90, 30, 30, 30], lambda n: n, max_tokens=90, num_ranks=2) == [[[0]], [[1, 2, 3]]]
    with pytest.raises(AssertionError):
        plan_step([3, 0], work, max_tokens=10)


def test_dynamic_budget() -> None:
    """What the longest sequence needs is there for all; short sequences fill a microbatch of a useful size."""
    assert plan_step([3000, 1000, 1000, 1000], lambda n: n, max_tokens=None) == [[[0], [1, 2, 3]]]
    assert plan_step([300] * 6, work, max_tokens=None) == [[list(range(6))]]
    assert plan_step([], work, max_tokens=None) == [[[]]]


def test_ranks_in_lockstep_meet_in_every_microbatch() -> None:
    """Work 100 and 10 x 10. Apart, a rank may take all short ones; in lockstep, they are spread around the long one."""
    lengths = [100, *[10] * 10]
    apart = plan_step(lengths, lambda n: n, max_tokens=100, num_ranks=2, multiple=2)
    assert [sum(len(microbatch) for microbatch in plan) for plan in apart] == [1, 10]
    together = plan_step(lengths, lambda n: n, max_tokens=100, num_ranks=2, multiple=2, lockstep=True)
    load = np.array([[sum(lengths[i] for i in m) for m in plan] for plan in together])
    assert load.max(0).sum() == 130  # 100 beside 40, then 30 on each
    assert sorted(load.sum(1)) == [70, 130]


@pytest.mark.parametrize("num_ranks, number", [(1, 64), (2, 192), (8, 512)])
@pytest.mark.parametrize("lockstep", [False, True])
def test_work_is_even(num_ranks: int, number: int, lockstep: bool) -> None:
    """Close to the mean, or the work of the longest sequence where that alone is more."""
    lengths = long_tail(np.random.default_rng(number), number, 2048)
    plans = plan_step(lengths, work, max_tokens=2048, num_ranks=num_ranks, lockstep=lockstep)
    load = loads(plans, lengths)
    assert load.max() <= max(1.05 * load.mean(), max(map(work, lengths)))
    assert load.sum(0).max() <= (1.03 if lockstep else 1.001) * load.sum(0).mean()
    if lockstep:  # a microbatch lasts as long as the largest of its ranks
        assert load.max(1).sum() <= 1.07 * load.sum(0).mean()


def test_few_microbatches() -> None:
    """Little more than the tokens need, and no more than that where only two sequences fit together."""
    rng = np.random.default_rng(7)
    lengths = [int(n) for n in rng.integers(20, 400, 2000)]
    (plan,) = plan_step(lengths, work, max_tokens=2048)
    assert len(plan) <= 1.02 * np.ceil(sum(lengths) / 2048)
    (pairs,) = plan_step([700] * 100, work, max_tokens=2048)
    assert len(pairs) == 50
