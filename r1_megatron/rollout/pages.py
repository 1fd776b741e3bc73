"""Pages of the cache: who holds which. Numbers on the host only; what lies in the pages is ``cache.py``'s."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class PagePool:
    """A free list and a count of holders per page. A page that nobody holds any more is free.

    ``peak`` is the largest number of pages that were held at once.
    """

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self.holders = np.zeros(num_pages, dtype=np.int32)
        self.peak = 0
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """``count`` free pages, with one holder each; neighbours in ascending order where they were left so."""
        assert count <= len(self._free), (count, len(self._free))
        taken = [self._free.pop() for _ in range(count)]
        self.holders[taken] = 1
        self.peak = max(self.peak, self.num_pages - len(self._free))
        return taken

    def share(self, pages: Sequence[int] | np.ndarray) -> None:
        """One more holder of each of these pages, which are different ones."""
        assert (self.holders[pages] > 0).all(), pages
        self.holders[pages] += 1

    def release(self, pages: Sequence[int] | np.ndarray) -> None:
        """One holder less of each of these pages, which are different ones."""
        pages = np.asarray(pages, dtype=np.int64)
        assert (self.holders[pages] > 0).all(), pages
        self.holders[pages] -= 1
        # The first of them is taken first: pages in order are read faster than others.
        self._free += pages[self.holders[pages] == 0][::-1].tolist()
