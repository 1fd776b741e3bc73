"""Host memory: of this process, and of a group of processes without counting shared pages twice."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable
from pathlib import Path

import psutil


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB, macOS bytes


def process_bytes(pid: int) -> tuple[int, str]:
    """Memory of one process and its kind: ``pss`` where the kernel tells it, else ``rss``.

    The resident set counts a page shared by N ranks N times; the proportional set counts it 1/N each, so that ranks
    add up. Raises ``psutil.Error`` or ``OSError`` when the process is gone.
    """
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024, "pss"
    except (FileNotFoundError, PermissionError):
        return psutil.Process(pid).memory_info().rss, "rss"
    return psutil.Process(pid).memory_info().rss, "rss"


def processes_bytes(pids: Iterable[int]) -> tuple[int, str]:
    """Memory of these processes with their descendants, in bytes, and its kind (``rss`` if any was counted so)."""
    total, kind = 0, "pss"
    for pid in pids:
        try:
            family = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
        except psutil.Error:
            continue  # ended since the caller looked
        for member in family:
            try:
                amount, how = process_bytes(member)
            except (psutil.Error, OSError):
                continue
            total += amount
            if how == "rss" and amount:
                kind = "rss"
    return total, kind
