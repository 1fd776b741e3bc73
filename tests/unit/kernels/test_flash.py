"""Paged attention through other people's kernels: what they are handed, with stand-ins that have their signatures.

The stand-ins compute in float64 from nothing but their own arguments, as the libraries document them: FlashMLA at
9241ae3 and at its interface before 2026, FlashAttention's ``flash_attn_with_kvcache`` of versions 2 and 3.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from r1_megatron.kernels import decode, flash, paged_attention
from tests.kernels.test_paged_attention import Shape, problem, wanted

BF16 = torch.bfloat16
LATENT = Shape(groups=1, heads=5, key=576, value=512, value_start=0, width=576, page_size=64)
GROUPED = Shape(groups=2, heads=4, key=32, value=32, value_start=64, width=128, page_size=16)
LENGTHS = [1, 130, 64, 3]


def attend(query: Tensor, keys: Tensor, values: Tensor, page_table: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """``[B, 1, H, K]`` over ``[pages, page, G, K]`` and ``[pages, page, G, V]``: ``[B, 1, H, V]``, in float64."""
    rows = []
    for q, pages, length in zip(query, page_table.long(), lengths.tolist()):
        k, v = (past[pages].flatten(0, 1)[:length].double() for past in (keys, values))
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        weights = (torch.einsum("qhk,lhk->hql", q.double(), k) * scale).softmax(-1)
        rows.append(torch.einsum("hql,lhv->qhv", weights, v))
    return torch.stack(rows).to(query.dtype)


def check_common(query: Tensor, page_table: Tensor, lengths: Tensor, *pasts: Tensor) -> None:
    assert query.stride(-1) == 1 and query.shape[1] == 1 and query.dtype == BF16
    assert page_table.dtype == lengths.dtype == torch.int32
    assert page_table.stride(-1) == 1 and lengths.is_contiguous()
    assert page_table.shape[0] == lengths.shape[0] == query.shape[0]
    for past in pasts:
        assert past.dtype == query.dtype and past.stride(-1) == 1
        # 16 bytes are read at a time.
        assert past.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in past.stride()[:-1])


def mla_attention(q, k_cache, block_table, cache_seqlens, head_dim_v, softmax_scale) -> tuple[Tensor, Tensor]:
    assert k_cache.shape[1:] == (64, 1, 576) and head_dim_v == 512
    check_common(q, block_table, cache_seqlens, k_cache)
    out = attend(q, k_cache, k_cache[..., :512], block_table, cache_seqlens, softmax_scale)
    return out, torch.zeros(q.shape[0], q.shape[2], 1)


class FlashMLA:
    """As of 2026: the first call within a step plans."""

    def __init__(self) -> None:
        self.num_plans = 0

    def get_mla_metadata(self, *args, **kwargs) -> tuple[SimpleNamespace, None]:
        return SimpleNamespace(lengths=None), None

    def flash_mla_with_kvcache(
        self,
        q: Tensor,
        k_cache: Tensor,
        block_table: Tensor | None,
        cache_seqlens: Any,
        head_dim_v: int,
        tile_scheduler_metadata: Any,
        num_splits: None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        is_fp8_kvcache: bool = False,
        indices: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        assert num_splits is None and not causal and not is_fp8_kvcache and indices is None
        plan, now = tile_scheduler_metadata, (cache_seqlens.tolist(), q.shape[:3])
        if plan.lengths is None:
            plan.lengths = now
            self.num_plans += 1
        assert plan.lengths == now, "a plan is used for other lengths"
        return mla_attention(q, k_cache, block_table, cache_seqlens, head_dim_v, softmax_scale)


class OldFlashMLA:
    """Before 2026: planned beforehand."""

    def __init__(self) -> None:
        self.num_plans = 0

    def get_mla_metadata(self, cache_seqlens: Tensor, num_heads_per_head_k: int, num_heads_k: int):
        self.num_plans += 1
        self.heads = num_heads_per_head_k, num_heads_k
        return cache_seqlens.clone(), torch.arange(len(cache_seqlens) + 1)

    def flash_mla_with_kvcache(
        self,
        q: Tensor,
        k_cache: Tensor,
        block_table: Tensor,
        cache_seqlens: Tensor,
        head_dim_v: int,
        tile_scheduler_metadata: Tensor,
        num_splits: Tensor,
        softmax_scale: float | None = None,
        causal: bool = False,
    ) -> tuple[Tensor, Tensor]:
        assert torch.equal(tile_scheduler_metadata, cache_seqlens) and len(num_splits) == len(q) + 1
        assert self.heads == (q.shape[2], 1) and not causal
        return mla_attention(q, k_cache, block_table, cache_seqlens, head_dim_v, softmax_scale)


def flash_attn_2(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    block_table=None,
    softmax_scale: Any = None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    rotary_interleaved=True,
    alibi_slopes=None,
    num_splits=0,
    return_softmax_lse=False,
):
    assert k_cache.shape[1] % 256 == 0 and k_cache.shape == v_cache.shape
    check_common(q, block_table, cache_seqlens, k_cache, v_cache)
    return attend(q, k_cache, v_cache, block_table, cache_seqlens, softmax_scale)


def flash_attn_3(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    qv=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    page_table=None,
    cu_seqlens_q=None,
    cu_seqlens_k_new=None,
    max_seqlen_q=None,
    rotary_seqlens=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    softmax_scale: Any = None,
    causal=False,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    rotary_interleaved=True,
    scheduler_metadata=None,
    num_splits=0,
    pack_gqa=None,
    sm_margin=0,
    return_softmax_lse=False,
):
    check_common(q, page_table, cache_seqlens, k_cache, v_cache)
    return attend(q, k_cache, v_cache, page_table, cache_seqlens, softmax_scale)


FLASH_2 = SimpleNamespace(flash_attn_with_kvcache=flash_attn_2)
FLASH_3 = SimpleNamespace(flash_attn_with_kvcache=flash_attn_3)


CASES = {
    "FlashMLA": ("FlashMLA", FlashMLA, LATENT),
    "FlashMLA before 2026": ("FlashMLA", OldFlashMLA, LATENT),
    "FlashAttention 3": ("FlashAttention 3", lambda: FLASH_3, GROUPED),
    "FlashAttention 2": ("FlashAttention 2", lambda: FLASH_2, replace(GROUPED, page_size=256)),
}


@pytest.fixture
def csrc(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Calls of the operator of csrc, which is to be called by nobody else's mistake."""
    calls: list[Any] = []

    def paged(query, *_, value_width, **__):
        calls.append(query)
        return query.new_zeros(*query.shape[:2], value_width)

    monkeypatch.setattr(decode, "ops", SimpleNamespace(paged_attention=paged))
    return calls


def use(monkeypatch: pytest.MonkeyPatch, **modules: Any) -> None:
    libraries = flash.Libraries({name.replace("_", " "): module for name, module in modules.items()})
    monkeypatch.setattr(flash, "load", lambda device_type: libraries)


@pytest.mark.parametrize("case", CASES)
def test_a_library_is_handed_the_cache_as_it_lies(monkeypatch, csrc, case) -> None:
    name, make, shape = CASES[case]
    module = make()
    use(monkeypatch, **{name: module})
    p = problem(shape, LENGTHS, BF16)
    p.cache.nan_to_num_()  # what lies behind a length has to be finite for these kernels
    schedule: flash.Schedule = {}
    for _ in range(2):  # two layers of a step
        got = paged_attention(p.query, p.cache, p.page_table, p.lengths, **p.arguments, schedule=schedule)
        want = wanted(p, shape)
        assert got.shape == want.shape and got.dtype == BF16
        assert (got.double() - want).abs().max() <= 1e-2 * want.abs().max()
    assert not csrc
    if name == "FlashMLA":
        assert module.num_plans == 1
        longer = p.lengths + torch.tensor([1, 0, 0, 1], dtype=torch.int32)
        paged_attention(p.query, p.cache, p.page_table, longer, **p.arguments, schedule={})
        paged_attention(p.query, p.cache, p.page_table, p.lengths, **p.arguments)
        assert module.num_plans == 3


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        (replace(LATENT, page_size=16), BF16),
        (replace(LATENT, key=80, value=64, width=80), BF16),
        (replace(LATENT, value_start=8), BF16),
        (LATENT, torch.float32),
        (replace(GROUPED, value=16), BF16),
        (replace(GROUPED, key=12, value=12, value_start=24, width=48), BF16),  # 24 bytes a head
        (replace(GROUPED, value_start=68, width=132), BF16),  # values 8 bytes off
        (replace(GROUPED, key=264, value=264, value_start=528, width=1056), BF16),
    ],
    ids=str,
)
def test_what_they_do_not_take_is_left_to_csrc(monkeypatch, csrc, shape, dtype) -> None:
    use(monkeypatch, FlashMLA=FlashMLA(), FlashAttention_3=FLASH_3, FlashAttention_2=FLASH_2)
    p = problem(shape, LENGTHS, dtype)
    paged_attention(p.query, p.cache, p.page_table, p.lengths, **p.arguments)
    assert len(csrc) == 1


def test_pages_of_version_2_and_the_order_of_preference(monkeypatch, csrc) -> None:
    use(monkeypatch, FlashAttention_2=FLASH_2)
    assert flash.load("cuda").grouped_page == 256
    p = problem(GROUPED, LENGTHS, BF16)
    paged_attention(p.query, p.cache, p.page_table, p.lengths, **p.arguments)
    assert len(csrc) == 1  # pages of 16
    use(monkeypatch, FlashAttention_2=FLASH_2, FlashAttention_3=FLASH_3)
    assert flash.load("cuda").grouped_page is None
    paged_attention(p.query, p.cache, p.page_table, p.lengths, **p.arguments)
    assert len(csrc) == 1


@pytest.mark.parametrize(
    ("capability", "installed", "used"),
    [
        ((9, 0), {"flash_mla", "flash_attn", "flash_attn_interface"}, list(flash._MODULES)),
        ((8, 0), {"flash_mla", "flash_attn", "flash_attn_interface"}, ["FlashAttention 2"]),
        ((10, 0), {"flash_mla", "flash_attn"}, ["FlashAttention 2"]),
        ((9, 0), set(), []),
    ],
)
def test_what_is_used_is_decided_by_the_device_and_said(monkeypatch, capability, installed, used) -> None:
    def import_module(name: str):
        if name == "flash_attn":
            raise ImportError("undefined symbol: _ZN3c10\nsecond line")
        return SimpleNamespace(name=name)

    monkeypatch.delenv("R1_MEGATRON_FLASH", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(flash.importlib.util, "find_spec", lambda name: name if name in installed else None)
    monkeypatch.setattr(flash.importlib, "import_module", import_module)
    found = flash.load.__wrapped__("cuda")
    broken = {"FlashAttention 2"} & set(used)
    assert list(found.modules) == [name for name in used if name not in broken]
    assert set(found.modules) | set(found.problems) == set(flash._MODULES)
    for name in broken:
        assert found.problems[name] == "cannot be loaded: undefined symbol: _ZN3c10"
    assert not flash.load.__wrapped__("cpu").modules
    monkeypatch.setenv("R1_MEGATRON_FLASH", "off")
    off = flash.load.__wrapped__("cuda")
    assert not off.modules and set(off.problems.values()) == {"R1_MEGATRON_FLASH=off"}
