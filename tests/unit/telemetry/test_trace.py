"""Traces in numbers: made by hand, so that every number can be read off."""

from __future__ import annotations

import json
import timeit
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from r1_megatron.telemetry.peak import measure_peak_tflops
from r1_megatron.telemetry.phases import phase, recording
from r1_megatron.telemetry.profile import Peak, StepProfile
from r1_megatron.telemetry.trace import RECEIVE, TraceSummary, clipped, length, merged, read_events, summarise


def event(name: str, start: float, end: float, cat: str = "user_annotation", tid: int = 1) -> dict[str, Any]:
    """Seconds here, microseconds in a trace."""
    return {"ph": "X", "cat": cat, "name": name, "ts": start * 1e6, "dur": (end - start) * 1e6, "tid": tid}


PHASES = [
    event("phase: step", 10, 20),
    event("phase: step/rollout", 10, 13),
    event("phase: step/train", 14, 19),
    event("phase: step/train/forward_backward", 14, 16),
    event("phase: step/train/optimizer", 16, 17),
    event("phase: step/train/forward_backward", 17, 18),
    {"ph": "i", "name": "an instant", "ts": 1.0},
]


def test_phases_add_up_in_the_order_of_their_beginning() -> None:
    found = summarise(reversed(PHASES))
    assert found.step == 10
    assert list(found.phases.items()) == [
        ("rollout", 3),
        ("train", 5),
        ("train/forward_backward", 3),
        ("train/optimizer", 1),
    ]
    assert (found.communication, found.waiting, found.passes) == (0, 0, 3)


def test_communication_on_the_cpu() -> None:
    """Collectives of two threads, half a one before the step; waits within and outside of the passes."""
    found = summarise(
        [
            *PHASES,
            event("gloo:all_reduce", 8, 11, tid=2),
            event("gloo:all_to_all", 10.5, 12, tid=3),
            event("gloo:recv", 10, 20, tid=4),
            event(RECEIVE, 15.5, 16.5),
            event(RECEIVE, 17.25, 17.5),
            event("c10d::allreduce_", 18, 19, cat="cpu_op"),
        ]
    )
    assert found.communication == pytest.approx(2 + 1.25)
    assert found.communication_kinds == {"gloo:all_reduce": 1, "gloo:all_to_all": 1.5, RECEIVE: 1.25}
    assert found.waiting == pytest.approx(0.5 + 0.25)


def test_communication_on_cuda() -> None:
    """The kernels count, not the host's launches of them."""
    found = summarise(
        [
            *PHASES,
            event("nccl:all_reduce", 14, 14.001),
            event("ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 14, 15, "kernel", 7),
            event("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", 15, 15.5, "kernel", 8),
            event("void gemm", 14, 18, "kernel", 9),
        ]
    )
    assert found.communication_kinds == {"nccl:AllReduce": 1, "nccl:SendRecv": 0.5}
    assert (found.communication, found.waiting) == (1.5, 0.5)


def test_spans() -> None:
    assert merged([(3, 4), (0, 1), (1, 2), (0.5, 1.5)]) == [(0, 2), (3, 4)]
    assert length([(0, 2), (1, 3)]) == 3
    assert clipped([(0, 4)], [(1, 2), (3, 9)]) == [(1, 2), (3, 4)]


def test_phases_of_a_real_trace(tmp_path: Path) -> None:
    with profile(activities=[ProfilerActivity.CPU]) as recorded, recording(), phase("step"):
        for _ in range(2):
            with phase("train"), phase("optimizer"):
                torch.ones(4).sum()
    recorded.export_chrome_trace(str(tmp_path / "trace.json.gz"))
    found = summarise(read_events(tmp_path / "trace.json.gz"))
    assert list(found.phases) == ["train", "train/optimizer"]
    assert 0 < found.phases["train/optimizer"] <= found.phases["train"] <= found.step


def test_outside_of_a_recording_phases_are_nothing(tmp_path: Path) -> None:
    with profile(activities=[ProfilerActivity.CPU]) as recorded, phase("step"):
        torch.ones(4).sum()
    recorded.export_chrome_trace(str(tmp_path / "trace.json.gz"))
    assert not [e for e in read_events(tmp_path / "trace.json.gz") if str(e.get("name")).startswith("phase: ")]


def test_the_table() -> None:
    ranks = [
        TraceSummary(10, {"rollout": 3, "train": 5, "train/optimizer": 1}, 2, {"gloo:all_reduce": 2}, 4, 1),
        TraceSummary(10, {"rollout": 4, "train": 5, "train/optimizer": 2}, 3, {"gloo:all_to_all": 3}, 4, 3),
    ]
    metrics = {f"rollout/{name}_s": 0.5 for name in ("plan", "wait", "forward", "sample")} | {
        "rollout/num_tokens": 600.0,
        "rollout/tokens_per_s": 150.0,
        "perf/train_tokens": 800.0,
        "perf/train_throughput": 160.0,
        "perf/train_tflops_per_gpu": 0.25,
    }
    found = StepProfile(3, "cpu", ranks, [10**9, 2 * 10**9], Peak(0.5, "stated: profile.peak_tflops"), metrics)
    assert (found.mfu, found.bubble_share, found.communication_share) == (0.5, 0.5, 0.25)
    lines = [line.split() for line in found.to_text().splitlines()]
    for row in (
        ["rollout", "3.500", "4.000", "35.0%"],
        ["forward", "0.500", "5.0%"],
        ["optimizer", "1.500", "2.000", "15.0%"],
        ["gloo:all_to_all", "1.500", "3.000"],
    ):
        assert row in lines
    for text in ("MFU of training: 50.0% of 0.5 TFLOP/s (stated", "bubble: 50.0%", "2.00 GB", "rollout: 600 tokens"):
        assert text in found.to_text()
    assert json.loads(json.dumps(found.to_dict()))["ranks"][1]["phases"]["train/optimizer"] == 2


def test_peak_is_what_a_product_takes() -> None:
    """Within a factor of the same product timed here, on a machine that others use too."""
    left = torch.ones(512, 512)
    seconds = min(timeit.repeat(lambda: torch.mm(left, left), number=1, repeat=10))
    rate = measure_peak_tflops(torch.device("cpu"), torch.float32, seconds=0.05)
    assert rate == pytest.approx(2 * 512**3 / seconds / 1e12, rel=0.8)
