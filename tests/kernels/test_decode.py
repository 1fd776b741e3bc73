"""The steps of decoding around attention: against what training computes, the plain form in float64, their own bits."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
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
    reference,
    rms_norm,
    route_tokens,
)
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
# Norm.
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, width", [(64, 256), (3, 7), (1, 1), (5, 33), (0, 16)])
def test_norm_equals_float64(rows, width, dtype):
    x, residual, weight = (randn(*s, dtype=dtype, seed=i) for i, s in enumerate([(rows, width)] * 2 + [(width,)]))
    normed, summed = rms_norm(x, weight, 1e-6, residual)
    assert torch.equal(summed, x + residual)
    assert_close(normed, F.rms_norm(summed.double(), (width,), weight.double(), 1e-6), dtype)
    # A slice of columns, as a projection for two leaves it.
    wide = randn(rows, width + 3, dtype=dtype)
    normed, same = rms_norm(wide[:, 2 : 2 + width], weight, 1e-6)
    assert same.data_ptr() == wide[:, 2:].data_ptr()
    assert_close(normed, F.rms_norm(wide[:, 2 : 2 + width].double(), (width,), weight.double(), 1e-6), dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Linear layer.
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, columns, depth", [(64, 96, 256), (130, 33, 70), (1, 1, 1), (3, 17, 5), (0, 8, 8)])
def test_linear_equals_float64_and_rows_have_the_same_bits_in_any_company(rows, columns, depth, dtype):
    x, weight = randn(rows, depth + 3, dtype=dtype)[:, 2 : 2 + depth], randn(columns, depth, dtype=dtype, seed=1)
    whole = linear_rows(x, weight)
    assert_close(whole, x.double() @ weight.double().T, dtype)
    if library.load().loaded:
        for part in (slice(0, 1), slice(rows // 3, rows), slice(rows // 2, rows // 2 + 3)):
            assert torch.equal(linear_rows(x[part], weight), whole[part])


# ---------------------------------------------------------------------------------------------------------------------
# Latent attention.
# ---------------------------------------------------------------------------------------------------------------------

# Tokens, heads, N, P, R, V: the benchmark's model, DeepSeek-V3, odd sizes.
LATENTS = [(64, 8, 32, 16, 64, 32), (5, 16, 128, 64, 512, 128), (7, 3, 5, 2, 37, 9), (1, 1, 1, 6, 1, 1)]


def latent(tokens, heads, nope, rope, rank, values, dtype):
    angles = torch.arange(tokens, dtype=torch.float64)[:, None] * torch.linspace(1, 0.1, rope // 2)
    wide = randn(tokens, rank + rope + 5, dtype=dtype, seed=1)
    return dict(
        query_THK=randn(tokens, heads, nope + rope, dtype=dtype),
        latent_TW=wide[:, 5:],
        up_HAR=randn(heads, nope + values, rank, dtype=dtype, seed=2, scale=rank**-0.5),
        norm_weight_R=randn(rank, dtype=dtype, seed=3),
        cos_TP=angles.cos().to(dtype),
        sin_TP=angles.sin().to(dtype),
        eps=1e-6,
        cache=torch.full((tokens + 2, 4, rank + rope), torch.nan, dtype=dtype),
        cache_rows=torch.arange(3, 3 + 2 * tokens, 2)[: max(tokens - 1, 1)],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", LATENTS, ids=str)
def test_latent_query_and_cache_equal_float64(sizes, dtype):
    from r1_megatron.model.latent_attention import rotate

    _, _, nope, _, rank, _ = sizes
    given = latent(*sizes, dtype)
    got = latent_query(**given)
    exact = {name: t.double() for name, t in given.items() if isinstance(t, Tensor)}
    cos, sin = exact["cos_TP"][:, None], exact["sin_TP"][:, None]
    query, up = exact["query_THK"], exact["up_HAR"]
    absorbed = torch.stack([query[:, h, :nope] @ up[h, :nope] for h in range(len(up))], 1)
    assert_close(got, torch.cat([absorbed, rotate(query[..., nope:], cos, sin)], -1), dtype)
    normed = F.rms_norm(exact["latent_TW"][:, :rank], (rank,), exact["norm_weight_R"], 1e-6)
    kept = torch.cat([normed, rotate(exact["latent_TW"][:, None, rank:], cos, sin)[:, 0]], -1)
    cache, rows = given["cache"].flatten(0, 1), given["cache_rows"]
    assert_close(cache[rows], kept[: len(rows)], dtype)
    others = torch.ones(len(cache), dtype=torch.bool)
    others[rows] = False
    assert cache[others].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", LATENTS, ids=str)
def test_latent_values_equal_float64(sizes, dtype):
    tokens, heads, _, _, rank, values = sizes
    mixed, up = randn(tokens, heads, rank, dtype=dtype), latent(*sizes, dtype)["up_HAR"]
    want = torch.stack([mixed[:, h].double() @ up[h, -values:].double().T for h in range(heads)], 1).flatten(1)
    assert_close(latent_values(mixed, up, values), want, dtype)


@needs_csrc
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_and_latent_rows_have_the_same_bits_in_any_company(dtype):
    given = latent(*LATENTS[0], dtype)
    by_row = ("query_THK", "latent_TW", "cos_TP", "sin_TP")
    given["cache_rows"] = torch.arange(64)
    whole, cache = latent_query(**given), given["cache"].flatten(0, 1)[:64].clone()
    mixed, x, weight = randn(64, 8, 64, dtype=dtype), randn(64, 77, dtype=dtype), randn(77, dtype=dtype)
    values, (normed, _) = latent_values(mixed, given["up_HAR"], 32), rms_norm(x, weight, 1e-6)
    for rows in (
        torch.randperm(64, generator=torch.Generator().manual_seed(0)),
        torch.arange(3, 8),
        torch.tensor([63]),
    ):
        part = given | {name: given[name][rows] for name in by_row} | {"cache_rows": rows}
        assert torch.equal(latent_query(**part), whole[rows])
        assert torch.equal(given["cache"].flatten(0, 1)[:64], cache)
        assert torch.equal(latent_values(mixed[rows], given["up_HAR"], 32), values[rows])
        assert torch.equal(rms_norm(x[rows], weight, 1e-6)[0], normed[rows])


# ---------------------------------------------------------------------------------------------------------------------
# Drawing.
# ---------------------------------------------------------------------------------------------------------------------


def keys(rows: int) -> Tensor:
    from r1_megatron.rollout.sampler import position_keys, request_key

    request = torch.tensor([request_key(1, i) for i in range(rows)])
    return position_keys(request, torch.arange(rows))


def sampler_scores(logits: Tensor, keys_B: Tensor, vocab_start: int, temperature: float) -> Tensor:
    """The scores of ``rollout/sampler.py``; its hash, but the noise in float64."""
    from r1_megatron.rollout.sampler import uniform_bits

    z = logits.float() / temperature
    bits = uniform_bits(keys_B, torch.arange(vocab_start, vocab_start + logits.shape[1]))
    uniform = ((bits.to(torch.int64) & 0xFFFFFFFF).float() + 0.5) * 2.0**-32
    return z.double() - (-(-uniform.clamp(max=1 - 2.0**-24).double()).log1p()).log()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("rows, columns, start, vocab", [(64, 1024, 0, 1024), (9, 1000, 1000, 1990), (300, 5, 0, 3)])
def test_the_draw_is_the_samplers(rows, columns, start, vocab, temperature, dtype):
    logits = randn(rows, columns, dtype=dtype, scale=3)
    got = draw_tokens(logits, keys(rows), start, vocab, temperature)
    assert got.dtype == torch.float64
    real = min(vocab - start, columns)
    scores = sampler_scores(logits[:, :real], keys(rows), start, temperature)
    z = logits[:, :real].float() / temperature
    winner = got[:, 1].long() - start
    assert ((winner >= 0) & (winner < real)).all()
    chosen = scores.gather(1, winner[:, None])[:, 0]
    # Nobody is better, up to float32's rounding of sums of this size; the score is the noise of that very column.
    assert (chosen >= scores.amax(1) - 4e-6).all()
    assert ((got[:, 0] - chosen).abs() <= 4e-6).all()
    assert torch.equal(got[:, 2], z.gather(1, winner[:, None])[:, 0].double())
    assert torch.equal(got[:, 3], z.amax(1).double())
    torch.testing.assert_close(got[:, 4], (z.double() - got[:, 3:4]).exp().sum(1), rtol=3e-6, atol=0)


@needs_csrc
def test_the_noise_of_every_size_equals_float64():
    """One column a row: a logit of zero leaves the noise. Small uniforms, which make large noise, included."""
    rows = 200_000
    any_keys = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=torch.Generator().manual_seed(0))
    got = draw_tokens(torch.zeros(rows, 1), any_keys, 17, 18, 1.0)[:, 0]
    want = sampler_scores(torch.zeros(rows, 1), any_keys, 17, 1.0)[:, 0]
    assert want.max() > 10 and want.min() < -2.3
    assert ((got - want).abs() <= 2.4e-7 * want.abs().clamp(min=1)).all()


def test_greedy_draws_the_first_of_the_largest_logits():
    logits = randn(6, 40).round()
    got = draw_tokens(logits, keys(6), 100, 200, 0.0)
    first = [row.tolist().index(row.max()) for row in logits]
    assert got[:, 1].tolist() == [100 + i for i in first]
    assert torch.equal(got[:, 0], logits.amax(1).double()) and torch.equal(got[:, 2], got[:, 0])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_draws_from_what_is_not_finite(temperature):
    logits = randn(4, 20)
    logits[0, 3:] = -torch.inf
    logits[1, 7] = torch.nan
    logits[2, 7] = torch.inf
    got = draw_tokens(logits, keys(4), 0, 20, temperature)
    assert got[0].isfinite().all() and got[0, 1] < 3
    assert got[1:3, 4].isnan().all()
    assert (
        draw_tokens(logits, keys(4), 40, 30, temperature).tolist() == [[-torch.inf, 40, -torch.inf, -torch.inf, 0]] * 4
    )


@needs_csrc
def test_a_draw_has_the_same_bits_in_any_company():
    logits, own = randn(40, 1003), keys(40)
    whole = draw_tokens(logits, own, 0, 1003, 0.8)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw_tokens(logits[order], own[order], 0, 1003, 0.8), whole[order])
    assert torch.equal(draw_tokens(logits[7:9], own[7:9], 0, 1003, 0.8), whole[7:9])


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
        given = latent(200, *LATENTS[0][1:], torch.float32)
        return [
            mixture_of_experts(*mixture(*MIXTURES[0], torch.float32)), gates, chosen,
            rms_norm(randn(500, 256), randn(256), 1e-6)[0], latent_query(**given), given["cache"].nan_to_num(),
            latent_values(randn(200, 8, 64), given["up_HAR"], 32), linear_rows(randn(99, 256), randn(70, 256)),
            draw_tokens(randn(40, 999), keys(40), 0, 999, 1.0),
        ]  # fmt: skip

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
        (lambda: route_tokens(torch.zeros(2, 8).bfloat16(), None, 2), r"scores must be float32 or float64, got"),
        (lambda: route_tokens(torch.zeros(2, 8), torch.zeros(7), 2), r"route_tokens: bias must be \[8\], got \[7\]"),
        (lambda: route_tokens(torch.zeros(2, 8), None, 2, num_groups=3), r"must divide the 8 experts, got 3"),
        (lambda: route_tokens(torch.zeros(2, 8), None, 5, num_groups=4, group_topk=2), r"in \[1, 4\].* got 5"),
        (lambda: route_tokens(torch.zeros(2, 8), None, 2, num_groups=8, group_topk=4), r"groups of at least 2 experts"),
        (lambda: experts_with(gates=torch.zeros(2, 3)), r"_experts: experts must be \[2, 3\], got \[2, 2\] int64"),
        (lambda: experts_with(gates=torch.zeros(2, 2).double()), r"gates must be float32, got \[2, 2\] float64"),
        (lambda: experts_with(w1=torch.zeros(3, 9, 4)), r"w1 must be \[3, 10, 4\], got \[3, 9, 4\]"),
        (lambda: experts_with(w2=torch.zeros(3, 4, 5).double()), r"have the dtype of x \(float32\), got .* float64"),
        (lambda: rms_norm(torch.zeros(4, 3).mT, torch.zeros(4), 1e-6), r"the rows of x .* must be contiguous"),
        (lambda: rms_norm(torch.zeros(4, 3), torch.zeros(3).double(), 1e-6), r"dtype of x \(float32\), got \[3\]"),
        (lambda: linear_rows(torch.zeros(2, 3), torch.zeros(4, 5)), r"weight must be \[\*, 3\], got \[4, 5\] float32"),
        (lambda: latent_with(cos_TP=torch.zeros(7, 4)), r"query must be .* P = 8 rotary .* got \[7, 3, 7\]"),
        (lambda: latent_with(cache_rows=torch.tensor([0, 36])), r"cache_rows\[1\] = 36, but the cache has 36 rows"),
        (lambda: latent_with(cache_rows=torch.arange(8)), r"must be at most the 7 rows of query, got \[8\]"),
        (lambda: latent_values(torch.zeros(2, 3, 4), torch.zeros(3, 5, 4), 6), r"must be in \[1, 5\].* got 6"),
        (lambda: draw_tokens(torch.zeros(2, 3), torch.zeros(2), 0, 3, 1.0), r"keys must be int64, got \[2\] float32"),
        (lambda: draw_tokens(torch.zeros(2, 3), keys(2), 0, 3, -1.0), r"must be a finite number >= 0, got -1"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_named_with_its_value(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


def latent_with(**changed: Tensor) -> Tensor:
    return latent_query(**(latent(*LATENTS[2], torch.float32) | changed))


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
        x, weight = randn(3, 7, dtype=dtype), randn(7, dtype=dtype)
        torch.library.opcheck(ops.linear_rows.default, (x, randn(5, 7, dtype=dtype)))
        torch.library.opcheck(ops.rms_norm.default, (x, weight, 1e-6, None))
        torch.library.opcheck(ops.rms_norm.default, (x, weight, 1e-6, x))
        given = latent(*LATENTS[2], dtype)
        given["cache"].zero_()
        torch.library.opcheck(ops.latent_query.default, tuple(given.values()))
        torch.library.opcheck(ops.latent_values.default, (randn(7, 3, 37, dtype=dtype), given["up_HAR"], 9))
        torch.library.opcheck(ops.draw_tokens.default, (x, keys(3), 0, 6, 0.5))


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
