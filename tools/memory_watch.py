"""Peak memory of a process and all below it, while it runs."""

from __future__ import annotations

import threading
import time

import psutil

from r1_megatron.telemetry.memory import processes_bytes


class MemoryWatch(threading.Thread):
    """Samples the sum of their proportional set sizes (Linux's PSS, which counts shared pages once).

    Args:
        process: its id.
        every_s: seconds between two samples. A sample walks page tables, some milliseconds a process: where time is
            measured too, take few.

    ``peak`` is the largest sum so far, in bytes.
    """

    def __init__(self, process: int, every_s: float = 0.02) -> None:
        super().__init__(daemon=True)
        self._process, self._every_s, self.peak = psutil.Process(process), every_s, 0

    def run(self) -> None:
        while self._process.is_running() and self._process.status() != psutil.STATUS_ZOMBIE:
            self.peak = max(self.peak, processes_bytes([self._process.pid])[0])
            time.sleep(self._every_s)
