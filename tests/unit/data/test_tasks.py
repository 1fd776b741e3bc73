"""Procedural tasks: right traces, honest noise, and a split that nothing crosses."""

from __future__ import annotations

import itertools
import random
import re

import pytest

from r1_megatron.data.tasks import build_task
from r1_megatron.data.tasks.chain_sum import noisy_trace
from r1_megatron.data.tasks.countdown import solve
from r1_megatron.rewards.accuracy import accuracy_reward
from r1_megatron.rewards.countdown import countdown_reward
from r1_megatron.rewards.format import format_reward


def accuracy(text: str, label) -> float:
    return accuracy_reward([""], [text], [label], [{}], method="exact")[0]


def well_formed(text: str) -> float:
    return format_reward([""], [text], [None], [{}])[0]


def test_chain_sum_text():
    task = build_task("chain_sum", {}, 10, 5, seed=1)
    assert task.prompt_text((3, 4, 1, 9)) == "3+4+1+9="
    assert task.label((3, 4, 1, 9)) == 17
    expected = "<think>3+4=7 7+1=8 8+9=17</think><answer>17</answer>"
    assert task.demonstration((3, 4, 1, 9), random.Random(0)) == expected


@pytest.mark.parametrize(
    ("name", "options", "num_train", "num_eval"),
    [
        ("chain_sum", {}, 8000, 1900),
        ("chain_sum", {"num_terms": 2}, 60, 10),
        ("chain_sum", {"num_terms": 9}, 2000, 500),
        ("countdown", {}, 3000, 500),
        ("countdown", {"num_numbers": 4, "operators": "+-*/"}, 1000, 300),
    ],
)
def test_split_is_disjoint_distinct_and_closed_under_permutation(name, options, num_train, num_eval):
    task = build_task(name, options, num_train, num_eval, seed=1)
    assert (len(task.train), len(task.eval)) == (num_train, num_eval)
    texts = [task.prompt_text(p) for p in (*task.train, *task.eval)]
    assert len(set(texts)) == len(texts)

    def canonical(problem):
        return tuple(sorted(problem if name == "chain_sum" else problem.numbers))

    assert not set(map(canonical, task.train)) & set(map(canonical, task.eval))


@pytest.mark.parametrize("name", ["chain_sum", "countdown"])
def test_split_depends_on_neither_seed_nor_counts(name):
    tasks = [build_task(name, {}, n, m, seed) for n, m, seed in ((400, 100, 1), (50, 150, 2), (600, 1, 3))]
    for a, b in itertools.permutations(tasks, 2):
        assert not set(a.train) & set(b.eval)
    assert tasks[0].train != tasks[2].train[:400]
    again = build_task(name, {}, 400, 100, 1)
    assert again.train == tasks[0].train and again.eval == tasks[0].eval


def test_too_many_problems():
    with pytest.raises(ValueError, match=r"data.num_train=9000, but chain_sum has \d+ problems"):
        build_task("chain_sum", {}, 9000, 10, 1)
    with pytest.raises(ValueError, match=r"data.num_eval=5000, but chain_sum has \d+ problems"):
        build_task("chain_sum", {}, 10, 5000, 1)
    with pytest.raises(ValueError, match=r"data.num_train=500, .*countdown gave only"):
        build_task("countdown", {"num_numbers": 2, "max_number": 4}, 500, 1, 1)


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("chain_sums", {}, "'chain_sums' is no task"),
        ("chain_sum", {"terms": 4}, "'terms' is unknown.*num_terms .default 4"),
        ("chain_sum", {"num_terms": "4"}, "num_terms='4' is a str, expected int"),
        ("chain_sum", {"num_terms": 1}, "expected 2 to 64"),
        ("countdown", {"operators": "+^", "num_numbers": 9}, "num_numbers=9, expected 2 to 5; operators='\\+\\^'"),
        ("countdown", {"min_number": 5, "max_number": 4}, "expected 1 <= min <= max"),
    ],
)
def test_bad_options(name, options, text):
    with pytest.raises(ValueError, match=text):
        build_task(name, options, 10, 5, 1)
    with pytest.raises(ValueError, match="expected at least 1 and 0"):
        build_task("chain_sum", {}, 0, 0, 1)


def test_clean_demonstrations_earn_the_full_reward():
    rng = random.Random(0)
    task = build_task("chain_sum", {}, 200, 0, 1)
    for problem in task.train:
        text = task.demonstration(problem, rng)
        assert accuracy(text, task.label(problem)) == well_formed(text) == 1.0
    for options in ({}, {"num_numbers": 4, "operators": "+-*/", "style": "words"}):
        task = build_task("countdown", options, 200, 0, 1)
        for problem in task.train:
            text = task.demonstration(problem, rng)
            assert countdown_reward([""], [text], [task.label(problem)], [{}]) == [1.0], text
            assert well_formed(text) == 1.0


def steps_of(text: str) -> list[tuple[int, int, int]]:
    return [tuple(map(int, m)) for m in re.findall(r"(\d+)\+(\d+)=(\d+)", text)]


def test_chain_sum_noise_has_the_stated_rates():
    rng = random.Random(0)
    num_wrong = num_steps = 0
    for _ in range(3000):
        problem = tuple(rng.randrange(10) for _ in range(4))
        text = noisy_trace(problem, rng, 0.3, 0.0)
        steps = steps_of(text)
        assert [step[1] for step in steps] == list(problem[1:]) and steps[0][0] == problem[0]
        for before, after in itertools.pairwise(steps):
            assert after[0] == before[2]  # The wrong total is carried on.
        assert text.endswith(f"<answer>{steps[-1][2]}</answer>")
        offsets = [c - a - b for a, b, c in steps]
        assert all(-3 <= offset <= 3 for offset in offsets)
        num_wrong += sum(offset != 0 for offset in offsets)
        num_steps += len(steps)
    # Three standard deviations of 9,000 independent steps: 0.0145.
    assert abs(num_wrong / num_steps - 0.3) < 0.0145


def test_malformed_answers_have_the_stated_rate_and_many_shapes():
    rng = random.Random(0)
    texts = [noisy_trace((1, 2, 3, 4), rng, 0.0, 0.5) for _ in range(2000)]
    rate = sum(1.0 - well_formed(text) for text in texts) / len(texts)
    assert abs(rate - 0.5) < 3 * (0.25 / 2000) ** 0.5
    assert len(set(texts)) == 9  # the right form and eight broken ones
    assert well_formed(noisy_trace((1, 2, 3, 4), rng, 1.0, 0.0)) == 1.0
    assert accuracy(noisy_trace((1, 2), rng, 1.0, 0.0), 3) == 0.0
    with pytest.raises(ValueError, match=r"sft.corrupt_fraction=1.5"):
        noisy_trace((1, 2), rng, 1.5, 0.0)


def test_countdown_noise_calculates_rightly_towards_the_wrong_target():
    rng = random.Random(0)
    task = build_task("countdown", {}, 300, 0, 1)
    num_right = 0
    for problem in task.train:
        text = task.demonstration(problem, rng, corrupt_fraction=1.0)
        for left, operator, right, result in re.findall(r"(\d+)([+-])(\d+)=(\d+)", text):
            assert int(result) == int(left) + (int(right) if operator == "+" else -int(right))
        num_right += countdown_reward([""], [text], [task.label(problem)], [{}])[0]
    assert num_right == 0.0


def brute_force(numbers: tuple[int, ...], operators: str) -> set[int]:
    """All values of all bracketings of all orders, whole and not negative at every step."""
    if len(numbers) == 1:
        return {numbers[0]}
    values = set()
    for size in range(1, len(numbers)):
        for chosen in itertools.combinations(range(len(numbers)), size):
            left = brute_force(tuple(numbers[i] for i in chosen), operators)
            right = brute_force(tuple(n for i, n in enumerate(numbers) if i not in chosen), operators)
            for a, b in itertools.product(left, right):
                values.add(a + b) if "+" in operators else None
                values.add(a - b) if "-" in operators and a >= b else None
                values.add(a * b) if "*" in operators else None
                values.add(a // b) if "/" in operators and b and a % b == 0 else None
    return values


def test_countdown_solver_is_complete():
    for numbers, operators in (((2, 3, 7), "+-"), ((1, 5, 5), "+-*/"), ((2, 4, 6, 9), "+-*/")):
        reachable = brute_force(numbers, operators)
        for target in range(120):
            assert (solve(numbers, target, operators) is not None) == (target in reachable), (numbers, target)
