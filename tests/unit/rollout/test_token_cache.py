"""Pages of the cache: copies move a token's rows and its routing together; memory is what it says."""

from __future__ import annotations

import torch

from r1_megatron.rollout.cache import TokenCache
from r1_megatron.rollout.scheduler import Copy

CPU = torch.device("cpu")
ALL = slice(None)


def filled_cache(num_experts: int = 8) -> TokenCache:
    cache = TokenCache([2, 5], 4, 6, 3, torch.float32, CPU, routing_shape=(2, 2), num_experts=num_experts)
    for layer, rows in cache.layers.items():
        rows.copy_(torch.arange(rows.numel()).view_as(rows) + 1000 * layer)
    assert cache.routing is not None
    cache.routing.copy_(torch.arange(cache.routing.numel()).view_as(cache.routing) % 200)
    return cache


def test_copy_moves_rows_and_routing() -> None:
    cache, before = filled_cache(), filled_cache()
    cache.copy([Copy(3, 0), Copy(3, 1)], ALL, ALL)
    for one, two in [*((cache.layers[n], before.layers[n]) for n in (2, 5)), (cache.routing, before.routing)]:
        assert torch.equal(one[0], two[3]) and torch.equal(one[1], two[3]) and torch.equal(one[2:], two[2:])


def test_all_pages_are_read_before_any_is_written() -> None:
    """A page that was copied and given up may be another copy's target in the same forward."""
    cache, before = filled_cache(), filled_cache()
    cache.copy([Copy(0, 1), Copy(2, 0), Copy(1, 2)], ALL, ALL)
    for one, two in [*((cache.layers[n], before.layers[n]) for n in (2, 5)), (cache.routing, before.routing)]:
        assert torch.equal(one, two[[2, 0, 1, 3]])


def test_a_chunk_copies_its_own_layers() -> None:
    cache, before = filled_cache(), filled_cache()
    cache.copy([Copy(3, 0)], slice(1, 2), slice(0, 1))
    assert torch.equal(cache.layers[2], before.layers[2])
    assert torch.equal(cache.layers[5][0], before.layers[5][3])
    assert torch.equal(cache.routing[0, :, 0], before.routing[3, :, 0])
    assert torch.equal(cache.routing[0, :, 1], before.routing[0, :, 1])


def test_routing_is_recorded_at_page_and_position() -> None:
    cache = filled_cache()
    cache.routing.zero_()
    rows = torch.tensor([2 * 6 + 4, 0 * 6 + 1])
    cache.record_routing(rows, slice(1, 2), experts=torch.tensor([[[7, 6]], [[5, 4]]]))
    assert cache.routing[2, 4].tolist() == [[0, 0], [7, 6]]
    assert cache.routing[0, 1].tolist() == [[0, 0], [5, 4]]
    assert cache.routing.sum() == 22
    told = cache.recorded_routing(torch.tensor([2, 0]), 8)
    assert told.shape == (8, 2, 2)
    assert told[4].tolist() == [[0, 0], [7, 6]] and told[7].tolist() == [[0, 0], [5, 4]] and told.sum() == 22


def test_memory() -> None:
    assert filled_cache().num_bytes == 2 * 4 * 6 * 3 * 4 + 4 * 6 * 2 * 2
    assert filled_cache(num_experts=257).routing.dtype == torch.int16
    # DeepSeek-V3: 512 + 64 numbers a token and layer, in bfloat16 1152 bytes.
    cache = TokenCache([1], 1, 1, 576, torch.bfloat16, CPU)
    assert cache.num_bytes == 1152 and cache.routing is None
    assert cache.recorded_routing(torch.tensor([0]), 1) is None
