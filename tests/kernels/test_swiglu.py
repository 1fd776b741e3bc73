"""SwiGLU times the router's probability: ``csrc/`` against the reference in float64, autograd, and its own bits."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from r1_megatron.kernels import library, reference
from r1_megatron.kernels.ops import ops

pytestmark = pytest.mark.skipif(not library.load().loaded, reason=f"csrc is not loaded: {library.load().problem}")

# The largest error, relative to the largest value of the result.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float64: 1e-13}
DTYPES = list(TOLERANCE)
CAPABILITIES = library.CPU_CAPABILITIES
# The dtypes of h and of the probabilities, None for none.
COMBINATIONS = [*((d, None) for d in DTYPES), *((d, d) for d in DTYPES), *((d, torch.float32) for d in DTYPES[1:])]


def problem(rows, width, dtype, probs_dtype, seed=0, scale=4.0):
    g = torch.Generator().manual_seed(seed)
    h = (torch.randn(rows, 2 * width, generator=g, dtype=torch.float64) * scale).to(dtype)
    da = torch.randn(rows, width, generator=g, dtype=torch.float64).to(dtype)
    probs = None if probs_dtype is None else torch.rand(rows, generator=g, dtype=torch.float64).to(probs_dtype)
    return da, h, probs


def double(tensor):
    return None if tensor is None else tensor.double()


def assert_close(got, want, dtype):
    assert got.dtype == dtype and got.shape == want.shape
    if want.numel():
        error = (got.double() - want).abs().max() / want.abs().max().clamp(min=1e-30)
        assert error <= TOLERANCE[dtype], f"relative error {error:.2e}"


@pytest.mark.parametrize("dtype, probs_dtype", COMBINATIONS)
@pytest.mark.parametrize("rows, width", [(1, 1), (5, 7), (33, 64), (9, 100), (3, 1031), (0, 8), (4, 0)])
def test_values_and_gradients_equal_the_float64_reference(rows, width, dtype, probs_dtype):
    da, h, probs = problem(rows, width, dtype, probs_dtype)
    # Memory that the results will probably be given: whatever they do not write shows.
    for poison in (torch.full_like(h, torch.nan), torch.full_like(da, torch.nan)):
        del poison
    a = ops.swiglu(h, probs)
    dh, recomputed, dprobs = ops.swiglu_backward(da, h, probs)
    want_dh, want_a, want_dprobs = reference.swiglu_backward(da.double(), h.double(), double(probs))
    assert_close(a, reference.swiglu(h.double(), double(probs)), dtype)
    assert torch.equal(recomputed, a)
    assert_close(dh, want_dh, dtype)
    assert_close(recomputed, want_a, dtype)
    if probs is None:
        assert dprobs.shape == (0,)
    else:
        assert_close(dprobs, want_dprobs, probs_dtype)


def test_gradients_equal_autograd():
    da, h, probs = problem(6, 19, torch.float64, torch.float64)
    h.requires_grad_()
    probs.requires_grad_()
    gate, up = h.chunk(2, dim=-1)
    a = torch.nn.functional.silu(gate) * up * probs[:, None]
    a.backward(da)
    dh, recomputed, dprobs = ops.swiglu_backward(da, h.detach(), probs.detach())
    assert_close(recomputed, a.detach(), torch.float64)
    assert_close(dh, h.grad, torch.float64)
    assert_close(dprobs, probs.grad, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_gates(dtype):
    """Each element on its own: the far tails neither overflow nor lose their last digits, and NaN stays NaN."""
    gate = torch.cat([torch.linspace(-80, 80, 4001, dtype=torch.float64), torch.tensor([-3e38, -200.0, 200.0, 3e38])])
    gate = gate.to(dtype)
    h = torch.cat([gate, torch.ones_like(gate)])[None]
    a = ops.swiglu(h, None)[0]
    want = torch.nn.functional.silu(gate.double())
    assert ((a.double() - want).abs() <= 1e-6 * want.abs() + 1e-35).all()
    dh, _, _ = ops.swiglu_backward(torch.ones_like(a)[None], h, None)
    assert dh.isfinite().all() and (dh[0, : gate.numel()][gate > 100] == 1).all()
    assert ops.swiglu(torch.full((1, 2), torch.nan, dtype=dtype), None).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 64, 100, 259])
def test_a_row_has_the_same_bits_in_any_company(dtype, width):
    da, h, probs = problem(41, width, dtype, torch.float32)
    a = ops.swiglu(h, probs)
    backward = ops.swiglu_backward(da, h, probs)
    order = torch.randperm(41, generator=torch.Generator().manual_seed(1))
    assert torch.equal(ops.swiglu(h[order], probs[order]), a[order])
    for got, want in zip(ops.swiglu_backward(da[order], h[order], probs[order]), backward):
        assert torch.equal(got, want[order])
    for part in (slice(0, 1), slice(3, 20), slice(40, 41)):
        assert torch.equal(ops.swiglu(h[part], probs[part]), a[part])
        for got, want in zip(ops.swiglu_backward(da[part], h[part], probs[part]), backward):
            assert torch.equal(got, want[part])


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_element_has_the_same_bits_at_any_column(dtype):
    da, h, probs = problem(3, 70, dtype, torch.float32)
    a, (dh, _, _) = ops.swiglu(h, probs), ops.swiglu_backward(da, h, probs)
    for shift in (1, 3, 17, 69):

        def rolled(tensor, shift=shift):
            return torch.cat([half.roll(shift, dims=1) for half in tensor.split(70, dim=1)], dim=1)

        assert torch.equal(ops.swiglu(rolled(h), probs), rolled(a))
        assert torch.equal(ops.swiglu_backward(rolled(da), rolled(h), probs)[0], rolled(dh))


def test_the_number_of_threads_changes_nothing():
    da, h, probs = problem(300, 259, torch.float32, torch.float32)
    results, before = [], torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            results.append((ops.swiglu(h, probs), *ops.swiglu_backward(da, h, probs)))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_cpu_capability_passes(capability):
    """The same tests once more, in a process that may use no more than ``capability``."""
    own = library.load().cpu_capability
    if CAPABILITIES.index(capability) >= CAPABILITIES.index(own):
        pytest.skip(f"this process runs on {own}: it has tested that, and cannot test more")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        "equal or extreme or same_bits",
    ]
    environment = {**os.environ, "R1_MEGATRON_CPU_CAPABILITY": capability}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout and "skipped" not in done.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(h=torch.zeros(4)), r"h must be \[\*, \*\], got \[4\] float32"),
        (dict(h=torch.zeros(4, 5)), r"h must be \[M, 2 F\], gate and up side by side, got \[4, 5\] float32"),
        (dict(h=torch.zeros(6, 4).mT), r"h \[4, 6\] float32 must be contiguous"),
        (dict(h=torch.zeros(4, 6).half()), r"float32, bfloat16 or float64 expected, got float16"),
        (dict(probs=torch.zeros(3)), r"probs must be \[4\], got \[3\] float32"),
        (dict(probs=torch.zeros(4).bfloat16()), r"or have the dtype of h \(float32\), got \[4\] bfloat16"),
        (dict(da=torch.zeros(4, 6)), r"da must be \[4, 3\], got \[4, 6\] float32"),
        (dict(da=torch.zeros(4, 3).double()), r"da must have the dtype of h \(float32\), got \[4, 3\] float64"),
    ],
)
def test_a_wrong_argument_is_named_with_its_value(arguments, message):
    good = dict(da=torch.zeros(4, 3), h=torch.zeros(4, 6), probs=torch.zeros(4))
    call = {**good, **arguments}
    with pytest.raises(RuntimeError, match="swiglu_backward: .*" + message):
        ops.swiglu_backward(**call)
    if "da" not in arguments:
        with pytest.raises(RuntimeError, match="swiglu: .*" + message):
            ops.swiglu(call["h"], call["probs"])


@pytest.mark.parametrize("dtype, probs_dtype", [(torch.float32, torch.float32), (torch.bfloat16, None)])
def test_schemas_and_fake_implementations_are_true(dtype, probs_dtype):
    da, h, probs = problem(5, 7, dtype, probs_dtype)
    torch.library.opcheck(ops.swiglu.default, (h, probs))
    torch.library.opcheck(ops.swiglu_backward.default, (da, h, probs))
