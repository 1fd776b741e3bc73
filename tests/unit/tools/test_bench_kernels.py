"""What the CPU benchmark does with its figures: agreement first, goals, exit codes. The figures here are made up."""

from __future__ import annotations

import json

import pytest
import torch

from tools import bench_kernels
from tools.bench_kernels import Case, Result, comparable
from tools.measure import Candidate, Timing


def _case(ours: float, peer: float) -> Case:
    candidates = {
        "ours": Candidate(lambda: (torch.tensor([ours]),)),
        "peer": Candidate(lambda: (torch.tensor([peer]),)),
    }
    return Case("a case", candidates, speed_goals={"peer": 2.0})


@pytest.fixture
def one_case(monkeypatch):
    """``one_case(result of ours, of the peer, seconds of the peer)``; ours takes one second."""

    def install(ours: float, peer: float, seconds: float) -> None:
        monkeypatch.setattr(bench_kernels, "CASES", {"case": lambda small: _case(ours, peer)})
        timings = {"ours": Timing((1.0,)), "peer": Timing((seconds,))}
        monkeypatch.setattr(bench_kernels, "time_in_turn", lambda candidates, stopwatch, repeats: timings)

    return install


@pytest.mark.parametrize("seconds, arguments, code, met", [
    (3.0, ["--assert-goals"], 0, "yes"),
    (1.5, ["--assert-goals"], 1, "NO"),
    (1.5, [], 0, "NO"),
])  # fmt: skip
def test_goals_decide_the_exit_code_only_where_asked(one_case, capsys, seconds, arguments, code, met):
    one_case(1.0, 1.0, seconds)
    assert bench_kernels.main(arguments) == code
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| a case"))
    assert [cell.strip() for cell in line.split("|")[5:8]] == [f"{seconds:.2f}", "2", met]


def test_a_disagreement_ends_the_run_before_anything_is_timed(one_case, capsys):
    one_case(1.0, 1.001, 3.0)
    assert bench_kernels.main([]) == 1
    shown = capsys.readouterr()
    assert "| a case" not in shown.out
    assert "a case: ours and peer differ by 1.0e-03 (relative), more than 1e-05" in shown.err


def test_tables_go_into_json_and_benchmarks(one_case, monkeypatch, tmp_path):
    one_case(1.0, 1.0, 3.0)
    monkeypatch.setattr(bench_kernels, "ROOT", tmp_path)
    assert bench_kernels.main(["--write", "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["machine"]["torch"] == torch.__version__
    [result] = found["results"]
    assert (result["case"], result["peer"], result["ratio"], result["met"]) == ("a case", "peer", 3.0, True)
    assert "## CPU, 1 thread\n" in (tmp_path / "BENCHMARKS.md").read_text()


def test_tiny_shapes_cannot_be_published(capsys):
    for option in ("--write", "--assert-goals"):
        with pytest.raises(SystemExit):
            bench_kernels.main(["--quick", option])
        assert "--quick measures nothing" in capsys.readouterr().err


def test_an_unknown_case_is_named(capsys):
    with pytest.raises(SystemExit):
        bench_kernels.main(["--only", "attention"])
    assert "--only attention: no such case; there are experts" in capsys.readouterr().err


def test_gradients_of_single_experts_are_compared_as_one():
    one, two = torch.ones(2, 3), torch.zeros(2, 3)
    whole, stacked = comparable((one, [one, two]))
    assert torch.equal(whole, one) and torch.equal(stacked, torch.stack([one, two]))


def test_a_result_without_a_goal_is_neither_met_nor_missed():
    assert Result("a", "b", "1", "2", 0.5).met is None
    assert Result("a", "b", "1", "2", 0.5, goal=0.5).met is True
    assert bench_kernels.without_repetitions([["a", "p", "1", "x"], ["a", "q", "1", "y"], ["a", "q", "2", "z"]]) == [
        ["a", "p", "1", "x"], ["", "q", "", "y"], ["a", "q", "2", "z"],
    ]  # fmt: skip
