"""What a rank measures about its expert layer: the stacked module against megatron-core's one-by-one module."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from r1_megatron.config.schema import ParallelConfig, RunConfig, TrainConfig
from r1_megatron.model.build import build_model
from r1_megatron.model.parameters import global_parameters
from r1_megatron.parallel.groups import ProcessGroups, build_process_groups
from tests.tiny import TINY

# Rows of the first local expert, the second, ...; taken in turn. Some experts get no token, in the last load none does.
LOADS = ((7, 0, 1, 33, 16, 2, 5, 64), (1, 40, 3, 0), (0, 0, 0, 0))


def compare(parallel: ParallelConfig) -> list[dict[str, Any]]:
    """Largest absolute differences in float64 between the two modules on the same rows, for each load."""
    groups = build_process_groups(parallel)
    grouped, sequential = (_expert_layer(groups, parallel, kind) for kind in ("grouped", "sequential"))
    num_experts = grouped["module"].num_local_experts
    answers = []
    for number, load in enumerate(LOADS):
        generator = torch.Generator().manual_seed(number)
        counts = torch.tensor([load[i % len(load)] for i in range(num_experts)])
        rows = int(counts.sum())
        x = torch.randn(rows, TINY.hidden_size, generator=generator, dtype=torch.float64)
        probs = torch.rand(rows, generator=generator, dtype=torch.float64)
        dy = torch.randn(rows, TINY.hidden_size, generator=generator, dtype=torch.float64)
        ours, theirs = (_run(layer, x, counts, probs, dy) for layer in (grouped, sequential))
        assert ours.keys() == theirs.keys() and len(ours) == 3 + 2 * num_experts
        answers.append({name: _distance(ours[name], theirs[name]) for name in ours})
    return answers


def _expert_layer(groups: ProcessGroups, parallel: ParallelConfig, kind: str) -> dict[str, Any]:
    """The first MoE layer's experts in float64, with the parameters (or their slices) by global name."""
    cfg = RunConfig(model=TINY, parallel=parallel, train=replace(TrainConfig(), moe_experts=kind))
    (chunk,) = build_model(cfg, groups)
    chunk.double()
    layer = chunk.decoder.layers[TINY.first_k_dense_replace].mlp.experts
    prefix = f"decoder.layers.{TINY.first_k_dense_replace}.mlp.experts."

    def gradients() -> dict[str, torch.Tensor]:
        for parameter in chunk.parameters():
            parameter.main_grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        named = {p.name: p.tensor.main_grad.clone() for p in global_parameters(chunk, groups)}
        for parameter in chunk.parameters():
            parameter.grad = None
            del parameter.main_grad
        return {name: gradient for name, gradient in named.items() if name.startswith(prefix)}

    return {"module": layer, "gradients": gradients}


def _run(layer: dict[str, Any], x, counts, probs, dy) -> dict[str, torch.Tensor]:
    x, probs = x.clone().requires_grad_(), probs.clone().requires_grad_()
    y, bias = layer["module"](x, counts, probs)
    assert bias is None
    y.backward(dy)
    return {"y": y.detach(), "dx": x.grad, "dprobs": probs.grad, **layer["gradients"]()}


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item() if a.numel() else 0.0
