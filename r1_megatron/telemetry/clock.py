"""Where the seconds of a step go: named phases, read out once per step as ``timing_s/<phase>``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from r1_megatron.telemetry.phases import phase as recorded_phase


class Clock:
    """Adds up wall-clock seconds per phase. Phases may nest and repeat; each counts its own full duration.

    A profile records them too (`phases.py`).

    The device may still be busy when a phase ends: whoever times a GPU phase synchronises before it closes.

    Example:
        >>> clock = Clock()
        >>> with clock("rollout"):
        ...     pass
        >>> sorted(clock.take())
        ['timing_s/rollout', 'timing_s/step']
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._seconds: dict[str, float] = {}
        self._step_start: float | None = None

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = self._now()
        if self._step_start is None:
            self._step_start = start
        try:
            with recorded_phase(phase):
                yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + self._now() - start

    def take(self) -> dict[str, float]:
        """Seconds per phase since the last call, and ``timing_s/step``. Starts anew.

        The step lasts from its first phase to this call; what happens between steps (loading, a checkpoint, an
        evaluation outside of any phase) is not part of it.
        """
        if self._step_start is None:
            return {}
        seconds = {f"timing_s/{phase}": value for phase, value in self._seconds.items()}
        seconds["timing_s/step"] = self._now() - self._step_start
        self._seconds = {}
        self._step_start = None
        return seconds
