"""What ranks measure about the exchange of tokens between experts, against the weights of all experts on every rank."""

from __future__ import annotations

import zlib
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from r1_megatron.config.schema import ParallelConfig, RunConfig
from r1_megatron.model import expert_exchange
from r1_megatron.model.build import build_model
from r1_megatron.model.expert_exchange import ExpertExchange
from r1_megatron.model.parameters import global_parameters
from r1_megatron.parallel.groups import ProcessGroups, build_process_groups
from tests.tiny import TINY

# Rows of the first rank that exchanges, of the second, ... The third one's are padding.
ROWS = (37, 5, 3, 1)
PADDED = 2
HIDDEN, WIDTH, TOPK = TINY.hidden_size, TINY.moe_ffn_hidden_size, TINY.moe_router_topk


@torch.no_grad()
def compare(parallel: ParallelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The exchange by both ways, of a first row that all ranks have in common and others that they have not.

    Answers ``diff`` (largest difference from float64, relative to the largest value), ``ways`` (both ways agree in
    every bit), ``alone`` (so does the first row without the others), ``first`` (the first row) and ``padding``.
    """
    groups = build_process_groups(parallel)
    exchange = _exchange(groups, parallel, dtype)
    rank, size = groups.expert_tp_ep.rank(), groups.expert_tp_ep.size()
    peer_rows = ROWS[:size]
    x, gates, chosen = _rows(peer_rows[rank], rank, dtype)
    every = exchange.begin(x, gates, chosen, peer_rows)()
    with mock.patch.object(expert_exchange, "COUNTING_IS_WORTH", -1):
        counted = exchange.begin(x, gates, chosen, peer_rows)()
        alone = exchange.begin(x[:1], gates[:1], chosen[:1], (1,) * size)()
    expected = _plain(x, gates, chosen, dtype)
    padded = rank == PADDED
    return {
        "diff": 0.0 if padded else ((every - expected).abs().max() / expected.abs().max()).item(),
        "ways": torch.equal(every, counted),
        "alone": torch.equal(every[:1], alone),
        "first": None if padded else every[0].double().tolist(),
        "padding": every.abs().sum().item() if padded else 0.0,
    }


def _exchange(groups: ProcessGroups, parallel: ParallelConfig, dtype: torch.dtype) -> ExpertExchange:
    """Over the experts of a model's first such layer, with the weights of :func:`_weight`."""
    (chunk,) = build_model(RunConfig(model=TINY, parallel=parallel), groups)
    layer = TINY.first_k_dense_replace
    prefix = f"decoder.layers.{layer}.mlp.experts.local_experts."
    for parameter in global_parameters(chunk, groups):
        if parameter.name.startswith(prefix):
            expert, projection, _ = parameter.name.removeprefix(prefix).split(".")
            parameter.tensor.copy_(parameter.shard_of(_weight(int(expert), projection)))
    return ExpertExchange(chunk.to(dtype).decoder.layers[layer].mlp.experts, groups.expert_tp_ep)


def _weight(expert: int, projection: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{expert}.{projection}".encode()))
    shape = (2 * WIDTH, HIDDEN) if projection == "linear_fc1" else (HIDDEN, WIDTH)
    return 0.3 * torch.randn(shape, generator=generator)


def _rows(count: int, rank: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, gates and experts of a rank; the first row is the same on all."""
    parts = []
    for seed, num in ((0, 1), (1 + rank, count - 1)):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(num, HIDDEN, generator=generator).to(dtype)
        gates = torch.rand(num, TOPK, generator=generator)
        parts.append((x, gates, torch.rand(num, TINY.num_moe_experts, generator=generator).argsort(1)[:, :TOPK]))
    x, gates, chosen = map(torch.cat, zip(*parts))
    return x, gates, torch.full_like(chosen, -1) if rank == PADDED else chosen


def _plain(x: torch.Tensor, gates: torch.Tensor, chosen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The mixture in float64, expert by expert."""
    total = torch.zeros(x.shape, dtype=torch.float64)
    for expert in range(TINY.num_moe_experts):
        w1, w2 = (_weight(expert, name).to(dtype).double() for name in ("linear_fc1", "linear_fc2"))
        gate, up = (x.double() @ w1.T).chunk(2, 1)
        weight = torch.where(chosen == expert, gates.double(), 0.0).sum(1, keepdim=True)
        total += weight * ((F.silu(gate) * up) @ w2.T)
    return total
