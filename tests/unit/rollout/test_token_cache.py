"""Slots of the cache: copies move a token's rows and its routing together; memory is what it says."""

from __future__ import annotations

import pytest
import torch

from r1_megatron.rollout.cache import TokenCache
from r1_megatron.rollout.scheduler import Copy

CPU = torch.device("cpu")


def filled_cache(num_experts: int = 8) -> TokenCache:
    cache = TokenCache([2, 5], 4, 6, 3, torch.float32, CPU, routing_shape=(2, 2), num_experts=num_experts)
    for layer, rows in cache.layers.items():
        rows.copy_(torch.arange(rows.numel()).view_as(rows) + 1000 * layer)
    cache.routing.copy_(torch.arange(cache.routing.numel()).view_as(cache.routing) % 200)
    return cache


def test_copy_moves_rows_and_routing() -> None:
    cache, before = filled_cache(), filled_cache()
    cache.copy([Copy(3, 0, 4), Copy(3, 1, 2), Copy(2, 1, 0)])
    for layer in (2, 5):
        assert torch.equal(cache.layers[layer][0, :4], before.layers[layer][3, :4])
        assert torch.equal(cache.layers[layer][1, :2], before.layers[layer][3, :2])
        assert torch.equal(cache.layers[layer][2:], before.layers[layer][2:])
    assert torch.equal(cache.routing[0, :4], before.routing[3, :4])
    assert torch.equal(cache.routing[2:], before.routing[2:])


def test_copy_prompt_fans_out() -> None:
    cache = filled_cache()
    cache.copy_prompt(1, [0, 3], 5)
    for slot in (0, 3):
        assert torch.equal(cache.layers[5][slot, :5], cache.layers[5][1, :5])


def test_chained_copies_are_refused() -> None:
    with pytest.raises(AssertionError):
        filled_cache().copy([Copy(0, 1, 2), Copy(1, 2, 2)])


def test_routing_is_recorded_at_slot_and_position() -> None:
    cache = filled_cache()
    cache.routing.zero_()
    rows = torch.tensor([2 * 6 + 4, 0 * 6 + 1])
    cache.record_routing(rows, first_layer=1, experts=torch.tensor([[[7, 6]], [[5, 4]]]))
    assert cache.routing[2, 4].tolist() == [[0, 0], [7, 6]]
    assert cache.routing[0, 1].tolist() == [[0, 0], [5, 4]]
    assert cache.routing.sum() == 22


def test_memory() -> None:
    assert filled_cache().num_bytes == 2 * 4 * 6 * 3 * 4 + 4 * 6 * 2 * 2
    assert filled_cache(num_experts=257).routing.dtype == torch.int16
    # DeepSeek-V3: 512 + 64 numbers a token and layer, in bfloat16 1152 bytes.
    cache = TokenCache([1], 1, 1, 576, torch.bfloat16, CPU)
    assert cache.num_bytes == 1152 and cache.routing is None
