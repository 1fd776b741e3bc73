"""Every algorithm learns in a few steps, on a layout as on one rank; groups that say nothing are replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from r1_megatron.config.algorithms import ALGORITHMS
from tests.distributed import algorithm_checks as checks
from tests.distributed.layouts import LAYOUTS, world_size
from tests.e2e.kills import differences
from tests.e2e.runs import MEASURED, rows_of
from tests.rank_pool import RankPool

# What depends on when and how the work was done, and noise around zero.
OTHER = (*MEASURED, "rollout/", "training/", "actor/ppo_kl")


def merged(answers: list[Any]) -> list[checks.Samples]:
    """Of all ranks, call by call; the ranks of a replica say the same."""
    calls: list[checks.Samples] = [{} for _ in answers[0]]
    for answer in answers:
        for call, mine in zip(calls, answer, strict=True):
            assert all(call.setdefault(request, tokens) == tokens for request, tokens in mine.items())
    return calls


def assert_close(folder: Path, expected: Path, tolerance: float) -> None:
    for row, other in zip(rows_of(folder / "metrics.jsonl"), rows_of(expected / "metrics.jsonl"), strict=True):
        for name in other:
            if not name.startswith(OTHER):
                assert row[name] == pytest.approx(other[name], rel=tolerance, abs=tolerance), name


def assert_learned(folder: Path) -> None:
    rows = rows_of(folder / "metrics.jsonl")
    scores = [row["critic/score/mean"] for row in rows]
    assert scores[-1] > scores[0] + 0.15, (folder.name, scores)
    assert all(row["train/updates"] == 2 for row in rows)


@pytest.fixture(scope="module")
def alone(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("algorithms")
    options = {"folder": str(folder), "parallel": LAYOUTS["one"], "names": list(ALGORITHMS)}
    return folder, ranks.run(checks.run_algorithms, 1, timeout_s=300.0, **options)[0]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_reward_rises(alone, name: str) -> None:
    assert_learned(alone[0] / name)


@pytest.mark.parametrize("name", ["tp2", "pp2"])
def test_a_layout_learns_the_same(ranks: RankPool, alone, name: str, tmp_path: Path) -> None:
    """The same samples in every step, the same figures, the reward among them."""
    options = {"folder": str(tmp_path), "parallel": LAYOUTS[name], "names": list(ALGORITHMS)}
    answers = ranks.run(checks.run_algorithms, 2, timeout_s=300.0, **options)
    for algorithm in ALGORITHMS:
        assert merged([answer[algorithm] for answer in answers]) == alone[1][algorithm], algorithm
        assert_close(tmp_path / algorithm, alone[0] / algorithm, 1e-3)
        assert_learned(tmp_path / algorithm)


# ------------------------------------------------------------------------------------------------- dynamic sampling


def go(ranks: RankPool, folder: Path, name: str, **options: Any) -> list[checks.Samples]:
    given = {"folder": str(folder), "parallel": LAYOUTS[name], **options}
    return merged(ranks.run(checks.run_sparse, world_size(LAYOUTS[name]), timeout_s=300.0, **given))


@pytest.fixture(scope="module")
def sparse(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[checks.Samples]]:
    folder = tmp_path_factory.mktemp("sparse") / "run"
    return folder, go(ranks, folder, "dp2")


def test_groups_that_say_nothing_are_replaced(sparse) -> None:
    """By the next prompts of the stream, twice in a step at most. The reward is 1 for 7 tokens and else 0."""
    rows, drawn, position = rows_of(sparse[0] / "metrics.jsonl"), iter(sparse[1]), 0
    for row in rows:
        num_telling, begin = 0, position
        for _ in range(1 + int(row["rl/resamples"])):
            groups: dict[int, list[bool]] = {}
            for request, response in next(drawn).items():
                groups.setdefault(request >> 20, []).append(len(response) == 7)
            assert sorted(groups) == [*range(position, position + 4 - num_telling)]
            position += len(groups)
            num_telling += sum(len(set(right)) == 2 for right in groups.values())
        assert num_telling == 4 or row["rl/resamples"] == 2
        assert row["rl/dropped_groups"] == position - begin - num_telling
        assert row["train/updates"] == -(-num_telling // 2), "minibatches of two groups, the last with what is left"
    assert next(drawn, None) is None
    assert {row["rl/resamples"] for row in rows} - {0.0} and any(row["rl/dropped_groups"] > 0 for row in rows)


def test_later_steps_draw_longer_responses(sparse) -> None:
    rows = rows_of(sparse[0] / "metrics.jsonl")
    assert [row["rollout/max_new_tokens"] for row in rows] == [10, 16, 16]
    assert rows[0]["response_length/max"] == 10 and 10 < max(row["response_length/max"] for row in rows[1:]) <= 16


def test_a_layout_replaces_the_same_groups(ranks: RankPool, sparse, tmp_path: Path) -> None:
    assert go(ranks, tmp_path, "pp2") == sparse[1]
    assert_close(tmp_path, sparse[0], 1e-3)


def test_a_resumed_run_goes_on_with_the_next_prompts(ranks: RankPool, sparse, tmp_path: Path) -> None:
    """Bit for bit: after a step, and after it was stopped while other prompts were sampled, which samples all anew."""
    folder, calls = sparse
    first = go(ranks, tmp_path, "dp2", train={"steps": 1})
    assert rows_of(folder / "metrics.jsonl")[1]["rl/resamples"] >= 1
    stopped = go(ranks, tmp_path, "dp2", stop_at=(1, 1))
    assert [*first, *stopped] == calls[: len(first) + 1]
    assert [*first, *go(ranks, tmp_path, "dp2")] == calls
    assert differences(tmp_path, folder) == []
