"""Grouped GEMM: the problems that the device model (host) and the GPU tests both solve, and how a result is judged.

Everything that a kernel must not read or write is poisoned: rows past the end and the weights of empty experts hold
NaN, and so does the memory around an output that the test allocates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from r1_megatron.kernels import reference

PRODUCTS = ("grouped_mm", "grouped_mm_dgrad", "grouped_mm_wgrad")
GUARD = 256


@dataclass(frozen=True)
class Case:
    """``counts``: rows of each expert; ``past_end``: rows that belong to nobody."""

    counts: tuple[int, ...]
    past_end: int
    n: int
    k: int
    dtype: torch.dtype = torch.bfloat16
    out_dtype: torch.dtype | None = None  # of wgrad; None: dtype
    accumulate: bool = False
    offsets_dtype: torch.dtype = torch.int32

    def __str__(self) -> str:
        rows = f"{len(self.counts)}x{max(self.counts)}" if len(self.counts) > 6 else "+".join(map(str, self.counts))
        text = f"{rows}+{self.past_end}_N{self.n}_K{self.k}_{str(self.dtype)[6:]}"
        text += f"_to_{str(self.out_dtype)[6:]}" if self.out_dtype else ""
        return text + ("_accumulate" if self.accumulate else "") + f"_{str(self.offsets_dtype)[6:]}"


@dataclass
class Operands:
    x: Tensor
    dy: Tensor
    weight: Tensor
    offsets: Tensor
    out: Tensor  # of wgrad, in the middle of `guarded`
    guarded: Tensor


def operands(case: Case, device: str = "cpu", seed: int = 0) -> Operands:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    end = sum(case.counts)
    x, dy = randn(end + case.past_end, case.k), randn(end + case.past_end, case.n)
    weight = randn(len(case.counts), case.n, case.k)
    x[end:], dy[end:] = torch.nan, torch.nan
    weight[torch.tensor(case.counts) == 0] = torch.nan
    offsets = torch.tensor(case.counts).cumsum(0).to(case.offsets_dtype)
    x, dy, weight = (tensor.to(case.dtype).to(device) for tensor in (x, dy, weight))
    guarded = torch.full((weight.numel() + 2 * GUARD,), torch.nan, dtype=case.out_dtype or case.dtype, device=device)
    out = guarded[GUARD:-GUARD].view(weight.shape)
    if case.accumulate:
        out.copy_(randn(*weight.shape))
    return Operands(x, dy, weight, offsets.to(device), out, guarded)


def expected(product: str, given: Operands, accumulate: bool = False) -> Tensor:
    x, dy, weight = given.x.double(), given.dy.double(), given.weight.double()
    if product == "grouped_mm":
        return reference.grouped_mm(x, weight, given.offsets)
    if product == "grouped_mm_dgrad":
        return reference.grouped_mm_dgrad(dy, weight, given.offsets)
    out = given.out.double() if accumulate else torch.empty_like(weight)
    reference.grouped_mm_wgrad(dy, x, given.offsets, out, accumulate)
    return out


def check(result: Tensor, wanted: Tensor, operand_dtype: torch.dtype) -> None:
    """Row by row, so that one wrong row is not drowned by the others.

    Results in bfloat16 carry its rounding. Float32 sums of bfloat16 products are the tensor cores', which truncate.
    """
    tolerance = 1e-2 if result.dtype == torch.bfloat16 else 1e-4 if operand_dtype == torch.bfloat16 else 1e-5
    assert result.shape == wanted.shape
    error = (result.double() - wanted).norm(dim=-1)
    scale = wanted.norm(dim=-1)
    assert torch.isfinite(error).all(), "something that does not belong there leaked in"
    worst = max((error / scale.clamp(min=1e-30)).flatten().tolist(), default=0.0)
    assert (error <= tolerance * scale).all(), f"relative error of a row: {worst:.2e}, tolerance {tolerance:.0e}"


def check_guards(given: Operands) -> None:
    assert given.guarded[:GUARD].isnan().all() and given.guarded[-GUARD:].isnan().all(), "written beside the output"
