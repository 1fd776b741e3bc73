"""What the tests of recorded decode steps ask ranks to do: the engine with recorders that any device has."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from r1_megatron.config.schema import ModelConfig, ParallelConfig, SamplingConfig
from r1_megatron.kernels import cuda, decode, library, reference
from r1_megatron.kernels.ops import NAMES
from r1_megatron.model.walk import Walk
from r1_megatron.rollout import graphs as graphs_room
from r1_megatron.rollout.cache import TokenCache
from r1_megatron.rollout.graphs import WARM_UPS, StepGraphs
from r1_megatron.rollout.sampler import draws_at_once
from r1_megatron.rollout.scheduler import StepPlan
from r1_megatron.types import Rollout
from tests.distributed import rollout_checks as checks

Results = list[torch.Tensor]


def run_again(run: Callable[[], Results]) -> tuple[Callable[[], None], Results]:
    """Plays by running the function once more: proves the buffers, with collectives too."""
    results = run()

    def play() -> None:
        for result, new in zip(results, run()):
            result.copy_(new)

    return play, results


def trace(run: Callable[[], Results]) -> tuple[Callable[[], None], Results]:
    """Plays the operators that ran, on the memory they ran on: like a CUDA graph it knows no Python and no values.

    Whatever the function read back from a tensor is written into the recording and wrong the next time.
    """
    traced = make_fx(run)()
    results = traced()

    def play() -> None:
        for result, new in zip(results, traced()):
            result.copy_(new)

    return play, results


RECORDERS = {"run_again": run_again, "trace": trace}


def check_recorded(
    parallel: ParallelConfig,
    recorder: str,
    model: ModelConfig = checks.MODEL,
    sampling: SamplingConfig = checks.SAMPLING,
    page_size: int = 16,
    **rollout: Any,
) -> dict[str, Any]:
    """Samples with and without recordings, three calls each; answers how many were made and played in each call.

    The second call meets other weights in the same place, the third one a cache that was given back.
    """
    cfg = checks.run_config(parallel, model)
    cfg = replace(cfg, rollout=replace(cfg.rollout, **rollout))
    with mock.patch.dict(checks.PAGE_SIZE, cpu=page_size):
        groups, policy, engine = checks.setup(cfg)
    prompts = checks.share(checks.some_prompts(5, model.vocab_size), groups, uneven=False)
    assert graphs_room.why_not_layers(engine.chunks, groups) == ""
    assert graphs_room.why_not(engine.chunks, groups) == "on GPUs only" and engine._capture is None
    numbers, built = [], []
    for call in range(3):
        if call == 1:
            with torch.no_grad():
                for parameter in (parameter for chunk in policy.chunks for parameter in chunk.parameters()):
                    parameter.mul_(1.05)
        engine._capture = None
        plain = engine.generate(prompts, 3, sampling, seed=call)
        engine._capture = lambda: RECORDERS[recorder]
        if call == 2:
            engine.release()
        recorded = engine.generate(prompts, 3, sampling, seed=call)
        assert_equal(plain, recorded)
        assert engine._graphs is not None
        numbers.append((engine._graphs.num_recorded, engine._graphs.num_played))
        built.append(engine._graphs)
    assert built[0] is built[1] and built[1] is not built[2]
    return {
        "numbers": numbers,
        "preemptions": engine.metrics["rollout/preemptions"],
        "played": engine.metrics["rollout/num_forwards_played"],
    }


def assert_equal(plain: list[list[Rollout]], recorded: list[list[Rollout]]) -> None:
    """Tokens and experts are the same, log-probabilities to rounding (a padded product may be cut otherwise)."""
    ours, theirs = ([rollout for group in groups for rollout in group] for groups in (recorded, plain))
    assert [rollout.request for rollout in ours] == [rollout.request for rollout in theirs]
    for a, b in zip(ours, theirs):
        assert a.tokens.tolist() == b.tokens.tolist()
        assert a.logprobs is not None and b.logprobs is not None
        assert np.abs(a.logprobs - b.logprobs).max() <= 1e-5
        if b.routed_experts is not None:
            assert a.routed_experts is not None and np.array_equal(a.routed_experts, b.routed_experts)


def check_moved_weights() -> tuple[bool, bool]:
    """Whether recordings are thought to be in place before and after a parameter has moved."""
    cfg = checks.run_config(ParallelConfig(device="cpu"))
    _, policy, engine = checks.setup(cfg)
    engine._capture = lambda: run_again
    engine.generate(checks.some_prompts(2), 1, checks.SAMPLING, seed=1)
    assert engine._graphs is not None
    before, parameter = engine._graphs.in_place, next(policy.chunks[0].parameters())
    parameter.data = parameter.data.clone()
    return before, engine._graphs.in_place


def check_without_values(sampling: SamplingConfig, model: ModelConfig = checks.MODEL) -> list[tuple[int, ...]]:
    """A recorded step as CUDA would run it, on a device that has no values; shapes of its results.

    Waiting for a value, a shape that depends on one, or a tensor of the host raises there.
    """
    cfg = checks.run_config(ParallelConfig(device="cpu"), model)
    groups, policy, _ = checks.setup(cfg)
    nowhere = torch.device("meta")
    chunks = [chunk.to_empty(device=nowhere) for chunk in policy.chunks]
    for chunk in chunks:
        for module in chunk.modules():  # tables that are no buffers
            for name, value in vars(module).items():
                if isinstance(value, torch.Tensor):
                    setattr(module, name, value.to(nowhere))
    groups = dataclasses.replace(groups, device=nowhere)
    attention = chunks[0].decoder.layers[0].self_attention
    layers = [layer.layer_number for layer in chunks[0].decoder.layers]
    cache = TokenCache(layers, 40, 16, attention.cache_width, torch.float32, nowhere)
    rotary = tuple(table.to(nowhere) for table in attention.rotary_tables(64))
    shapes: list[tuple[int, ...]] = []

    def record(run: Callable[[], Results]) -> tuple[Callable[[], None], Results]:
        results = run()
        shapes.extend(tuple(result.shape) for result in results)
        return (lambda: None), results

    graphs = StepGraphs(
        record, chunks, [Walk(chunk, groups, True) for chunk in chunks], groups, cache, rotary,
        vocab_size=model.vocab_size, max_rows=10, max_pages=4, record_routing=True,
    )  # fmt: skip
    forms = {name: getattr(cuda, name, None) or getattr(reference, name) for name in NAMES}
    forms["paged_attention"] = torch.ops.r1_megatron.paged_attention  # has a kernel there
    found = dataclasses.replace(library.load(), with_cuda=True)
    if not draws_at_once(sampling):  # the draw comes behind the recording, and waits
        setattr(graphs, "_draw", lambda logits, *_: logits)  # noqa: B010
    with (
        torch.no_grad(),
        mock.patch.object(decode, "ops", SimpleNamespace(**forms)),
        mock.patch.object(library, "load", lambda: found),
    ):
        for _ in range(WARM_UPS + 1):
            graphs(0, some_plan(3), None, sampling)
    return shapes


def some_plan(num_rows: int) -> StepPlan:
    rows = np.arange(num_rows)
    return StepPlan(
        tokens=rows,
        positions=rows + 5,
        cache_rows=rows * 16 + 5,
        page_table=rows[:, None].astype(np.int32),
        prefill_lengths=(),
        sequences=rows,
        sampled_rows=rows,
        keys=rows,
        sample_positions=rows + 6,
        draft_of=rows[:0],
        following=rows[:0],
        copies=(),
        given_up=(),
    )
