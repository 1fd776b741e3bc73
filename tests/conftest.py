"""Fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Before torch is imported anywhere: the ranks of multi-process tests share the cores with this process.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

from tests.rank_pool import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """The session's pool of worker ranks: ``ranks.run("package.module:function", world_size=4, option=1)``."""
    pool = RankPool()
    pool.start()
    yield pool
    pool.close()
