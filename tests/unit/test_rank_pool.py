"""The pool of worker ranks keeps its promises (see tests/rank_pool.py)."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from tests.distributed import pool_checks
from tests.rank_pool import RankError, RankPool, RankTimeout

CHECKS = "tests.distributed.pool_checks"


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_a_world_of_any_size(ranks: RankPool, world_size: int) -> None:
    total = sum(range(world_size))
    expected = [((rank - 1) % world_size + 100, total) for rank in range(world_size)]
    assert ranks.run(f"{CHECKS}:ring", world_size, offset=100) == expected


def test_environment_of_a_rank(ranks: RankPool) -> None:
    seen = ranks.run(pool_checks.environment, 2)
    assert [s["rank"] for s in seen] == ["0", "1"]
    assert all(s["world_size"] == "2" and s["threads"] == 1 and s["preloaded"] and not s["cuda"] for s in seen)
    assert seen[0]["nursery_threads"] == 1  # a fork would lose any other
    assert len({s["pid"] for s in seen} | {os.getpid()}) == 3


def test_tensors_travel_both_ways(ranks: RankPool) -> None:
    tensor = torch.randn(500, 500, dtype=torch.float64)  # larger than a socket's buffer
    for result in ranks.run(pool_checks.double, 2, tensor=tensor):
        assert torch.equal(result, tensor * 2)


def test_every_call_starts_clean(ranks: RankPool) -> None:
    assert not any(ranks.run(pool_checks.leave_state_behind, 2))
    assert not any(ranks.run(pool_checks.leave_state_behind, 2))


def test_an_exception_names_its_rank_and_ends_the_others(ranks: RankPool) -> None:
    with pytest.raises(RankError, match="rank 1 has had enough") as caught:
        ranks.run(pool_checks.raise_on, 3, rank=1)
    first = caught.value.failures[0]
    assert (first.rank, first.type) == (1, "ValueError")
    assert "in raise_on" in first.trace
    assert ranks.run(pool_checks.ring, 2, offset=0) == [(1, 1), (0, 1)]


@pytest.mark.parametrize(("how", "status"), [("signal", "SIGKILL"), ("exit", "exit status 7")])
def test_a_dead_rank_is_noticed(ranks: RankPool, how: str, status: str) -> None:
    with pytest.raises(RankError, match=status) as caught:
        ranks.run(pool_checks.die_on, 3, rank=2, how=how)
    first = caught.value.failures[0]
    assert (first.rank, first.type) == (2, "Died")
    assert "last words" in first.trace
    assert ranks.run(pool_checks.ring, 2, offset=0) == [(1, 1), (0, 1)]


def test_a_hang_shows_every_stack(ranks: RankPool) -> None:
    ranks.run(pool_checks.ring, 1, offset=0)  # the imports are not part of the limit
    with pytest.raises(RankTimeout) as caught:
        ranks.run(pool_checks.hang_on, 2, timeout_s=3.0, rank=0)
    stacks = {failure.rank: failure.trace for failure in caught.value.failures}
    assert "sleep_forever" in stacks[0]
    assert "barrier" in stacks[1]
    assert ranks.run(pool_checks.ring, 2, offset=0) == [(1, 1), (0, 1)]


def test_a_rank_leaves_no_process_behind(ranks: RankPool) -> None:
    (left,) = ranks.run(pool_checks.leave_a_process_behind, 1, dies=False)
    assert gone([left])
    with pytest.raises(RankError, match="child") as caught:
        ranks.run(pool_checks.leave_a_process_behind, 1, dies=True)
    assert gone([int(caught.value.failures[0].message.split()[-1])])


def gone(pids: list[int]) -> bool:
    """True as soon as none of the processes runs (one that nobody has reaped yet does not)."""

    def runs(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except FileNotFoundError:
            return False

    deadline = time.monotonic() + 5
    while any(map(runs, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(runs, pids))


def test_bad_calls_are_refused(ranks: RankPool) -> None:
    with pytest.raises(ValueError, match="runs 1 to 8 ranks"):
        ranks.run(pool_checks.ring, 9, offset=0)
    with pytest.raises(ValueError, match="by name"):
        ranks.run(lambda: None, 1)
    with pytest.raises(RankError, match="no_such_check"):
        ranks.run(f"{CHECKS}:no_such_check", 1)
    with pytest.raises(RankError, match="pickle"):
        ranks.run(pool_checks.unpicklable, 1)


def test_nothing_outlives_the_pool() -> None:
    pool = RankPool()
    pids = [seen["pid"] for seen in pool.run(pool_checks.environment, 2)]
    nursery = pool._nursery
    assert nursery is not None
    pool.close()
    assert nursery.returncode == 0
    assert gone(pids)
