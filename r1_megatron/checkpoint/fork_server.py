"""The process that a conversion's workers are forked from, started before anything slow is imported."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
from multiprocessing.context import ForkServerContext

WORKER_MODULE = "r1_megatron.checkpoint.convert_workers"


def start_fork_server() -> ForkServerContext:
    """Answers the context to start workers in. The server imports torch once for all of them; it ends when we do."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([WORKER_MODULE])
    multiprocessing.forkserver.ensure_running()
    return context
