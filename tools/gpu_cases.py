"""What ``gpu_check.py`` benchmarks: each case with its work, its bound, its goal, and all ways to compute it.

A case is a description first (FLOPs, bytes, goal): ``--plan`` prints it without a GPU. Its tensors are made when it
runs, on any device: the tests run every case at tiny shapes on the CPU. A goal is a share of the bound that is measured
in the same run: a dense product of the same FLOPs, or the same bytes, only moved.

Shapes: M rows, E experts, N out and K in features; T tokens, V columns of this rank's vocabulary shard, H hidden, F
width of an expert.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.measure import Candidate
from tools.peers import (
    HeadTask,
    forward_backward,
    is_installed,
    liger_from_logits,
    plain_swiglu,
    statistics_peers,
)

BF16 = torch.bfloat16
OURS, BOUND = "ours", "bound"


@dataclass(frozen=True)
class Case:
    """``candidates(device)`` gives `OURS`, `BOUND` (what limits it) and peers.

    Those named in ``compared`` must give what ours gives, within ``tolerance``. A peer that may not be installed, or in
    another version, is only set up when it is first called: its failure is then its own.
    """

    title: str
    flops: float
    bytes: float
    candidates: Callable[[torch.device], Mapping[str, Candidate]]
    goal: float | None = None
    compared: tuple[str, ...] = ()
    tolerance: float = 1e-2
    memory_of: tuple[str, ...] = (OURS,)


@dataclass(frozen=True)
class Sizes:
    """Production shapes: `PRODUCTION`. Nothing but the speed depends on them: `TINY` runs anywhere."""

    gemm_NK: tuple[tuple[int, int], ...]
    experts: tuple[int, ...]
    rows: tuple[int, ...]
    tokens: int
    vocab: int
    hidden: int
    swiglu_rows: int
    swiglu_width: int
    loads: tuple[str, ...] = field(default=("even", "Zipf"))


# DeepSeek-V3's: an expert's gate and up, then down projection; the head's vocabulary shard at TP8 (129280 / 8).
PRODUCTION = Sizes(
    gemm_NK=((4096, 7168), (7168, 2048)), experts=(4, 8, 32), rows=(8192, 32768, 65536),
    tokens=32768, vocab=16160, hidden=7168, swiglu_rows=65536, swiglu_width=2048,
)  # fmt: skip
TINY = Sizes(
    gemm_NK=((32, 64), (64, 16)), experts=(4,), rows=(48,),
    tokens=32, vocab=160, hidden=64, swiglu_rows=32, swiglu_width=16,
)  # fmt: skip


def section(name: str, sizes: Sizes) -> list[Case]:
    return list({"gemm": gemm_cases, "loss": loss_cases, "head": head_cases, "swiglu": swiglu_cases}[name](sizes))


SECTIONS = ("gemm", "loss", "head", "swiglu")


# ---------------------------------------------------------------------------------------------------------------------
# Grouped GEMM.
# ---------------------------------------------------------------------------------------------------------------------


def expert_rows(load: str, rows: int, experts: int) -> list[int]:
    """How many rows each expert gets. Zipf: the e-th busiest expert gets 1/e of what the busiest gets."""
    weights = [1.0] * experts if load == "even" else [1 / (rank + 1) for rank in range(experts)]
    ends, total = [0], 0.0
    for weight in weights:
        total += weight
        ends.append(round(rows * total / sum(weights)))
    return [end - start for start, end in pairwise(ends)]


def gemm_goal(product: str, load: str, rows_per_expert: float) -> float | None:
    """Share of a dense product that an even load must reach; a skewed one is only reported."""
    if load != "even":
        return None
    if product == "wgrad":
        # With few rows it is the float32 gradient, read and written, that takes the time: rows / 4 FLOPs per byte.
        return 0.70 if rows_per_expert >= 1024 else None
    return next((goal for least, goal in ((2048, 0.85), (1024, 0.75), (256, 0.55)) if rows_per_expert >= least), None)


def gemm_cases(sizes: Sizes) -> Iterator[Case]:
    for n, k in sizes.gemm_NK:
        for experts in sizes.experts:
            for rows in sizes.rows:
                for load in sizes.loads:
                    yield from _products(n, k, experts, rows, load)


def _products(n: int, k: int, experts: int, rows: int, load: str) -> Iterator[Case]:
    flops = 2.0 * rows * n * k
    moved = {  # bytes of two bf16 operands and the result, which is fp32 and read too in wgrad
        "forward": 2.0 * (rows * k + experts * n * k + rows * n),
        "dgrad": 2.0 * (rows * n + experts * n * k + rows * k),
        "wgrad": 2.0 * (rows * n + rows * k) + 8.0 * experts * n * k,
    }
    shape = f"({n}, {k}) E={experts} M={rows} {load}"
    operands = functools.partial(_operands, n, k, experts, rows, load)
    for product, make in (("forward", _forward), ("dgrad", _dgrad), ("wgrad", _wgrad)):
        yield Case(
            f"grouped_mm {product} {shape}",
            flops,
            moved[product],
            lambda device, make=make: make(operands(device)),
            gemm_goal(product, load, rows / experts),
            compared=("F.grouped_mm", "TE") if product == "forward" else ("F.grouped_mm",),
        )
    if is_installed("TE"):  # it has no call for only one of the two
        yield Case(
            f"grouped_mm dgrad + wgrad {shape}",
            2 * flops,
            moved["dgrad"] + moved["wgrad"],
            lambda device: _backward(operands(device)),
        )


@dataclass(frozen=True)
class Operands:
    counts: list[int]
    offsets_E: Tensor
    x_MK: Tensor
    dy_MN: Tensor
    weight_ENK: Tensor
    main_grad_ENK: Tensor


@functools.lru_cache(maxsize=1)
def _operands(n: int, k: int, experts: int, rows: int, load: str, device: torch.device) -> Operands:
    torch.manual_seed(0)
    counts = expert_rows(load, rows, experts)
    return Operands(
        counts,
        torch.tensor(counts, device=device).cumsum(0).to(torch.int32),
        torch.randn(rows, k, dtype=BF16, device=device),
        torch.randn(rows, n, dtype=BF16, device=device),
        torch.randn(experts, n, k, dtype=BF16, device=device) * k**-0.5,
        torch.zeros(experts, n, k, dtype=torch.float32, device=device),
    )


def _forward(o: Operands) -> dict[str, Candidate]:
    from r1_megatron.kernels.ops import ops

    dense = o.weight_ENK[0].T
    candidates = {
        OURS: Candidate(lambda: (ops.grouped_mm(o.x_MK, o.weight_ENK, o.offsets_E),)),
        BOUND: Candidate(lambda: (o.x_MK @ dense,)),
        "F.grouped_mm": Candidate(lambda: (F.grouped_mm(o.x_MK, o.weight_ENK.transpose(1, 2), offs=o.offsets_E),)),
    }
    if is_installed("TE"):
        module = functools.cache(lambda: _transformer_engine(o))
        candidates["TE"] = Candidate(torch.no_grad()(lambda: (module()(o.x_MK, o.counts),)))
    return candidates


def _dgrad(o: Operands) -> dict[str, Candidate]:
    from r1_megatron.kernels.ops import ops

    dense = o.weight_ENK[0]
    return {
        OURS: Candidate(lambda: (ops.grouped_mm_dgrad(o.dy_MN, o.weight_ENK, o.offsets_E),)),
        BOUND: Candidate(lambda: (o.dy_MN @ dense,)),
        "F.grouped_mm": Candidate(lambda: (F.grouped_mm(o.dy_MN, o.weight_ENK, offs=o.offsets_E),)),
    }


def _wgrad(o: Operands) -> dict[str, Candidate]:
    from r1_megatron.kernels.ops import ops

    def ours(accumulator: Tensor):
        ops.grouped_mm_wgrad(o.dy_MN, o.x_MK, o.offsets_E, accumulator, True)
        return (accumulator,)

    return {
        # Added to the float32 gradient, as in training; the peers write a bf16 product of their own.
        OURS: Candidate(ours, lambda: (o.main_grad_ENK.zero_(),)),
        BOUND: Candidate(lambda: (o.dy_MN.T @ o.x_MK,)),
        "F.grouped_mm": Candidate(lambda: (F.grouped_mm(o.dy_MN.T, o.x_MK, offs=o.offsets_E),)),
    }


def _backward(o: Operands) -> dict[str, Candidate]:
    dgrad, wgrad = _dgrad(o), _wgrad(o)
    candidates = {
        name: Candidate(lambda *out, name=name: (*dgrad[name].run(), *wgrad[name].run(*out)), wgrad[name].inputs)
        for name in (OURS, BOUND, "F.grouped_mm")
    }

    @functools.cache
    def graph():
        module, x_MK = _transformer_engine(o), o.x_MK.detach().requires_grad_()
        return module(x_MK, o.counts), [x_MK, *module.parameters()]

    candidates["TE"] = Candidate(lambda: torch.autograd.grad(*graph(), o.dy_MN, retain_graph=True))
    return candidates


def _transformer_engine(o: Operands):
    import transformer_engine.pytorch as te

    experts, n, k = o.weight_ENK.shape
    module = te.GroupedLinear(experts, k, n, bias=False, params_dtype=BF16, device=o.x_MK.device)
    with torch.no_grad():
        for expert, weight in enumerate(o.weight_ENK):
            getattr(module, f"weight{expert}").copy_(weight)
    return module


# ---------------------------------------------------------------------------------------------------------------------
# Token statistics and their gradient, from logits.
# ---------------------------------------------------------------------------------------------------------------------


def loss_cases(sizes: Sizes) -> Iterator[Case]:
    t, v = sizes.tokens, sizes.vocab
    shape, size = f"T={t} V={v} bf16", 2.0 * t * v
    tensors = functools.partial(_logits, t, v)
    yield Case(
        f"token statistics, forward {shape}", 0, size, lambda device: _statistics(tensors(device)), 0.85,
        compared=("PyTorch", "PyTorch, logsumexp", "TRL"), memory_of=(OURS, "PyTorch"),
    )  # fmt: skip
    yield Case(
        f"gradient over the logits {shape}", 0, 2 * size, lambda device: _gradient(tensors(device)), 0.85
    )  # fmt: skip
    yield Case(
        f"log-probability and entropy, forward + backward {shape}", 0, 3 * size,
        lambda device: _statistics_and_gradient(tensors(device)),
        compared=("PyTorch", "PyTorch, logsumexp", "TRL"), memory_of=(OURS, "PyTorch"),
    )  # fmt: skip


@dataclass(frozen=True)
class Logits:
    logits_TV: Tensor
    scratch_TV: Tensor
    targets_T: Tensor
    g_T: Tensor
    h_T: Tensor

    def fresh(self) -> Tensor:
        """A copy that may be overwritten."""
        return self.scratch_TV.copy_(self.logits_TV)


@functools.lru_cache(maxsize=1)
def _logits(tokens: int, vocab: int, device: torch.device) -> Logits:
    torch.manual_seed(0)
    logits_TV = 3 * torch.randn(tokens, vocab, dtype=BF16, device=device)
    targets_T = torch.randint(vocab, (tokens,), device=device)
    g_T, h_T = torch.randn(2, tokens, device=device)
    return Logits(logits_TV, torch.empty_like(logits_TV), targets_T, g_T, 0.1 * h_T)


def _statistics(l: Logits) -> dict[str, Candidate]:
    from r1_megatron.kernels.ops import ops

    def ours():
        stats_T4 = ops.shard_statistics(l.logits_TV, l.targets_T, 0, l.logits_TV.shape[1], 1.0, True)
        return ops.combine_statistics(stats_T4[None])[:2]

    candidates = {OURS: Candidate(ours), BOUND: Candidate(lambda: l.logits_TV.view(torch.float32).sum())}
    for name, statistics in statistics_peers().items():
        candidates[name] = Candidate(torch.no_grad()(functools.partial(statistics, l.logits_TV, l.targets_T)))
    return candidates


def _gradient(l: Logits) -> dict[str, Candidate]:
    from r1_megatron.kernels.ops import ops

    vocab = l.logits_TV.shape[1]
    stats_T4 = ops.shard_statistics(l.logits_TV, l.targets_T, 0, vocab, 1.0, True)
    _, entropy_T, max_T, log_sum_T = ops.combine_statistics(stats_T4[None])

    def ours(logits_TV: Tensor):
        shard = 0, vocab, 1.0
        ops.shard_gradient_(logits_TV, l.targets_T, l.g_T, l.h_T, entropy_T, max_T, log_sum_T, *shard)
        return (logits_TV,)

    return {OURS: Candidate(ours, lambda: (l.fresh(),)), BOUND: Candidate(lambda: (l.scratch_TV.neg_(),))}


def _statistics_and_gradient(l: Logits) -> dict[str, Candidate]:
    from r1_megatron.kernels.vocab_parallel import token_statistics

    def candidate(statistics) -> Candidate:
        run = functools.partial(forward_backward, statistics, targets_T=l.targets_T, g_T=l.g_T, h_T=l.h_T)
        return Candidate(run, lambda: (l.fresh().detach().requires_grad_(),))

    def moved():
        return l.logits_TV.view(torch.float32).sum(), l.scratch_TV.neg_()

    candidates = {OURS: candidate(functools.partial(token_statistics, in_place=True)), BOUND: Candidate(moved)}
    candidates |= {name: candidate(statistics) for name, statistics in statistics_peers().items()}
    if is_installed("Liger"):
        liger = functools.cache(lambda: liger_from_logits(l.logits_TV, l.targets_T))
        candidates["Liger"] = Candidate(lambda logits: liger()[0](logits), lambda: liger()[1]())
    return candidates


# ---------------------------------------------------------------------------------------------------------------------
# With the language-model head.
# ---------------------------------------------------------------------------------------------------------------------


def head_cases(sizes: Sizes) -> Iterator[Case]:
    t, v, h = sizes.tokens, sizes.vocab, sizes.hidden

    def candidates(device: torch.device) -> dict[str, Candidate]:
        task = HeadTask.make(t, v, h, BF16, device)
        methods = {OURS: task.ours, BOUND: task.products_alone, "PyTorch": task.plain}
        methods |= {"Liger": task.liger} if is_installed("Liger") else {}
        return {name: Candidate(method) for name, method in methods.items()}

    yield Case(
        f"policy loss with the head, forward + backward T={t} V={v} H={h} bf16",
        3 * 2.0 * t * v * h, 2.0 * 3 * (t * h + v * h + t * v), candidates, 1 / 1.10,
        compared=("PyTorch",), memory_of=(OURS, "PyTorch"),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# SwiGLU.
# ---------------------------------------------------------------------------------------------------------------------


def swiglu_cases(sizes: Sizes) -> Iterator[Case]:
    m, f = sizes.swiglu_rows, sizes.swiglu_width
    shape, size = f"M={m} F={f} bf16", 2.0 * m * f
    tensors = functools.partial(_activation, m, f)
    yield Case(f"swiglu, forward {shape}", 0, 3 * size, lambda device: _swiglu(tensors(device)), compared=("PyTorch",))
    yield Case(
        f"swiglu, backward (and the activation again) {shape}", 0, 6 * size,
        lambda device: _swiglu_backward(tensors(device)), compared=("PyTorch",),
    )  # fmt: skip


@dataclass(frozen=True)
class Activation:
    h_M2F: Tensor
    da_MF: Tensor
    probs_M: Tensor


@functools.lru_cache(maxsize=1)
def _activation(rows: int, width: int, device: torch.device) -> Activation:
    torch.manual_seed(0)
    h_M2F = torch.randn(rows, 2 * width, dtype=BF16, device=device)
    return Activation(h_M2F, torch.randn(rows, width, dtype=BF16, device=device), torch.rand(rows, device=device))


def _moving(num_bytes: int, device: torch.device) -> Candidate:
    """A copy that reads and writes ``num_bytes`` in all."""
    source = torch.empty(num_bytes // 2, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return Candidate(lambda: target.copy_(source))


def _swiglu(t: Activation) -> dict[str, Candidate]:
    from r1_megatron.kernels.ops import ops

    return {
        OURS: Candidate(lambda: (ops.swiglu(t.h_M2F, t.probs_M),)),
        BOUND: _moving(6 * t.da_MF.numel(), t.da_MF.device),
        "PyTorch": Candidate(lambda: (plain_swiglu(t.h_M2F, t.probs_M),)),
    }


def _swiglu_backward(t: Activation) -> dict[str, Candidate]:
    from r1_megatron.kernels.ops import ops

    def ours():
        dh_M2F, a_MF, dprobs_M = ops.swiglu_backward(t.da_MF, t.h_M2F, t.probs_M)
        return dh_M2F, dprobs_M, a_MF

    def plain(h_M2F: Tensor, probs_M: Tensor, a_MF: Tensor):
        return (*torch.autograd.grad(a_MF, [h_M2F, probs_M], t.da_MF), a_MF.detach())

    def graph():
        h_M2F, probs_M = t.h_M2F.detach().requires_grad_(), t.probs_M.detach().requires_grad_()
        return h_M2F, probs_M, plain_swiglu(h_M2F, probs_M)

    return {
        OURS: Candidate(ours),
        BOUND: _moving(12 * t.da_MF.numel(), t.da_MF.device),
        "PyTorch": Candidate(plain, graph),
    }
