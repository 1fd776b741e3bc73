"""The measuring itself: order, medians, memory, budgets, tables. Nothing here asserts how long anything takes."""

from __future__ import annotations

import functools
from itertools import chain

import pytest
import torch

from tools import measure
from tools.measure import Budget, Candidate, Timing, relative_error, table, time_in_turn, write_section

MIB = 1 << 20


def test_candidates_run_in_turn_with_fresh_inputs_that_are_not_timed():
    events: list[str] = []

    def candidate(name: str) -> Candidate:
        return Candidate(lambda value: events.append(f"{name}{value}"), lambda: (len(events),))

    def stopwatch(run):
        events.append("start")
        run()
        events.append("stop")
        seconds = float(len(events))
        return lambda: seconds

    timings = time_in_turn({"a": candidate("a"), "b": candidate("b")}, stopwatch, repeats=2, warmup=1)
    # The inputs count the events before them: they were made before the stopwatch started.
    turns = ((f"start {name}{3 * turn} stop").split() for turn, name in enumerate("ababab"))
    assert events == list(chain(*turns))
    assert timings == {"a": Timing((9.0, 15.0)), "b": Timing((12.0, 18.0))}


def test_a_timing_shows_its_median_and_extremes():
    timing = Timing((0.002, 0.0011, 0.5))
    assert timing.median == 0.002
    assert str(timing) == "2 ms (1.1–500)"


def test_the_cpu_stopwatch_runs_once():
    calls: list[int] = []
    seconds = measure.cpu_stopwatch(lambda: calls.append(1))
    assert calls == [1] and seconds() >= 0.0


@pytest.mark.parametrize(
    "seconds, cases_left, fixed, expected",
    [
        (0.1, 1, 0.0, 20),  # time for 100 rounds, but no more than 20 are wanted
        (1.0, 2, 0.0, 5),  # half of 10 s for each of two cases
        (1.0, 2, 4.0, 3),  # of which the other one needs 4 s besides its rounds
        (9.0, 5, 0.0, 3),  # never fewer than three
        (0.0, 1, 0.0, 20),
    ],
)
def test_a_budget_drops_repetitions(seconds, cases_left, fixed, expected):
    budget = Budget(10.0, clock=lambda: 0.0)
    assert budget.repeats(seconds, cases_left, most=20, fixed=fixed) == expected


def test_a_budget_never_owes():
    now = [0.0]
    budget = Budget(10.0, clock=lambda: now[0])
    now[0] = 4.0
    assert budget.left == 6.0
    now[0] = 11.0
    assert budget.left == 0.0 and budget.repeats(1.0, 3, most=20, least=2) == 2


def test_relative_error_is_of_norms_and_sees_what_is_not_finite():
    a = torch.tensor([3.0, 4.0])
    assert relative_error([a, a], [a, a + torch.tensor([0.0, 0.5])]) == pytest.approx(0.5 / 29.25**0.5)
    assert relative_error([torch.zeros(2)], [torch.zeros(2)]) == 0.0
    assert relative_error([torch.full((2,), 1e-3)], [torch.zeros(2)]) == pytest.approx(2**0.5 * 1e-3)
    assert relative_error([torch.tensor([1.0, float("nan")])], [a]) == float("inf")
    assert relative_error([a], [torch.tensor([1.0, float("inf")])]) == float("inf")
    with pytest.raises(AssertionError, match="cannot be compared"):
        relative_error([a], [torch.zeros(3)])
    with pytest.raises(ValueError):
        relative_error([a], [a, a])


def _allocating(who: str, full: bool) -> Candidate:
    """Touches 48 MiB beyond 64 MiB of inputs, as a tensor or as the scratch of somebody else."""
    num = 48 * MIB if full else 1024

    def run(given: torch.Tensor):
        mine = torch.ones(num, dtype=torch.int8) if who == "torch" else bytearray(b"x" * num)
        return len(mine), given

    return Candidate(run, lambda: (torch.ones(64 * MIB, dtype=torch.int8),))


@pytest.mark.parametrize("who, expected", [("torch", 48), ("somebody else", 96)])  # b"x" * n is one copy more
def test_peak_memory_sees_every_allocation_but_not_the_inputs(who, expected):
    peak = measure.cpu_peak_bytes(functools.partial(_allocating, who))
    assert peak / MIB == pytest.approx(expected, abs=4)  # pages of the interpreter, and the kernel's rounding


def test_a_table_is_aligned_and_markdown():
    shown = table(("case", "ms"), [("short", "12.5"), ("a longer one", "3")])
    assert shown.splitlines() == [
        "| case         |   ms |",
        "| ------------ | ---: |",
        "| short        | 12.5 |",
        "| a longer one |    3 |",
    ]
    with pytest.raises(AssertionError):
        table(("case", "ms"), [("only one",)])


def test_a_section_is_replaced_and_the_others_stay(tmp_path):
    path = tmp_path / "BENCHMARKS.md"
    write_section(path, "CPU", "one\n\n### part\n\n| a |")
    write_section(path, "GPU: X", "two")
    write_section(path, "CPU", "three\n")
    head, *sections = path.read_text().split("\n\n## ")
    assert head.startswith("# Benchmarks\n\nMeasured figures only.")
    assert sections == ["CPU\n\nthree", "GPU: X\n\ntwo\n"]
