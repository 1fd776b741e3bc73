"""Paged attention through the libraries that are the fastest at it, where they are installed and take the case.

* **FlashMLA** (github.com/deepseek-ai/FlashMLA): latent attention of DeepSeek-V3's widths, keys 576 and values 512, in
  bfloat16 on pages of 64 positions. Its dense decode kernel is for Hopper (sm_90) alone.
* **FlashAttention 3** (github.com/Dao-AILab/flash-attention, ``hopper/``): grouped attention on Hopper, any page size.
* **FlashAttention 2** (the same repository): grouped attention on Ampere and newer, pages of a multiple of 256.

Elsewhere the operator of ``csrc/`` runs. ``R1_MEGATRON_FLASH=off`` in the environment leaves all three out. All of them
read the cache as it lies: keys and values are strided views of its rows.

Two things differ from the operator of ``csrc/``. These kernels cut a long past into pieces by what the whole batch
needs, so a row's last bits depend on its neighbours. And what lies behind a row's length in its last page is multiplied
by zero instead of not being read: it has to be finite, which the cache sees to (it begins as zeros, and is given up
with whatever is not finite).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

LATENT_KEY, LATENT_VALUE, LATENT_PAGE = 576, 512, 64
FLASH_ATTENTION_2_PAGE = 256  # pages hold a multiple of it
_WIDEST_HEAD, _ALIGNMENT = 256, 8  # numbers of a head; numbers of bfloat16 in 16 bytes

# By name: the module that has the calls, and the compute capabilities it is used on, from and below.
_MODULES = {
    "FlashMLA": ("flash_mla", (9, 0), (10, 0)),
    "FlashAttention 3": ("flash_attn_interface", (9, 0), (10, 0)),
    "FlashAttention 2": ("flash_attn", (8, 0), (13, 0)),
}


@dataclass(frozen=True)
class Libraries:
    """The modules that are used, by name, and for the others why not."""

    modules: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    problems: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def grouped_page(self) -> int | None:
        """The page size that grouped attention asks for; ``None``: any."""
        only_2 = "FlashAttention 2" in self.modules and "FlashAttention 3" not in self.modules
        return FLASH_ATTENTION_2_PAGE if only_2 else None


@functools.cache
def load(device_type: str) -> Libraries:
    """What is used on this kind of device, decided once. Never raises."""
    modules: dict[str, Any] = {}
    problems: dict[str, str] = {}
    for name, (module, least, below) in _MODULES.items():
        if problem := _why_not(module, least, below, device_type):
            problems[name] = problem
            continue
        try:
            modules[name] = importlib.import_module(module)
        except (ImportError, OSError, RuntimeError) as error:  # built against another torch or CUDA
            problems[name] = f"cannot be loaded: {next(iter(str(error).splitlines()), type(error).__name__)}"
    return Libraries(modules, problems)


def _why_not(module: str, least: tuple[int, int], below: tuple[int, int], device_type: str) -> str:
    if os.environ.get("R1_MEGATRON_FLASH") == "off":
        return "R1_MEGATRON_FLASH=off"
    if device_type != "cuda" or not torch.cuda.is_available():
        return "for GPUs only"
    if importlib.util.find_spec(module) is None:
        return "not installed"
    capability = torch.cuda.get_device_capability()
    if not least <= capability < below:
        return "not for sm_{}{}".format(*capability)
    return ""


# What works out from lengths alone how to share the work is kept here for a step's other layers.
Schedule = dict[Any, Any]
# (query [D, H, K], cache, page table, lengths, scale, schedule) -> [D, H, V]
Attention = Callable[[Tensor, Tensor, Tensor, Tensor, float, Schedule], Tensor]


def choose(
    libraries: Libraries, query: Tensor, cache: Tensor, num_groups: int, value_start: int, value_width: int
) -> Attention | None:
    """Who computes `paged_attention` of these arguments; ``None``: the operator of ``csrc/``."""
    if not libraries.modules or query.dtype != torch.bfloat16 or not len(query):
        return None
    key_width, (_, page_size, width) = query.shape[2], cache.shape
    flash_mla = libraries.modules.get("FlashMLA")
    if num_groups == 1 and (key_width, value_width, value_start) == (LATENT_KEY, LATENT_VALUE, 0):
        takes = flash_mla is not None and width == LATENT_KEY and page_size == LATENT_PAGE
        return functools.partial(_flash_mla, flash_mla) if takes else None
    aligned = all(number % _ALIGNMENT == 0 for number in (key_width, value_start, width))
    if key_width != value_width or key_width > _WIDEST_HEAD or not aligned:
        return None
    heads = functools.partial(_keys_and_values, groups=num_groups, width=key_width, value_start=value_start)
    if module := libraries.modules.get("FlashAttention 3"):
        return functools.partial(_flash_attention, module.flash_attn_with_kvcache, "page_table", heads)
    if (module := libraries.modules.get("FlashAttention 2")) and page_size % FLASH_ATTENTION_2_PAGE == 0:
        return functools.partial(_flash_attention, module.flash_attn_with_kvcache, "block_table", heads)
    return None


def _flash_mla(
    module: Any, query: Tensor, cache: Tensor, page_table: Tensor, lengths: Tensor, scale: float, schedule: Schedule
) -> Tensor:
    """Versions before 2026 plan in the first call, later ones in the first use of what it answers: both are served."""
    heads = query.shape[1]
    key = ("FlashMLA", len(query), heads)
    if key not in schedule:
        schedule[key] = module.get_mla_metadata(lengths, heads, 1)
    out, _ = module.flash_mla_with_kvcache(
        query[:, None],  # [batch, tokens of each, heads, 576]
        cache[:, :, None],  # [pages, 64, 1, 576]
        page_table,
        lengths,
        LATENT_VALUE,
        *schedule[key],
        softmax_scale=scale,
        causal=False,
    )
    return out[:, 0]


def _flash_attention(
    call: Callable[..., Any],
    name_of_table: str,
    heads: Callable[[Tensor], tuple[Tensor, Tensor]],
    query: Tensor,
    cache: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    scale: float,
    schedule: Schedule,
) -> Tensor:
    keys, values = heads(cache)
    out = call(
        query[:, None],
        keys,
        values,
        cache_seqlens=lengths,
        softmax_scale=scale,
        causal=False,
        **{name_of_table: page_table},
    )
    return out[:, 0]


def _keys_and_values(cache: Tensor, groups: int, width: int, value_start: int) -> tuple[Tensor, Tensor]:
    """Views ``[pages, page_size, G, C]`` of the two parts of the cache's rows."""
    keys, values = cache[..., : groups * width], cache[..., value_start : value_start + groups * width]
    return keys.unflatten(-1, (groups, width)), values.unflatten(-1, (groups, width))
