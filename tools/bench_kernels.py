"""How fast the operators are on this CPU, against their peers in the same run.

    python tools/bench_kernels.py                    # all cases, one thread, a few minutes
    python tools/bench_kernels.py --only loss        # one of: experts, loss, head, annotation, gemm, decode
    python tools/bench_kernels.py --write            # and put the table into BENCHMARKS.md

Every candidate of a case gets the same inputs and weights, and its results are compared before anything is timed: a
disagreement ends the run with exit code 1. Then they run in turn, and the median counts. ``ratio`` is the peer's figure
divided by ours, for time and for memory: above 1 is in our favour.

Memory is what a computation touches beyond its inputs, its results included: the growth of the peak of resident pages
in a fresh process (``measure.py``), so scratch memory of every library counts.

Shapes: T tokens, H hidden, V vocabulary, E experts, M rows (tokens times experts per token), F width of an expert.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, installed or not

import torch
import torch.nn.functional as F
from torch import Tensor

from r1_megatron.kernels import (
    draw_tokens,
    latent_query,
    latent_values,
    library,
    linear_rows,
    mixture_of_experts,
    paged_attention,
    rms_norm,
    route_tokens,
)
from r1_megatron.kernels.experts import grouped_swiglu_experts
from r1_megatron.kernels.ops import ops
from r1_megatron.kernels.vocab_parallel import token_statistics
from tools.measure import (
    Candidate,
    cpu_name,
    cpu_peak_bytes,
    cpu_stopwatch,
    mebibytes,
    relative_error,
    table,
    time_in_turn,
    write_section,
)
from tools.peers import HeadTask, Statistics, forward_backward, is_installed, statistics_peers

ROOT = Path(__file__).resolve().parent.parent
# The smallest peak of memory that is told from another: ratios count less as this much.
MEMORY_RESOLUTION = 1 << 20
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Case:
    """Candidates that compute the same, "ours" first; those of ``not_compared`` are bounds and compute something else.

    Goals: how many times as good as which peer ours has to be. Memory is measured where it has a goal or is shown.
    """

    title: str
    candidates: dict[str, Candidate]
    dtype: torch.dtype = torch.float32
    speed_goals: dict[str, float] = field(default_factory=dict)
    memory_goals: dict[str, float] = field(default_factory=dict)
    flops: float = 0.0
    show_memory: bool = False
    not_compared: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """One line of the table: our figure beside one peer's, as shown, and the peer's divided by ours."""

    case: str
    peer: str
    ours: str
    peers: str
    ratio: float
    goal: float | None = None

    @property
    def met(self) -> bool | None:
        return None if self.goal is None else self.ratio >= self.goal

    def cells(self) -> list[str]:
        goal = "" if self.goal is None else f"{self.goal:g}"
        met = {None: "", True: "yes", False: "NO"}[self.met]
        return [self.case, self.peer, self.ours, self.peers, f"{self.ratio:.2f}", goal, met]


HEADINGS = ("case", "peer", "ours", "peer's", "ratio", "goal", "met")


# ---------------------------------------------------------------------------------------------------------------------
# Cases. Each function makes the inputs and all candidates; ``small`` gives tiny shapes for tests and for warming up.
# ---------------------------------------------------------------------------------------------------------------------


def expert_layer(small: bool, hidden: int) -> Case:
    """One expert layer forward and backward: tokens already sorted by expert, gradients of everything."""
    from r1_megatron.model.experts import GroupedExperts

    num_experts, width, num_tokens, top_k = (8, 16, 32, 2) if small else (64, 64, 4096, 4)
    hidden = 32 if small else hidden
    config, groups = _one_rank(hidden, width, num_experts)
    generator = torch.Generator().manual_seed(1)
    chosen_TK = torch.rand(num_tokens, num_experts, generator=generator).topk(top_k).indices
    counts_E = chosen_TK.flatten().bincount(minlength=num_experts)
    num_rows = num_tokens * top_k
    x_MH = torch.randn(num_rows, hidden, generator=generator, requires_grad=True)
    probs_M = torch.rand(num_rows, generator=generator).requires_grad_()
    dy_MH = torch.randn(num_rows, hidden, generator=generator)
    offsets_E = counts_E.cumsum(0).to(torch.int32)

    ours = GroupedExperts(num_experts, config, pg_collection=groups)
    w1_EGH, w2_EHF = ours.linear_fc1.weight, ours.linear_fc2.weight
    with torch.no_grad():
        w1_EGH.normal_(0, hidden**-0.5, generator=generator)
        w2_EHF.normal_(0, width**-0.5, generator=generator)
    peer = _sequential_mlp(num_experts, config, groups, w1_EGH, w2_EHF)
    first = [expert.linear_fc1.weight for expert in peer.local_experts]
    second = [expert.linear_fc2.weight for expert in peer.local_experts]

    def ours_run():
        y, _ = ours(x_MH, counts_E, probs_M)
        return (y, *torch.autograd.grad(y, [x_MH, probs_M, w1_EGH, w2_EHF], dy_MH))

    def sequential_run():
        y, _ = peer(x_MH, counts_E, probs_M)
        dx, dprobs, *weights = torch.autograd.grad(y, [x_MH, probs_M, *first, *second], dy_MH)
        return y, dx, dprobs, weights[:num_experts], weights[num_experts:]

    def torch_grouped_run():
        gate, up = F.grouped_mm(x_MH, w1_EGH.transpose(1, 2), offs=offsets_E).chunk(2, dim=-1)
        a = F.silu(gate) * up * probs_M[:, None]
        y = F.grouped_mm(a, w2_EHF.transpose(1, 2), offs=offsets_E)
        return (y, *torch.autograd.grad(y, [x_MH, probs_M, w1_EGH, w2_EHF], dy_MH))

    sequential = "megatron-core SequentialMLP"
    return Case(
        f"expert layer, forward + backward: E={num_experts} F={width} H={hidden} T={num_tokens} top-{top_k} fp32",
        {
            "ours": Candidate(ours_run),
            sequential: Candidate(sequential_run),
            "torch F.grouped_mm": Candidate(torch_grouped_run),
        },
        speed_goals={sequential: 1.5},
        flops=3 * 2 * num_rows * 3 * width * hidden,
    )


@functools.cache
def _one_rank(hidden: int, width: int, num_experts: int):
    """megatron-core's configuration of our model and the process groups of a single rank."""
    from r1_megatron.config.schema import ModelConfig, ParallelConfig, TrainConfig
    from r1_megatron.model.deepseek_v3 import transformer_config
    from r1_megatron.parallel.groups import build_process_groups

    parallel = ParallelConfig(device="cpu")
    model = ModelConfig(hidden_size=hidden, moe_ffn_hidden_size=width, num_moe_experts=num_experts)
    return transformer_config(model, parallel, TrainConfig()), build_process_groups(parallel).collection


def _sequential_mlp(num_experts: int, config, groups, w1_EGH: Tensor, w2_EHF: Tensor):
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP

    submodules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    module = SequentialMLP(num_experts, config, submodules, pg_collection=groups)
    with torch.no_grad():
        for expert, w1, w2 in zip(module.local_experts, w1_EGH, w2_EHF):
            expert.linear_fc1.weight.copy_(w1)
            expert.linear_fc2.weight.copy_(w2)
    return module


def loss_from_logits(small: bool) -> Case:
    """Log-probability and entropy of every token and the gradient of a weighted sum of both."""
    logits_TV, targets_T, g_T, h_T = _logits(small)

    def candidate(statistics: Statistics) -> Candidate:
        run = functools.partial(forward_backward, statistics, targets_T=targets_T, g_T=g_T, h_T=h_T)
        # A copy of the logits, since ours writes the gradient over them.
        return Candidate(run, lambda: (logits_TV.clone().requires_grad_(),))

    ours = {"ours": functools.partial(token_statistics, in_place=True), "ours, logits kept": token_statistics}
    return Case(
        f"loss from logits, forward + backward: T={len(targets_T)} V={logits_TV.shape[1]} fp32",
        {name: candidate(statistics) for name, statistics in (ours | statistics_peers()).items()},
        speed_goals={"PyTorch": 2.0},
        memory_goals={"PyTorch": 4.0},
    )


def annotation(small: bool) -> Case:
    """The same without a gradient: what the old and the reference policy are asked for."""
    logits_TV, targets_T, _, _ = _logits(small)
    candidates = {
        name: Candidate(torch.no_grad()(functools.partial(statistics, logits_TV, targets_T)))
        for name, statistics in ({"ours": token_statistics} | statistics_peers()).items()
    }
    return Case(f"log-probability and entropy, no gradient: T={len(targets_T)} V={logits_TV.shape[1]} fp32", candidates)


def _logits(small: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_tokens, vocab = (16, 64) if small else (2048, 8192)
    generator = torch.Generator().manual_seed(2)
    logits_TV = 3 * torch.randn(num_tokens, vocab, generator=generator)
    targets_T = torch.randint(vocab, (num_tokens,), generator=generator)
    g_T, h_T = torch.randn(2, num_tokens, generator=generator)
    return logits_TV, targets_T, g_T, 0.1 * h_T


def policy_loss_with_head(small: bool) -> Case:
    """From hidden states to the gradients of hidden states and head: PPO's clip with an entropy bonus."""
    num_tokens, vocab, hidden = (16, 64, 32) if small else (2048, 8192, 256)
    task = HeadTask.make(num_tokens, vocab, hidden, torch.float32, torch.device("cpu"))
    return Case(
        f"policy loss with the head, forward + backward: T={num_tokens} V={vocab} H={hidden} fp32",
        {
            "ours": Candidate(task.ours),
            "PyTorch": Candidate(task.plain),
            "its three products alone (torch)": Candidate(task.products_alone),
        },
        flops=3 * 2 * num_tokens * vocab * hidden,
        show_memory=True,
        not_compared=("its three products alone (torch)",),
    )


def grouped_gemm(small: bool, product: str, num_experts: int, rows: int, n: int, k: int, dtype: torch.dtype) -> Case:
    """One raw grouped product, every expert with ``rows`` rows, against a loop over ``mm`` and PyTorch's own."""
    num_experts, rows, n, k = (4, 3, 16, 32) if small else (num_experts, rows, n, k)
    generator = torch.Generator().manual_seed(3)
    num_rows = num_experts * rows
    weight_ENK = torch.randn(num_experts, n, k, generator=generator).to(dtype)
    x_MK = torch.randn(num_rows, k, generator=generator).to(dtype)
    dy_MN = torch.randn(num_rows, n, generator=generator).to(dtype)
    offsets_E = torch.arange(rows, num_rows + 1, rows, dtype=torch.int32)
    out_ENK = torch.empty_like(weight_ENK)

    def wgrad():
        ops.grouped_mm_wgrad(dy_MN, x_MK, offsets_E, out_ENK, False)
        return (out_ENK,)

    def wgrad_loop():
        for expert, (dy, x) in enumerate(zip(dy_MN.split(rows), x_MK.split(rows))):
            torch.mm(dy.T, x, out=out_ENK[expert])
        return (out_ENK,)

    ours, loop, torch_grouped = {
        "forward": (
            lambda: (ops.grouped_mm(x_MK, weight_ENK, offsets_E),),
            lambda: (torch.cat([x @ w.T for x, w in zip(x_MK.split(rows), weight_ENK)]),),
            lambda: (F.grouped_mm(x_MK, weight_ENK.transpose(1, 2), offs=offsets_E),),
        ),
        "dgrad": (
            lambda: (ops.grouped_mm_dgrad(dy_MN, weight_ENK, offsets_E),),
            lambda: (torch.cat([dy @ w for dy, w in zip(dy_MN.split(rows), weight_ENK)]),),
            lambda: (F.grouped_mm(dy_MN, weight_ENK, offs=offsets_E),),
        ),
        "wgrad": (wgrad, wgrad_loop, lambda: (F.grouped_mm(dy_MN.T, x_MK, offs=offsets_E),)),
    }[product]
    return Case(
        f"grouped_mm {product}: E={num_experts} x {rows} rows, (N, K)=({n}, {k}) {DTYPE_NAMES[dtype]}",
        {"ours": Candidate(ours), "loop over mm": Candidate(loop), "torch F.grouped_mm": Candidate(torch_grouped)},
        dtype,
        flops=2 * num_rows * n * k,
    )


def decode_attention(small: bool, num_cached: int, dtype: torch.dtype) -> Case:
    """Absorbed latent attention of one token a sequence over its pages, against the products of PyTorch.

    The peer's keys lie side by side, in order and unpaged, which is the most it can ask for.
    """
    num_rows, num_cached, page_size = (3, 20, 16) if small else (64, num_cached, 16)
    num_heads, rank, width = 8, 64, 80
    generator = torch.Generator().manual_seed(4)
    num_pages = -(-num_cached // page_size)
    cache = torch.randn(num_rows * num_pages, page_size, width, generator=generator).to(dtype)
    query_DHW = torch.randn(num_rows, num_heads, width, generator=generator).to(dtype)
    page_table = torch.randperm(len(cache), generator=generator).int().view(num_rows, num_pages)
    lengths_D = torch.full((num_rows,), num_cached, dtype=torch.int32)
    scale = width**-0.5
    arguments = {"num_groups": 1, "value_start": 0, "value_width": rank, "scale": scale}
    past_DLW = cache[page_table.long()].flatten(1, 2)[:, :num_cached].contiguous()

    def products() -> tuple[Tensor]:
        scores_DHL = torch.bmm(query_DHW.float(), past_DLW.float().transpose(1, 2)) * scale
        return (torch.bmm(scores_DHL.softmax(-1).to(dtype), past_DLW[..., :rank]),)

    return Case(
        f"decode attention: D={num_rows} H={num_heads} R+P={width} L={num_cached} {DTYPE_NAMES[dtype]}",
        {
            "ours": Candidate(lambda: (paged_attention(query_DHW, cache, page_table, lengths_D, **arguments),)),
            "torch bmm, softmax, bmm": Candidate(products),
        },
        dtype,
        flops=2 * num_rows * num_heads * num_cached * (width + rank),
    )


def decode_routing(small: bool) -> Case:
    """DeepSeek-V3's choice of experts for the rows of a decode step."""
    num_tokens = 4 if small else 64
    generator = torch.Generator().manual_seed(5)
    logits_TE, bias_E = torch.randn(num_tokens, 16, generator=generator), torch.zeros(16)

    def torch_run() -> tuple[Tensor, Tensor]:
        from r1_megatron.model.routing import best_experts

        scores_TE = logits_TE.sigmoid()
        _, experts_TK = best_experts(scores_TE + bias_E, 4, 4, 2)
        chosen_TK = scores_TE.gather(1, experts_TK)
        return chosen_TK / (chosen_TK.sum(-1, keepdim=True) + 1e-20) * 2.5, experts_TK

    ours = functools.partial(route_tokens, logits_TE, bias_E, 4, num_groups=4, group_topk=2, scaling=2.5)
    return Case(
        f"decode routing: T={num_tokens} E=16 top-4, 2 of 4 groups fp32",
        {"ours": Candidate(ours), "torch topk": Candidate(torch_run)},
    )


def decode_experts(small: bool, num_tokens: int, dtype: torch.dtype) -> Case:
    """The routed experts of a decode step; of four layers, so that no cache holds a weight until it is read again."""
    num_tokens, num_layers = (4, 1) if small else (num_tokens, 4)
    num_experts, topk, hidden, width = 16, 4, 256, 128
    generator = torch.Generator().manual_seed(6)
    x_TH = torch.randn(num_tokens, hidden, generator=generator).to(dtype)
    experts_TK = torch.rand(num_tokens, num_experts, generator=generator).topk(topk).indices
    gates_TK = torch.rand(num_tokens, topk, generator=generator)
    layers = [
        (
            (torch.randn(num_experts, 2 * width, hidden, generator=generator) * hidden**-0.5).to(dtype),
            (torch.randn(num_experts, hidden, width, generator=generator) * width**-0.5).to(dtype),
        )
        for _ in range(num_layers)
    ]

    @torch.no_grad()
    def grouped(w1_EGH: Tensor, w2_EHF: Tensor) -> Tensor:
        chosen = experts_TK.flatten()
        order = chosen.argsort(stable=True)
        offsets_E = chosen.bincount(minlength=num_experts).cumsum(0)
        parts = grouped_swiglu_experts(x_TH[order // topk], gates_TK.flatten()[order], w1_EGH, w2_EHF, offsets_E)
        return torch.zeros_like(x_TH).index_add_(0, order // topk, parts)

    return Case(
        f"decode experts: T={num_tokens} E={num_experts} top-{topk} H={hidden} F={width}, {num_layers} layers"
        f" {DTYPE_NAMES[dtype]}",
        {
            "ours": Candidate(lambda: [mixture_of_experts(x_TH, gates_TK, experts_TK, *w, 0) for w in layers]),
            "sort, grouped_mm, index_add": Candidate(lambda: [grouped(*w) for w in layers]),
        },
        dtype,
        flops=2 * num_layers * num_tokens * topk * 3 * hidden * width,
    )


def decode_latent(small: bool) -> Case:
    """Latent attention around its scores: rotation, norm, cache, absorbed query; then the values of mixed latents."""
    from r1_megatron.model.latent_attention import rotate

    num_tokens, heads, nope, rope, rank, values = (4 if small else 64), 8, 32, 16, 64, 32
    generator = torch.Generator().manual_seed(7)
    query_THK = torch.randn(num_tokens, heads, nope + rope, generator=generator)
    latent_TW = torch.randn(num_tokens, rank + rope, generator=generator)
    up_HAR = torch.randn(heads, nope + values, rank, generator=generator)
    weight_R = torch.ones(rank)
    cos_TP, sin_TP = torch.randn(2, num_tokens, rope // 2, generator=generator)
    cache = torch.zeros(num_tokens, 16, rank + rope)
    rows_T = torch.arange(num_tokens) * 16

    def ours() -> tuple[Tensor, Tensor]:
        q_THW = latent_query(query_THK, latent_TW, up_HAR, weight_R, cos_TP, sin_TP, 1e-6, cache, rows_T)
        return q_THW, latent_values(q_THW[..., :rank].contiguous(), up_HAR, values)

    def torch_run() -> tuple[Tensor, Tensor]:
        rope_T1P = torch.cat([query_THK[..., nope:], latent_TW[:, None, rank:]], 1)
        rotated_TGP = rotate(rope_T1P, cos_TP[:, None], sin_TP[:, None])
        normed_TR = F.rms_norm(latent_TW[:, :rank], (rank,), weight_R, 1e-6)
        cache.view(-1, rank + rope).index_copy_(0, rows_T, torch.cat([normed_TR, rotated_TGP[:, heads]], -1))
        q_THR = torch.bmm(query_THK[..., :nope].transpose(0, 1), up_HAR[:, :nope]).transpose(0, 1)
        q_THW = torch.cat([q_THR, rotated_TGP[:, :heads]], -1)
        mixed_THR = q_THW[..., :rank].contiguous()
        v_HTV = torch.bmm(mixed_THR.transpose(0, 1), up_HAR[:, nope:].transpose(1, 2))
        return q_THW, v_HTV.transpose(0, 1).flatten(1)

    return Case(
        f"decode latent: T={num_tokens} H={heads} N={nope} P={rope} R={rank} V={values} fp32",
        {"ours": Candidate(ours), "torch rotate, norm, cat, bmm": Candidate(torch_run)},
    )


def decode_norm(small: bool) -> Case:
    """A residual sum and its RMSNorm."""
    generator = torch.Generator().manual_seed(8)
    x_TN, residual_TN = torch.randn(2, 4 if small else 64, 256, generator=generator)
    weight_N = torch.ones(256)

    def torch_run() -> tuple[Tensor, Tensor]:
        summed_TN = x_TN + residual_TN
        return F.rms_norm(summed_TN, (256,), weight_N, 1e-6), summed_TN

    return Case(
        f"decode norm: T={len(x_TN)} N=256, with residual, fp32",
        {"ours": Candidate(lambda: rms_norm(x_TN, weight_N, 1e-6, residual_TN)), "torch": Candidate(torch_run)},
    )


def decode_linear(small: bool, columns: int, depth: int) -> Case:
    """A linear layer of a decode step."""
    generator = torch.Generator().manual_seed(10)
    x_TK = torch.randn(4 if small else 64, depth, generator=generator)
    weight_NK = torch.randn(columns, depth, generator=generator)
    return Case(
        f"decode linear: T={len(x_TK)} N={columns} K={depth} fp32",
        {
            "ours": Candidate(lambda: (linear_rows(x_TK, weight_NK),)),
            "torch F.linear": Candidate(lambda: (F.linear(x_TK, weight_NK),)),
        },
        flops=2 * len(x_TK) * columns * depth,
    )


def decode_draw(small: bool) -> Case:
    """A token a row, one vocabulary shard: the noise and both normalisers."""
    from r1_megatron.rollout.sampler import gumbel_from_bits, position_keys, uniform_bits

    num_rows, vocab = (4, 64) if small else (64, 1024)
    generator = torch.Generator().manual_seed(9)
    logits_BV = 3 * torch.randn(num_rows, vocab, generator=generator)
    keys_B = position_keys(torch.arange(num_rows), torch.arange(num_rows))

    def torch_run() -> tuple[Tensor]:
        z_BV = logits_BV / 0.9
        score_BV = z_BV + gumbel_from_bits(uniform_bits(keys_B, torch.arange(vocab)))
        best_B, winner_B = score_BV.max(-1)
        max_B = z_BV.amax(-1)
        sum_B = torch.exp(z_BV - max_B[:, None]).sum(-1)
        columns = [best_B, winner_B, z_BV.gather(1, winner_B[:, None])[:, 0], max_B, sum_B]
        return (torch.stack([column.double() for column in columns], -1),)

    return Case(
        f"decode draw: B={num_rows} V={vocab} fp32",
        {
            "ours": Candidate(lambda: (draw_tokens(logits_BV, keys_B, 0, vocab, 0.9),)),
            "torch, rollout/sampler.py": Candidate(torch_run),
        },
    )


CASES: dict[str, Callable[[bool], Case]] = {
    "experts": functools.partial(expert_layer, hidden=256),
    "experts narrow": functools.partial(expert_layer, hidden=128),
    "loss": loss_from_logits,
    "head": policy_loss_with_head,
    "annotation": annotation,
}
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
CASES |= {
    "decode routing": decode_routing,
    "decode latent": decode_latent,
    "decode norm": decode_norm,
    "decode draw": decode_draw,
    "decode linear 256": functools.partial(decode_linear, columns=256, depth=256),
    "decode linear 1024": functools.partial(decode_linear, columns=1024, depth=256),
    "decode linear 384": functools.partial(decode_linear, columns=384, depth=96),
}
for _dtype in DTYPE_NAMES:
    for _tokens in (32, 64):
        _key = f"decode experts {_tokens} {DTYPE_NAMES[_dtype]}"
        CASES[_key] = functools.partial(decode_experts, num_tokens=_tokens, dtype=_dtype)
    for _length in (200, 1000):
        _key = f"decode attention {_length} {DTYPE_NAMES[_dtype]}"
        CASES[_key] = functools.partial(decode_attention, num_cached=_length, dtype=_dtype)
    for _product, *_sizes in (
        ("forward", 64, 256, 128, 256),
        ("dgrad", 64, 256, 128, 256),
        ("wgrad", 64, 256, 128, 256),
        ("forward", 8, 512, 1024, 512),
        ("forward", 16, 4, 128, 256),  # one token each of a few sequences, as in decoding
    ):
        _key = f"gemm {_product} {_sizes[0]}x{_sizes[1]} {DTYPE_NAMES[_dtype]}"
        CASES[_key] = functools.partial(
            grouped_gemm, product=_product, num_experts=_sizes[0], rows=_sizes[1], n=_sizes[2], k=_sizes[3],
            dtype=_dtype,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Measuring.
# ---------------------------------------------------------------------------------------------------------------------


def disagreements(case: Case) -> list[str]:
    """Peers whose results differ from ours by more than the arithmetic explains, one sentence each."""
    found = []
    ours = comparable(case.candidates["ours"]())
    for name, candidate in case.candidates.items():
        if name == "ours" or name in case.not_compared:
            continue
        error = relative_error(comparable(candidate()), ours)
        if not error <= TOLERANCE[case.dtype]:
            limit = TOLERANCE[case.dtype]
            found.append(f"{case.title}: ours and {name} differ by {error:.1e} (relative), more than {limit:g}")
    return found


def comparable(results: Sequence[Any]) -> list[Tensor]:
    """Results with the gradients of single experts stacked."""
    return [torch.stack(list(r)) if isinstance(r, (list, tuple)) else r for r in results]


def measure(key: str, small: bool, repeats: int, threads: int) -> list[Result]:
    case = CASES[key](small)
    timings = time_in_turn(case.candidates, cpu_stopwatch, repeats)
    speed = {
        name: f"{timing}, {case.flops / timing.median / 1e9:.1f} GF/s" if case.flops else str(timing)
        for name, timing in timings.items()
    }
    medians = {name: timing.median for name, timing in timings.items()}
    # Goals speak about the real shapes.
    results = against_peers(case.title, medians, speed, {} if small else case.speed_goals)
    if case.memory_goals or case.show_memory:
        make = functools.partial(_candidate, key)
        peak = {name: cpu_peak_bytes(functools.partial(make, name, small), threads) for name in timings}
        shown = {name: mebibytes(number) for name, number in peak.items()}
        known = {name: max(number, MEMORY_RESOLUTION) for name, number in peak.items()}
        results += against_peers("its extra memory", known, shown, {} if small else case.memory_goals)
    return results


def against_peers(
    title: str, figures: Mapping[str, float], shown: Mapping[str, str], goals: Mapping[str, float]
) -> list[Result]:
    """One line for each peer."""
    ours = figures["ours"]
    return [
        Result(title, name, shown["ours"], shown[name], figures[name] / ours, goals.get(name))
        for name in figures
        if name != "ours"
    ]


def without_repetitions(rows: list[list[str]]) -> list[list[str]]:
    """The case and our figure only in the first of the lines that they share."""
    return [
        ["", row[1], "", *row[3:]] if above and (row[0], row[2]) == (above[0], above[2]) else row
        for above, row in zip([None, *rows], rows)
    ]


def _candidate(key: str, name: str, always_small: bool, full: bool) -> Candidate:
    """Found by name, because this runs in another process."""
    return CASES[key](always_small or not full).candidates[name]


def machine(threads: int) -> dict[str, Any]:
    loaded = library.load()
    return {
        "cpu": cpu_name(),
        "threads": threads,
        "torch": torch.__version__,
        "operators": f"csrc ({loaded.cpu_capability})" if loaded.loaded else f"plain PyTorch: {loaded.problem}",
        "date": datetime.date.today().isoformat(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="rounds of each case (default 7)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch and of the operators (default 1)")
    parser.add_argument("--only", default="", metavar="WORD", help="only the cases that start so")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: tries the tool, measures nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    parser.add_argument("--write", action="store_true", help="put the table into BENCHMARKS.md")
    parser.add_argument("--assert-goals", action="store_true", help="exit code 1 where a goal is not met")
    options = parser.parse_args(argv)
    if options.quick and (options.write or options.assert_goals):
        parser.error("--quick measures nothing: it goes with neither --write nor --assert-goals")
    keys = [key for key in CASES if key.startswith(options.only)]
    if not keys:
        parser.error(f"--only {options.only}: no such case; there are {', '.join(CASES)}")
    torch.set_num_threads(options.threads)
    about = machine(options.threads)
    line = f"{about['cpu']}, {num_threads(about['threads'])}, torch {about['torch']}, operators: {about['operators']}"
    line += f", {about['date']}"
    absent = f"Liger runs on CUDA only (Triton){'' if is_installed('TRL') else ', TRL is not installed'}"
    print(line, f"not compared with: {absent}", sep="\n", flush=True)

    wrong = [sentence for key in keys for sentence in disagreements(CASES[key](options.quick))]
    if wrong:
        print("\n".join(["Nothing was timed, results disagree:", *wrong]), file=sys.stderr)
        return 1
    results: list[Result] = []
    for key in keys:
        print(f"measuring {key}", file=sys.stderr, flush=True)
        results += measure(key, options.quick, 2 if options.quick else options.repeats, options.threads)
    shown = table(HEADINGS, without_repetitions([result.cells() for result in results]))
    rounds = "tiny shapes: these figures say nothing" if options.quick else f"medians of {options.repeats} (extremes)"
    print(f"\n{shown}\n\n{rounds}; ratio = peer's / ours")
    if options.json:
        found = {"machine": about, "results": [asdict(result) | {"met": result.met} for result in results]}
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    if options.write:
        command = f"python tools/bench_kernels.py --repeats {options.repeats} --threads {options.threads}"
        body = f"`{command}`: {line}; {rounds}; ratio = peer's / ours. Not compared: {absent}.\n\n{shown}"
        write_section(ROOT / "BENCHMARKS.md", f"CPU, {num_threads(options.threads)}", body)
    unmet = [result for result in results if result.met is False]
    return 1 if options.assert_goals and unmet else 0


def num_threads(number: int) -> str:
    return f"{number} thread" if number == 1 else f"{number} threads"


if __name__ == "__main__":
    sys.exit(main())
