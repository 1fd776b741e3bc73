"""Fixtures of all tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

# Before torch is imported anywhere: the ranks of multi-process tests share the cores with this process.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

# A shell without job control starts background jobs (`make test &`) with Ctrl-C ignored, and children inherit that:
# tests that send it to a run of theirs would wait in vain.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from tests.rank_pool import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """The session's pool of worker ranks: ``ranks.run("package.module:function", world_size=4, option=1)``."""
    pool = RankPool()
    pool.start()
    yield pool
    pool.close()
