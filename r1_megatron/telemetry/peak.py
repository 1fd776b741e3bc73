"""How fast this device multiplies: what model FLOPs are compared with where no peak is stated."""

from __future__ import annotations

import time

import torch

# Side of the square matrices: large enough to reach the device's rate.
_SIDE = {"cpu": 1024, "cuda": 8192}


def measure_peak_tflops(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """TFLOP/s of ``torch.mm`` in ``dtype``: the fastest of the products that fit into ``seconds``, three at least.

    Ranks that share a machine should measure at the same time, as they train at the same time.
    """
    side = _SIDE[device.type]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best, end, count = float("inf"), time.perf_counter() + seconds, 0
    while count < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best, count = min(best, time.perf_counter() - start), count + 1
    return 2 * side**3 / best / 1e12
