"""The grouped GEMM of ``csrc/`` against the reference in float64, and that a row's bits depend on nothing but the row.

Shapes: M rows, E experts, weights [E, N, K].
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from r1_megatron.kernels import library, reference
from r1_megatron.kernels.ops import ops
from tests.kernels.capabilities import OLDER, results_on

pytestmark = pytest.mark.skipif(not library.load().loaded, reason=f"csrc is not loaded: {library.load().problem}")

# The largest error, relative to the largest value of the result.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float64: 1e-13}
DTYPES = list(TOLERANCE)
CAPABILITIES = library.CPU_CAPABILITIES

# Rows per expert, rows past the last expert's, N, K. Every edge of the blocking is in them: tiles of 6, 12 and 14 rows
# and of 8 to 32 columns, 256 columns and 336 rows a block, and a reduced axis that is summed 256 at a time.
CASES = {
    "one": ([1], 0, 1, 1),
    "odd": ([4, 0, 9, 1], 2, 5, 7),
    "narrow": ([3, 30, 0, 14], 1, 1, 300),
    "shallow": ([3, 30, 0, 14], 1, 300, 1),
    "whole tiles": ([28, 84, 12], 0, 64, 256),
    "many blocks": ([337, 13], 3, 259, 70),
    "deep": ([1, 600, 0, 17], 5, 33, 513),
    "skewed": ([211, 90, 31, 12, 5, 2, 1, 1, 0, 0, 0, 1, 0, 0, 0, 0], 4, 48, 40),
    "all empty": ([0] * 8, 6, 16, 32),
    "no rows": ([0, 0], 0, 9, 10),
    "no experts": ([], 3, 9, 10),
    "no depth": ([2, 3], 1, 4, 0),
    "no columns": ([2, 3], 1, 0, 4),
}


def problem(case, dtype, offsets_dtype=torch.int64, seed=0):
    """``x, weight, dy, offsets``; the rows that belong to nobody are NaN and must not be looked at."""
    sizes, extra, N, K = CASES[case]
    g = torch.Generator().manual_seed(seed)
    M = sum(sizes)
    x = torch.randn(M + extra, K, generator=g, dtype=torch.float64).to(dtype)
    weight = torch.randn(len(sizes), N, K, generator=g, dtype=torch.float64).to(dtype)
    dy = torch.randn(M + extra, N, generator=g, dtype=torch.float64).to(dtype)
    x[M:], dy[M:] = torch.nan, torch.nan
    return x, weight, dy, torch.tensor(sizes, dtype=torch.int64).cumsum(0).to(offsets_dtype)


def grouped_mm_wgrad(dy, x, offsets, num_experts, dtype):
    out = torch.full((num_experts, dy.shape[1], x.shape[1]), torch.nan, dtype=dtype)
    ops.grouped_mm_wgrad(dy, x, offsets, out, False)
    return out


def assert_close(got, want, dtype):
    assert got.shape == want.shape
    if want.numel():
        error = (got.double() - want).abs().max() / want.abs().max().clamp(min=1e-30)
        assert error <= TOLERANCE[dtype], f"relative error {error:.2e}"


@pytest.mark.parametrize("offsets_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_products_equal_the_float64_reference(case, dtype, offsets_dtype):
    x, weight, dy, offsets = problem(case, dtype, offsets_dtype)
    M = sum(CASES[case][0])
    # Memory that the results will probably be given: whatever they do not write shows.
    for poison in (torch.full_like(dy, torch.nan), torch.full_like(x, torch.nan)):
        del poison
    y, dx = ops.grouped_mm(x, weight, offsets), ops.grouped_mm_dgrad(dy, weight, offsets)
    assert y.dtype == dx.dtype == dtype
    assert_close(y, reference.grouped_mm(x.double(), weight.double(), offsets), dtype)
    assert_close(dx, reference.grouped_mm_dgrad(dy.double(), weight.double(), offsets), dtype)
    assert torch.equal(y[M:], torch.zeros_like(y[M:])) and torch.equal(dx[M:], torch.zeros_like(dx[M:]))


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype, out_dtype", [*((d, d) for d in DTYPES), *((d, torch.float32) for d in DTYPES[1:])])
@pytest.mark.parametrize("case", CASES)
def test_wgrad_equals_the_float64_reference(case, dtype, out_dtype, accumulate):
    x, weight, dy, offsets = problem(case, dtype)
    before = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).to(out_dtype)
    if not accumulate:
        before.fill_(torch.nan)
    out, want = before.clone(), before.double()
    ops.grouped_mm_wgrad(dy, x, offsets, out, accumulate)
    reference.grouped_mm_wgrad(dy.double(), x.double(), offsets, want, accumulate)
    assert_close(out, want, torch.float32 if dtype == torch.float64 and out_dtype == torch.float32 else out_dtype)
    for expert, size in enumerate(CASES[case][0]):
        if size == 0:
            assert torch.equal(out[expert], before[expert] if accumulate else torch.zeros_like(out[expert]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["odd", "narrow", "many blocks", "deep", "skewed"])
def test_a_row_has_the_same_bits_in_any_company(case, dtype):
    """Alone, in pieces of every size, behind other experts, in another order: the same row, the same result."""
    x, weight, dy, offsets = problem(case, dtype)
    y, dx = ops.grouped_mm(x, weight, offsets), ops.grouped_mm_dgrad(dy, weight, offsets)
    g = torch.Generator().manual_seed(2)
    for expert, rows in reference._experts(offsets):
        xe, dye, we = x[rows], dy[rows], weight[expert : expert + 1]
        num_rows = xe.shape[0]
        for piece in {1, 2, 5, 6, 13, 14, 15, 27, num_rows} & set(range(1, num_rows + 1)):
            start = int(torch.randint(0, num_rows - piece + 1, (), generator=g))
            part = slice(start, start + piece)
            offset = torch.tensor([piece])
            assert torch.equal(ops.grouped_mm(xe[part], we, offset), y[rows][part])
            assert torch.equal(ops.grouped_mm_dgrad(dye[part], we, offset), dx[rows][part])
        # Another order, another expert in front, more rows behind.
        order = torch.randperm(num_rows, generator=g)
        front, behind = torch.randn(3, x.shape[1]).to(dtype), torch.randn(4, x.shape[1]).to(dtype)
        moved = ops.grouped_mm(
            torch.cat([front, xe[order], behind]),
            torch.cat([torch.randn_like(we), we]),
            torch.tensor([3, 3 + num_rows], dtype=torch.int32),
        )
        assert torch.equal(moved[3 : 3 + num_rows], y[rows][order])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["odd", "many blocks", "deep"])
def test_a_weights_gradient_depends_on_its_experts_rows_alone(case, dtype):
    x, weight, dy, offsets = problem(case, dtype)
    E, N, K = weight.shape
    out = grouped_mm_wgrad(dy, x, offsets, E, torch.float32)
    for expert, rows in reference._experts(offsets):
        alone = grouped_mm_wgrad(dy[rows], x[rows], torch.tensor([rows.stop - rows.start]), 1, torch.float32)
        assert torch.equal(alone[0], out[expert])
    # Nor on the other outputs: some of the columns alone.
    n, k = N // 2 + 1, K // 3 + 1
    part = grouped_mm_wgrad(dy[:, :n].contiguous(), x[:, -k:].contiguous(), offsets, E, torch.float32)
    assert torch.equal(part, out[:, :n, -k:])
    # Accumulating into zeros is storing.
    zeros = torch.zeros_like(out)
    ops.grouped_mm_wgrad(dy, x, offsets, zeros, True)
    assert torch.equal(zeros, out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("case", ["odd", "deep"])
def test_nan_and_infinity_stay_in_their_rows(case, value, dtype):
    """Also where the reduced axis is odd and a neighbour's first value follows the row's last."""
    x, weight, dy, offsets = problem(case, dtype)
    M = sum(CASES[case][0])
    y, dx = ops.grouped_mm(x, weight, offsets), ops.grouped_mm_dgrad(dy, weight, offsets)
    bad = torch.arange(1, M, 3)
    for place in (0, -1):
        bad_x, bad_dy = x.clone(), dy.clone()
        bad_x[bad, place], bad_dy[bad, place] = value, value
        for got, good, want in (
            (ops.grouped_mm(bad_x, weight, offsets), y, weight[..., place]),
            (ops.grouped_mm_dgrad(bad_dy, weight, offsets), dx, weight[:, place]),
        ):
            rest = torch.ones(len(got), dtype=torch.bool).index_fill(0, bad, False)
            assert torch.equal(got[rest], good[rest])
            experts = torch.searchsorted(offsets, bad, right=True)
            assert torch.equal(got[bad].nan_to_num(), (value * want[experts]).nan_to_num())
    # Into a weight's gradient, from one value in one row.
    bad_dy = dy.clone()
    bad_dy[M - 1, -1] = value
    out, clean = (grouped_mm_wgrad(d, x, offsets, weight.shape[0], dtype) for d in (bad_dy, dy))
    last = int(torch.searchsorted(offsets, torch.tensor(M - 1), right=True))
    assert not out[last, -1].isfinite().any()
    out[last, -1] = clean[last, -1]
    assert torch.equal(out, clean)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_nothing(dtype):
    x, weight, dy, offsets = problem("deep", dtype)
    results, before = [], torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            results.append(
                (
                    ops.grouped_mm(x, weight, offsets),
                    ops.grouped_mm_dgrad(dy, weight, offsets),
                    grouped_mm_wgrad(dy, x, offsets, weight.shape[0], torch.float32),
                )
            )
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))


def test_operands_may_lie_anywhere():
    """Storage that starts at an odd element: no alignment is assumed."""
    x, weight, dy, offsets = problem("deep", torch.bfloat16)

    def moved(tensor):
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)

    assert moved(x).data_ptr() % 4 == 2
    assert torch.equal(ops.grouped_mm(moved(x), moved(weight), offsets), ops.grouped_mm(x, weight, offsets))
    assert torch.equal(
        ops.grouped_mm_dgrad(moved(dy), moved(weight), offsets), ops.grouped_mm_dgrad(dy, weight, offsets)
    )
    out = moved(torch.full(weight.shape, torch.nan))
    ops.grouped_mm_wgrad(moved(dy), moved(x), offsets, out, False)
    assert torch.equal(out, grouped_mm_wgrad(dy, x, offsets, weight.shape[0], torch.float32))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_cpu_capability_passes(capability):
    """The same tests once more, in a process that may use no more than ``capability``."""
    own = library.load().cpu_capability
    if CAPABILITIES.index(capability) >= CAPABILITIES.index(own):
        pytest.skip(f"this process runs on {own}: it has tested that, and cannot test more")
    selection = ["-k", "equal or same_bits or alone"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__, *selection]
    environment = {**os.environ, "R1_MEGATRON_CPU_CAPABILITY": capability}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout and "skipped" not in done.stdout


SCRIPT = """
import torch
from tests.kernels.test_grouped_mm import CASES, DTYPES, products
results = {(case, dtype): products(case, dtype) for case in CASES for dtype in DTYPES}
"""


def products(case, dtype):
    x, weight, dy, offsets = problem(case, dtype)
    gradient = grouped_mm_wgrad(dy, x, offsets, weight.shape[0], torch.float32)
    return ops.grouped_mm(x, weight, offsets), ops.grouped_mm_dgrad(dy, weight, offsets), gradient


@pytest.mark.parametrize("capability", OLDER)
def test_older_processors_agree(capability, tmp_path):
    results = results_on(capability, SCRIPT, tmp_path)
    for (case, dtype), theirs in results.items():
        for ours, other in zip(products(case, dtype), theirs):
            # A gradient in float32 is that exact for bfloat16 too: its products are, and sums run in float32.
            assert_close(ours, other.double(), torch.float32 if ours.dtype == torch.float32 else dtype)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(x=torch.zeros(4)), r"x must be \[\*, \*\], got \[4\] float32"),
        (dict(weight=torch.zeros(2, 5, 7)), r"weight must be \[\*, \*, 6\], got \[2, 5, 7\] float32"),
        (dict(weight=torch.zeros(2, 6, 5).mT), r"weight \[2, 5, 6\] float32 must be contiguous"),
        (dict(weight=torch.zeros(2, 5, 6).double()), r"one dtype, got \[4, 6\] float32 and \[2, 5, 6\] float64"),
        (dict(x=torch.zeros(4, 6).half(), weight=torch.zeros(2, 5, 6).half()), r"or float64 expected, got float16"),
        (dict(offsets=torch.tensor([1, 2, 4])), r"offsets must be \[2\], got \[3\] int64"),
        (dict(offsets=torch.tensor([1.0, 4.0])), r"offsets must be int32 or int64, got \[2\] float32"),
        (dict(offsets=torch.tensor([3, 2])), r"nor pass M = 4, got offsets\[1\] = 2 after 3"),
        (dict(offsets=torch.tensor([3, 5])), r"nor pass M = 4, got offsets\[1\] = 5 after 3"),
        (dict(offsets=torch.tensor([-1, 4])), r"nor pass M = 4, got offsets\[0\] = -1 after 0"),
    ],
)
def test_a_wrong_argument_is_named_with_its_value(arguments, message):
    good = dict(x=torch.zeros(4, 6), weight=torch.zeros(2, 5, 6), offsets=torch.tensor([1, 4]))
    with pytest.raises(RuntimeError, match="grouped_mm: .*" + message):
        ops.grouped_mm(**{**good, **arguments})


def test_wrong_gradients_are_named_too():
    dy, x, offsets = torch.zeros(4, 5), torch.zeros(4, 6), torch.tensor([1, 4])
    with pytest.raises(RuntimeError, match=r"grouped_mm_dgrad: weight must be \[\*, 5, \*\], got \[2, 6, 5\] float32"):
        ops.grouped_mm_dgrad(dy, torch.zeros(2, 6, 5), offsets)
    with pytest.raises(RuntimeError, match=r"grouped_mm_wgrad: out must be \[\*, 5, 6\], got \[2, 6, 5\] float32"):
        ops.grouped_mm_wgrad(dy, x, offsets, torch.zeros(2, 6, 5), False)
    with pytest.raises(RuntimeError, match=r"out must be float32 or have the dtype of x \(float32\), got .* float64"):
        ops.grouped_mm_wgrad(dy, x, offsets, torch.zeros(2, 5, 6).double(), False)
    with pytest.raises(RuntimeError, match=r"grouped_mm_wgrad: .* nor pass M = 4, got offsets\[1\] = 9 after 1"):
        ops.grouped_mm_wgrad(dy, x, torch.tensor([1, 9]), torch.zeros(2, 5, 6), False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_schemas_and_fake_implementations_are_true(dtype):
    x, weight, dy, offsets = (t.nan_to_num() if t.is_floating_point() else t for t in problem("odd", dtype))
    torch.library.opcheck(ops.grouped_mm.default, (x, weight, offsets))
    torch.library.opcheck(ops.grouped_mm_dgrad.default, (dy, weight, offsets))
    for accumulate in (False, True):
        torch.library.opcheck(ops.grouped_mm_wgrad.default, (dy, x, offsets, torch.zeros(weight.shape), accumulate))
