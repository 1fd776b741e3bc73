"""The order in which pages are given out."""

from __future__ import annotations

from r1_megatron.rollout.pages import PagePool


def test_a_sequence_gets_neighbours_in_ascending_order_also_of_freed_pages():
    pool = PagePool(8)
    first, second = pool.take(3), pool.take(3)
    assert (first, second) == ([0, 1, 2], [3, 4, 5])
    pool.share([1])
    pool.release(first)  # page 1 stays with its other holder
    pool.release(second)
    assert pool.take(5) == [3, 4, 5, 0, 2]
    assert pool.peak == 6
