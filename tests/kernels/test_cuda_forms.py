"""What decode steps run on CUDA in PyTorch: on the CPU against float64, and that no CUDA graph would refuse it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from r1_megatron.kernels import cuda, library, reference
from r1_megatron.kernels.ops import CPU_ONLY
from tests.kernels.test_decode import LATENTS, MIXTURES, assert_close, latent, mixture, randn

DTYPES = [torch.bfloat16, torch.float64]


@pytest.fixture(autouse=True)
def with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the library has its CUDA operators; those of the CPU stand for them."""
    found = dataclasses.replace(library.load(), with_cuda=True)
    monkeypatch.setattr(library, "load", lambda: found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", MIXTURES, ids=str)
def test_experts(sizes, dtype):
    x, gates, experts, w1, w2, first = mixture(*sizes, dtype=dtype)
    experts = torch.where(torch.arange(len(x))[:, None] % 3 == 2, -1, experts)  # rows that are padding
    got = cuda.mixture_of_experts(x, gates, experts, w1, w2, first)
    want = reference.mixture_of_experts(x.double(), gates.double(), experts, w1.double(), w2.double(), first)
    if dtype == torch.float64:  # gates are float32 there too
        want = reference.mixture_of_experts(x, gates, experts, w1, w2, first)
    assert_close(got, want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_norm(dtype, with_residual):
    x, weight = randn(7, 33, dtype=dtype), randn(33, dtype=dtype, seed=1)
    residual = randn(7, 33, dtype=dtype, seed=2) if with_residual else None
    got, summed = cuda.rms_norm(x, weight, 1e-6, residual)
    want, want_summed = reference.rms_norm(x, weight, 1e-6, residual)
    assert_close(got, want.double(), dtype)
    assert torch.equal(summed, want_summed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", LATENTS, ids=str)
def test_latent_attention(sizes, dtype):
    tensors: list[Any] = list(latent(*sizes, dtype=dtype).values())
    *given, cache, cache_rows = tensors
    up, wide, caches = given[2], [g.double() if isinstance(g, torch.Tensor) else g for g in given], {}
    for name, form, arguments in (("cuda", cuda, given), ("wide", reference, wide)):
        caches[name] = cache.nan_to_num().to(arguments[0].dtype)
        caches[name, "query"] = form.latent_query(*arguments, caches[name], cache_rows)
    assert_close(caches["cuda", "query"], caches["wide", "query"], dtype)
    assert_close(caches["cuda"], caches["wide"], dtype)
    mixed = randn(given[0].shape[0], *up.shape[::2], dtype=dtype, seed=9)
    values = sizes[-1]
    assert_close(
        cuda.latent_values(mixed, up, values), reference.latent_values(mixed.double(), up.double(), values), dtype
    )


def calls() -> dict[str, Callable[[], object]]:
    """Each step as it runs on CUDA, on tensors without values."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(*shape, device="meta", dtype=dtype)

    def form(name: str) -> Callable[..., object]:
        return getattr(cuda, name, None) or getattr(reference, name)

    def chosen() -> torch.Tensor:
        return empty(8, 4, dtype=torch.int64)

    return {
        "route_tokens": lambda: form("route_tokens")(
            empty(8, 16, dtype=torch.float32), empty(16, dtype=torch.float32), 4, 4, 2, 2.5
        ),
        "mixture_of_experts": lambda: form("mixture_of_experts")(
            empty(8, 32), empty(8, 4, dtype=torch.float32), chosen(), empty(16, 32, 32), empty(16, 32, 16), 0
        ),
        "rms_norm": lambda: form("rms_norm")(empty(8, 32), empty(32), 1e-6, empty(8, 32)),
        "latent_query": lambda: form("latent_query")(
            empty(8, 4, 24), empty(8, 40), empty(4, 32, 32), empty(32), empty(8, 4), empty(8, 4), 1e-6,
            empty(5, 64, 40), empty(8, dtype=torch.int64),
        ),
        "latent_values": lambda: form("latent_values")(empty(8, 4, 32), empty(4, 32, 32), 16),
        "linear_rows": lambda: form("linear_rows")(empty(8, 32), empty(16, 32)),
        "draw_tokens": lambda: form("draw_tokens")(empty(8, 100), empty(8, dtype=torch.int64), 0, 90, 0.7),
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(CPU_ONLY))
def test_nothing_waits_for_the_device_or_is_made_on_the_host(name):
    """A device without values refuses what needs one, a shape that depends on one, and tensors from the host."""
    calls()[name]()


def test_the_check_sees_a_wait_and_a_tensor_of_the_host():
    x = torch.empty(3, 2, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        reference.grouped_mm(x, torch.empty(2, 4, 2, device="meta"), torch.empty(2, device="meta", dtype=torch.int64))
    with pytest.raises(RuntimeError, match="meta"):
        cuda.rms_norm(x, torch.ones(2, device="meta"), 1e-6, torch.ones(3, 2))
