"""The steps of decoding around attention: against what training computes, the plain form in float64, their own bits."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from r1_megatron.kernels import library, mixture_of_experts, reference, route_tokens
from r1_megatron.kernels.experts import grouped_swiglu_experts
from r1_megatron.kernels.ops import ops

# The largest error, relative to the largest value of the result.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float64: 1e-13}
DTYPES = list(TOLERANCE)
needs_csrc = pytest.mark.skipif(not library.load().loaded, reason=f"csrc is not loaded: {library.load().problem}")


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def assert_close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype and got.shape == want.shape
    if want.numel():
        error = (got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-30)
        assert error <= TOLERANCE[dtype], f"relative error {error:.2e}"


# ---------------------------------------------------------------------------------------------------------------------
# Routing.
# ---------------------------------------------------------------------------------------------------------------------

# Experts, chosen, groups, chosen groups: the benchmark's model, DeepSeek-V3, no groups, one expert, odd sizes.
ROUTERS = [(16, 4, 4, 2), (256, 8, 8, 4), (64, 6, 1, 1), (8, 1, 2, 1), (21, 5, 7, 3), (3, 3, 3, 3)]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("num_experts, topk, num_groups, group_topk", ROUTERS)
def test_routing_is_that_of_training(num_experts, topk, num_groups, group_topk, with_bias):
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    from r1_megatron.model.routing import RouterReplay

    logits = randn(200, num_experts, scale=2)
    bias = randn(num_experts, seed=1, scale=0.2) if with_bias else None
    gates, experts = route_tokens(
        logits, bias, topk, num_groups=num_groups, group_topk=group_topk, scaling=2.5 if topk > 1 else 1.0
    )
    replay = RouterReplay()
    replay.record = True
    dense, _ = topk_routing_with_score_function(
        logits, topk, num_groups=num_groups, group_topk=group_topk, scaling_factor=2.5 if topk > 1 else None,
        score_function="sigmoid", expert_bias=bias, router_replay=replay,
    )  # fmt: skip
    assert torch.equal(experts, replay.recorded)
    want = dense.gather(1, experts)
    if topk == 1:  # PackedRouter normalises a single gate, see model/routing.py
        want = want / (want + 1e-20)
    if topk <= 4:  # more may be summed in another order
        assert torch.equal(gates, want)
    torch.testing.assert_close(gates, want, rtol=3e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_equal_experts_and_groups_the_first_are_chosen(dtype):
    logits = torch.zeros(3, 12, dtype=dtype)
    logits[1, 7] = 1
    logits[2, 3:] = 1
    for route in (ops.route_tokens, reference.route_tokens):
        gates, experts = route(logits.sigmoid(), None, 3, 4, 2, 1.0)
        assert experts.tolist() == [[0, 1, 2], [7, 0, 1], [3, 4, 5]]
        assert_close(gates.sum(1), torch.ones(3, dtype=dtype), dtype)


@needs_csrc
@pytest.mark.parametrize("router", ROUTERS)
def test_routing_equals_the_plain_form(router):
    num_experts, topk, num_groups, group_topk = router
    scores, bias = (
        randn(50, num_experts, dtype=torch.float64).sigmoid(),
        randn(num_experts, dtype=torch.float64, seed=1),
    )
    # Few values: many are equal.
    scores, bias = (scores * 8).round() / 8, bias.round() / 8
    for given in (bias, None):
        got = ops.route_tokens(scores, given, topk, num_groups, group_topk, 1.5)
        want = reference.route_tokens(scores, given, topk, num_groups, group_topk, 1.5)
        assert torch.equal(got[1], want[1])
        assert_close(got[0], want[0], torch.float64)


def test_a_row_of_nan_has_nan_gates():
    logits = randn(3, 16)
    logits[1] = torch.nan
    gates, experts = route_tokens(logits, torch.zeros(16), 4, num_groups=4, group_topk=2)
    assert gates[1].isnan().all() and gates[[0, 2]].isfinite().all()
    assert ((experts >= 0) & (experts < 16)).all()


# ---------------------------------------------------------------------------------------------------------------------
# Experts.
# ---------------------------------------------------------------------------------------------------------------------

# Tokens, chosen, hidden, width, experts in all, first one here, how many are here.
MIXTURES = [
    (64, 4, 256, 128, 16, 0, 16),
    (64, 4, 256, 128, 16, 8, 8),
    (1, 8, 64, 32, 32, 0, 32),
    (150, 2, 33, 21, 3, 0, 3),
    (7, 1, 5, 1, 4, 2, 1),
    (0, 2, 16, 16, 4, 0, 4),
]


def mixture(tokens, topk, hidden, width, num_experts, first, here, dtype):
    x = randn(tokens, hidden, dtype=dtype)
    experts = randn(tokens, num_experts, seed=1).topk(topk).indices
    gates = randn(tokens, topk, seed=2).sigmoid()
    w1 = randn(num_experts, 2 * width, hidden, dtype=dtype, seed=3, scale=hidden**-0.5)
    w2 = randn(num_experts, hidden, width, dtype=dtype, seed=4, scale=width**-0.5)
    # Weights of another rank's experts are not here.
    return x, gates, experts, w1[first : first + here].clone(), w2[first : first + here].clone(), first


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", MIXTURES, ids=str)
def test_experts_equal_float64(sizes, dtype):
    x, gates, experts, w1, w2, first = mixture(*sizes, dtype)
    if len(experts) > 5:
        experts[5] = -1
    want = torch.zeros(x.shape, dtype=torch.float64)
    for token, (own_gates, own_experts) in enumerate(zip(gates.double(), experts.tolist())):
        for gate, expert in zip(own_gates, own_experts):
            if first <= expert < first + len(w1):
                h_gate, h_up = (w1[expert - first].double() @ x[token].double()).chunk(2)
                want[token] += w2[expert - first].double() @ (F.silu(h_gate) * h_up * gate)
    assert_close(mixture_of_experts(x, gates, experts, w1, w2, first), want, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_are_those_of_training(dtype):
    x, gates, experts, w1, w2, _ = mixture(*MIXTURES[0], dtype)
    order = experts.flatten().argsort(stable=True)
    offsets = experts.flatten().bincount(minlength=16).cumsum(0)
    with torch.no_grad():
        parts = grouped_swiglu_experts(x[order // 4], gates.flatten()[order], w1, w2, offsets)
    want = torch.zeros(x.shape, dtype=torch.float64).index_add_(0, order // 4, parts.double())
    assert_close(mixture_of_experts(x, gates, experts, w1, w2, 0), want, dtype)


@needs_csrc
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [MIXTURES[0], MIXTURES[3]], ids=str)
def test_a_token_meets_its_experts_with_the_same_bits_in_any_company(sizes, dtype):
    x, gates, experts, w1, w2, first = mixture(*sizes, dtype)
    whole = mixture_of_experts(x, gates, experts, w1, w2, first)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(5))
    assert torch.equal(mixture_of_experts(x[order], gates[order], experts[order], w1, w2, first), whole[order])
    for part in (slice(0, 1), slice(3, 9), slice(40, 64)):
        assert torch.equal(mixture_of_experts(x[part], gates[part], experts[part], w1, w2, first), whole[part])


# ---------------------------------------------------------------------------------------------------------------------
# All of them.
# ---------------------------------------------------------------------------------------------------------------------


def test_a_call_that_would_record_a_gradient_raises():
    x, gates, experts, w1, w2, first = mixture(*MIXTURES[0], torch.float32)
    w1.requires_grad_()
    with pytest.raises(RuntimeError, match=r"mixture_of_experts has no gradient: call it within torch\.no_grad"):
        mixture_of_experts(x, gates, experts, w1, w2, first)
    logits = randn(3, 8).requires_grad_()
    with pytest.raises(RuntimeError, match=r"route_tokens has no gradient"):
        route_tokens(logits, None, 2)
    with torch.no_grad():
        assert not mixture_of_experts(x, gates, experts, w1, w2, first).requires_grad


@needs_csrc
def test_the_number_of_threads_changes_nothing():
    def all_of_them() -> list[Tensor]:
        gates, chosen = ops.route_tokens(randn(3000, 16).sigmoid(), None, 4, 4, 2, 1.0)
        return [mixture_of_experts(*mixture(*MIXTURES[0], torch.float32)), gates, chosen]

    results, before = [], torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            results.append(all_of_them())
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@needs_csrc
@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: route_tokens(torch.zeros(2, 8).bfloat16(), None, 2), r"route_tokens: scores must be float32 or float64"),
        (lambda: route_tokens(torch.zeros(2, 8), torch.zeros(7), 2), r"route_tokens: bias must be \[8\], got \[7\]"),
        (lambda: route_tokens(torch.zeros(2, 8), None, 2, num_groups=3), r"num_groups must divide the 8 experts, got 3"),
        (lambda: route_tokens(torch.zeros(2, 8), None, 5, num_groups=4, group_topk=2), r"topk must be in \[1, 4\].* got 5"),
        (lambda: route_tokens(torch.zeros(2, 8), None, 2, num_groups=8, group_topk=4), r"groups of at least 2 experts"),
        (lambda: experts_with(gates=torch.zeros(2, 3)), r"mixture_of_experts: experts must be \[2, 3\], got \[2, 2\] int64"),
        (lambda: experts_with(gates=torch.zeros(2, 2).double()), r"gates must be float32, got \[2, 2\] float64"),
        (lambda: experts_with(w1=torch.zeros(3, 9, 4)), r"w1 must be \[3, 10, 4\], got \[3, 9, 4\]"),
        (lambda: experts_with(w2=torch.zeros(3, 4, 5).double()), r"must have the dtype of x \(float32\), got .* float64"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_named_with_its_value(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


def experts_with(**changed: Tensor) -> Tensor:
    good = dict(
        x=torch.zeros(2, 4), gates=torch.zeros(2, 2), experts=torch.zeros(2, 2, dtype=torch.int64),
        w1=torch.zeros(3, 10, 4), w2=torch.zeros(3, 4, 5),
    )  # fmt: skip
    return ops.mixture_of_experts(**(good | changed), first_expert=0)


def test_schemas_and_fake_implementations_are_true():
    torch.library.opcheck(ops.route_tokens.default, (randn(5, 8).sigmoid(), torch.zeros(8), 2, 4, 2, 1.0))
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(ops.mixture_of_experts.default, mixture(*MIXTURES[3], dtype))


@needs_csrc
@pytest.mark.parametrize("capability", library.CPU_CAPABILITIES)
def test_every_cpu_capability_passes(capability):
    """The same tests once more, in a process that may use no more than ``capability``."""
    own = library.load().cpu_capability
    if library.CPU_CAPABILITIES.index(capability) >= library.CPU_CAPABILITIES.index(own):
        pytest.skip(f"this process runs on {own}: it has tested that, and cannot test more")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__, "-k", "equal or same_bits"]
    environment = {**os.environ, "R1_MEGATRON_CPU_CAPABILITY": capability}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
