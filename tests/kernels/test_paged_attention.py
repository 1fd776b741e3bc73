"""Attention over a paged cache: against PyTorch's own attention of each row in float64, and its own bits."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from r1_megatron.kernels import library, paged_attention
from r1_megatron.kernels.ops import ops

# The largest error, relative to the largest value of the result.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float64: 1e-13}
DTYPES = list(TOLERANCE)
needs_csrc = pytest.mark.skipif(not library.load().loaded, reason=f"csrc is not loaded: {library.load().problem}")


@dataclass(frozen=True)
class Shape:
    """Groups, heads of a group, width of keys and of values, where values start, numbers of a token, page size."""

    groups: int
    heads: int
    key: int
    value: int
    value_start: int
    width: int
    page_size: int


LATENT = Shape(1, 8, 80, 64, 0, 80, 16)
SHAPES = [
    LATENT,
    Shape(2, 4, 32, 32, 64, 128, 16),  # grouped queries: keys first, values behind them
    Shape(1, 128, 576, 512, 0, 576, 64),  # DeepSeek-V3
    Shape(1, 2, 48, 32, 0, 48, 16),  # half a tile of heads: the smallest model over two tensor-parallel ranks
    Shape(1, 3, 7, 5, 1, 9, 4),
    Shape(3, 1, 19, 33, 57, 160, 1),
    Shape(4, 5, 16, 1, 64, 68, 3),
]


@dataclass
class Problem:
    query: Tensor
    cache: Tensor
    page_table: Tensor
    lengths: Tensor
    arguments: dict

    def run(self, rows: slice | Tensor = slice(None)) -> Tensor:
        return paged_attention(
            self.query[rows].contiguous(),
            self.cache,
            self.page_table[rows].contiguous(),
            self.lengths[rows].contiguous(),
            **self.arguments,
        )


def problem(shape: Shape, lengths: list[int], dtype: torch.dtype, device: str = "cpu", sharpness: float = 3.0):
    """Sequences on shuffled pages; what lies behind their lengths, and page 0, is NaN."""
    g = torch.Generator().manual_seed(0)
    pages = [-(-length // shape.page_size) for length in lengths]
    order = 1 + torch.randperm(sum(pages), generator=g)
    cache = torch.randn(1 + sum(pages), shape.page_size, shape.width, generator=g, dtype=torch.float64)
    cache[0] = torch.nan
    page_table = torch.zeros(len(lengths), max([1, *pages]), dtype=torch.int32)
    for row, (length, own) in enumerate(zip(lengths, order.split(pages))):
        page_table[row, : len(own)] = own
        if length % shape.page_size:
            cache[own[-1], length % shape.page_size :] = torch.nan
    query = torch.randn(len(lengths), shape.groups * shape.heads, shape.key, generator=g, dtype=torch.float64)
    return Problem(
        query.to(device, dtype),
        cache.to(device, dtype),
        page_table.to(device),
        torch.tensor(lengths, dtype=torch.int32, device=device),
        dict(
            num_groups=shape.groups,
            value_start=shape.value_start,
            value_width=shape.value,
            scale=sharpness * shape.key**-0.5,
        ),
    )


def wanted(p: Problem, shape: Shape) -> Tensor:
    """PyTorch's attention in float64, row by row, over the row's positions brought together."""
    rows = []
    for query, pages, length in zip(p.query.cpu().double(), p.page_table.cpu().long(), p.lengths.tolist()):
        past = p.cache.cpu().double()[pages].flatten(0, 1)[:length]
        key = past[:, : shape.groups * shape.key].view(length, shape.groups, shape.key)
        end = shape.value_start + shape.groups * shape.value
        value = past[:, shape.value_start : end].reshape(length, shape.groups, shape.value)
        key, value = (t.repeat_interleave(shape.heads, 1).transpose(0, 1) for t in (key, value))
        row = F.scaled_dot_product_attention(query[:, None], key, value, scale=p.arguments["scale"])[:, 0]
        rows.append(row if length else torch.zeros_like(row))
    return torch.stack(rows) if rows else p.query.new_zeros(0, shape.groups * shape.heads, shape.value).double()


def assert_close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype and got.shape == want.shape
    if want.numel():
        error = (got.cpu().double() - want).abs().max() / want.abs().max().clamp(min=1e-30)
        assert error <= TOLERANCE[dtype], f"relative error {error:.2e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_equal_float64(device, shape, dtype):
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("float64 is for the CPU")
    for lengths in ([1], [40, 1, 0, 129, 16, 17, 15, 64, 3], []):
        p = problem(shape, lengths, dtype, device)
        assert_close(p.run(), wanted(p, shape), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_scores(device, dtype):
    """One position takes it all, or almost; nothing overflows and the order of positions does not matter."""
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("float64 is for the CPU")
    p = problem(LATENT, [300, 40, 200], dtype, device, sharpness=300.0)
    # Scores of some hundreds: float32 leaves an error of their last digit in the exponent.
    got, want = p.run().cpu().double(), wanted(p, LATENT)
    assert got.isfinite().all()
    assert (got - want).abs().max() <= (2e-3 if dtype == torch.float32 else 1e-11)


@needs_csrc
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
def test_a_row_has_the_same_bits_in_any_company_and_on_any_pages(shape, dtype):
    lengths = [40, 1, 129, 16, 17, 64, 3, 200]
    p = problem(shape, lengths, dtype)
    whole = p.run()
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(1))
    assert torch.equal(p.run(order), whole[order])
    for part in (slice(0, 1), slice(2, 5), slice(7, 8)):
        assert torch.equal(p.run(part), whole[part])
    # The same sequences elsewhere in the cache, with a longer table.
    moved = 1 + torch.randperm(len(p.cache) - 1, generator=torch.Generator().manual_seed(2))
    cache = p.cache.clone()
    cache[moved] = p.cache[1:]
    place = torch.cat([torch.zeros(1, dtype=torch.int64), moved])
    table = F.pad(place[p.page_table.long()].int(), (0, 5))
    assert torch.equal(Problem(p.query, cache, table, p.lengths, p.arguments).run(), whole)


def test_rows_of_one_sequence_are_causal_attention():
    """A prompt's chunk: rows that share a page table, each one position longer than the one before."""
    length, chunk = 45, 20
    p = problem(LATENT, [length] * 1, torch.float64)
    query = torch.randn(chunk, 8, 80, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    lengths = torch.arange(length - chunk + 1, length + 1, dtype=torch.int32)
    table = p.page_table.expand(chunk, -1).contiguous()
    got = Problem(query, p.cache, table, lengths, p.arguments).run()
    past = p.cache[p.page_table[0].long()].flatten(0, 1)[:length]
    mask = torch.arange(length) < lengths[:, None]
    key, value = past.expand(8, -1, -1), past[:, :64].expand(8, -1, -1)
    want = F.scaled_dot_product_attention(query.transpose(0, 1), key, value, mask, scale=p.arguments["scale"])
    assert_close(got, want.transpose(0, 1), torch.float64)


def test_the_number_of_threads_changes_nothing():
    p = problem(LATENT, list(range(1, 400, 7)), torch.float32)
    results, before = [], torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            results.append(p.run())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[1], results[0]) and torch.equal(results[2], results[0])


def test_a_call_that_would_record_a_gradient_raises():
    p = problem(LATENT, [5], torch.float32)
    p.query.requires_grad_()
    with pytest.raises(RuntimeError, match=r"paged_attention has no gradient: call it within torch\.no_grad"):
        p.run()
    with torch.no_grad():
        assert not p.run().requires_grad


@needs_csrc
@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(query=torch.zeros(2, 4)), r"query must be \[\*, \*, \*\], got \[2, 4\] float32"),
        (
            dict(cache=torch.zeros(3, 4, 24).double()),
            r"cache must have the dtype of query \(float32\), got",
        ),
        (dict(page_table=torch.zeros(2, 2, dtype=torch.int64)), r"must be int32, got \[2, 2\] int64"),
        (dict(lengths=torch.ones(3, dtype=torch.int32)), r"lengths must be \[2\], got \[3\] int32"),
        (dict(lengths=torch.tensor([1, 9], dtype=torch.int32)), r"lengths\[1\] = 9, .* 2 pages of 4 positions a row"),
        (dict(page_table=torch.tensor([[0, 0], [0, 3]], dtype=torch.int32)), r"page_table\[1, 1\] = 3, .* has 3 pages"),
        (dict(num_groups=3), r"num_groups must divide the 4 heads, got 3"),
        (dict(num_groups=4), r"keys of 4 groups, 8 numbers each, do not fit into cache \[3, 4, 24\] float32"),
        (dict(value_start=17), r"values of 1 groups, 8 numbers each from 17 on, do not fit into cache"),
    ],
)
def test_a_wrong_argument_is_named_with_its_value(changed, message):
    tensors = dict(
        query=torch.zeros(2, 4, 8),
        cache=torch.zeros(3, 4, 24),
        page_table=torch.zeros(2, 2, dtype=torch.int32),
        lengths=torch.tensor([3, 8], dtype=torch.int32),
    )
    numbers = dict(num_groups=1, value_start=16, value_width=8, scale=1.0)
    assert ops.paged_attention(**tensors, **numbers).shape == (2, 4, 8)
    with pytest.raises(RuntimeError, match="paged_attention: .*" + message):
        ops.paged_attention(**(tensors | numbers | changed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_schema_and_fake_implementation_are_true(dtype):
    shape = Shape(2, 2, 8, 8, 16, 32, 4)
    p = problem(shape, [3, 9], dtype)
    torch.library.opcheck(
        ops.paged_attention.default, (p.query, p.cache.nan_to_num(), p.page_table, p.lengths), p.arguments
    )


@needs_csrc
@pytest.mark.parametrize("capability", library.CPU_CAPABILITIES)
def test_every_cpu_capability_passes(capability):
    """The same tests once more, in a process that may use no more than ``capability``."""
    own = library.load().cpu_capability
    if not library.load().loaded or library.CPU_CAPABILITIES.index(capability) >= library.CPU_CAPABILITIES.index(own):
        pytest.skip(f"this process runs on {own}: it has tested that, and cannot test more")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__, "-k", "cpu and equal or same_bits"]
    environment = {**os.environ, "R1_MEGATRON_CPU_CAPABILITY": capability}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
