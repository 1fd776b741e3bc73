"""How far a conversion is: a bar on a terminal, a line every few seconds anywhere else."""

from __future__ import annotations

import sys
import time
from typing import TextIO

_WIDTH = 30


class Progress:
    """Counts bytes; shows share, amount, MB/s and the time that is left, judged from the speed so far."""

    def __init__(self, what: str, total: int, done: int = 0, quiet: bool = False, stream: TextIO | None = None) -> None:
        """``done``: bytes of ``total`` that an earlier process did."""
        self._what, self._total, self._done, self._first = what, max(1, total), done, done
        self._stream = sys.stderr if stream is None else stream
        self._quiet = quiet
        self._bar = self._stream.isatty()
        self._start = self._shown = time.monotonic()

    def update(self, num_bytes: int) -> None:
        """So many bytes more."""
        self._done += num_bytes
        now = time.monotonic()
        if not self._quiet and now - self._shown >= (0.2 if self._bar else 5.0):
            self._shown = now
            self._show("\r" if self._bar else "", "" if self._bar else "\n")

    def close(self) -> None:
        """The last state, with what it took."""
        if not self._quiet:
            self._show("\r" if self._bar else "", "\n")

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def text(self) -> str:
        """The state in one line."""
        share = min(1.0, self._done / self._total)
        speed = (self._done - self._first) / max(1e-9, self.seconds)
        left = (self._total - self._done) / speed if speed > 0 else 0
        filled = int(share * _WIDTH)
        amount = f"{self._done / 1e9:.2f}/{self._total / 1e9:.2f} GB"
        bar = "#" * filled + "." * (_WIDTH - filled)
        return f"{self._what} [{bar}] {share:4.0%} {amount} {speed / 1e6:.0f} MB/s, {_clock(left)} left"

    def _show(self, before: str, after: str) -> None:
        print(before + self.text(), end=after, file=self._stream, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
