"""Worker processes of a conversion: units in, results out. No torch.distributed, no rank, no GPU.

A unit is independent of every other, so a worker that dies takes one unit with it, and a parent that dies is noticed at
the next report of progress. torch is imported only where a unit computes, once for all workers.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from r1_megatron.checkpoint.convert.check import CheckUnit, CheckWorker
from r1_megatron.checkpoint.convert.exporting import ExportUnit, ExportWorker
from r1_megatron.checkpoint.convert.importing import ImportUnit, ImportWorker
from r1_megatron.checkpoint.convert.journal import hold

Unit = ImportUnit | ExportUnit | CheckUnit
_ARITHMETIC = "r1_megatron.checkpoint.convert.arithmetic"
_REPORT_EVERY_S = 0.1


@dataclass(frozen=True)
class WorkerSetup:
    """What every worker has to know: the folder to write into, elements per chunk or slice and bytes per block (see the
    workers), whether any unit computes, the lock to hold while it lives."""

    folder: str
    max_elements: int
    block_bytes: int
    computes: bool
    lock: str | None = None


class WorkerError(RuntimeError):
    """A worker ended by itself: killed, or a fault of ours."""


def run_units(
    units: Sequence[tuple[str, Unit]],
    num_workers: int,
    setup: WorkerSetup,
    progress: Callable[[int], None],
) -> Iterator[tuple[str, Any]]:
    """Do all units, ``num_workers`` at a time; answers each name and result as it is finished.

    Raises:
        ValueError, OSError: what a unit met; the others are stopped.
        WorkerError: a worker died.
    """
    if not units:
        return
    if setup.computes:
        importlib.import_module(_ARITHMETIC)
    context = _context(setup)
    waiting = list(reversed(units))
    workers: dict[Connection, tuple[Any, str]] = {}
    gc.freeze()  # a collection in a forked worker would copy every page of the plan
    try:
        for _ in range(min(num_workers, len(units))):
            ours, theirs = context.Pipe()
            # A forked worker must not hold our ends of the pipes: then nobody would notice that we are gone.
            inherited = [*workers, ours] if context.get_start_method() == "fork" else []
            process = context.Process(target=_work, args=(theirs, setup, inherited), daemon=True)
            process.start()
            theirs.close()
            workers[ours] = (process, _give(ours, waiting))
        gc.unfreeze()
        while workers:
            for connection in wait(list(workers)):
                assert isinstance(connection, Connection)
                process, name = workers[connection]
                kind, value = _receive(connection, process, name)
                if kind == "progress":
                    progress(value)
                elif kind == "error":
                    raise value
                else:
                    yield name, value
                    if waiting:
                        workers[connection] = (process, _give(connection, waiting))
                    else:
                        connection.close()
                        process.join()
                        del workers[connection]
    finally:
        for connection, (process, _) in workers.items():
            connection.close()
            process.terminate()
        for process, _ in workers.values():
            process.join()


def _context(setup: WorkerSetup) -> Any:
    """How workers come to be: a process without other threads is forked, which costs nothing; else a server is."""
    tasks = Path("/proc/self/task")
    if tasks.is_dir() and len(list(tasks.iterdir())) == 1:
        return multiprocessing.get_context("fork")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *([_ARITHMETIC] if setup.computes else [])])
    return context


def _give(connection: Connection, waiting: list[tuple[str, Unit]]) -> str:
    name, unit = waiting.pop()
    with contextlib.suppress(BrokenPipeError):  # it died; that is told when its result is waited for
        connection.send(unit)
    return name


def _receive(connection: Connection, process: Any, name: str) -> tuple[str, Any]:
    try:
        return connection.recv()
    except (EOFError, ConnectionResetError):
        process.join()
        raise WorkerError(
            f"the worker that did {name} died (exit code {process.exitcode}; -9 is a kill, often for want of memory: "
            "then give fewer workers or a smaller --max-memory). What is finished is kept: run the same command again."
        ) from None


# -------------------------------------------------------------------------------------------------------- in a worker


def _work(connection: Connection, setup: WorkerSetup, inherited: list[Connection]) -> None:
    for other in inherited:
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    if setup.computes:
        import torch

        torch.set_num_threads(1)
    if setup.lock is not None:
        hold(setup.lock)
    report = _Report(connection)
    workers = {
        ImportUnit: ImportWorker(setup.folder, setup.max_elements, setup.block_bytes, report),
        ExportUnit: ExportWorker(setup.max_elements, setup.block_bytes, report),
        CheckUnit: CheckWorker(report),
    }
    try:
        while True:
            unit = connection.recv()
            try:
                result = ("result", workers[type(unit)].run(unit))
            except (ValueError, OSError) as error:
                result = ("error", error)
            except Exception:
                result = ("error", WorkerError("a worker failed:\n" + traceback.format_exc()))
            report.flush()
            connection.send(result)
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone, or has no more to do
        os._exit(0)


class _Report:
    """Sends the bytes that were done, a few times a second. Raises BrokenPipeError when the parent is gone."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._bytes, self._sent = connection, 0, time.monotonic()

    def __call__(self, num_bytes: int) -> None:
        self._bytes += num_bytes
        if time.monotonic() - self._sent > _REPORT_EVERY_S:
            self.flush()

    def flush(self) -> None:
        self._connection.send(("progress", self._bytes))
        self._bytes, self._sent = 0, time.monotonic()
