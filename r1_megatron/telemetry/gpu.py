"""The GPUs of this machine as NVML reports them, without starting CUDA on any of them."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """One device. Memory in bytes, clocks in MHz; ``None`` where the device does not report the quantity.

    ``ecc_errors`` counts uncorrected (double-bit) errors since the driver was loaded.
    """

    index: int
    name: str
    memory_total: int
    memory_used: int
    sm_clock: int | None
    sm_clock_max: int | None
    power_limit_watts: float | None
    ecc_errors: int | None
    throttle_reasons: int | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def list_gpus() -> tuple[list[Gpu], str]:
    """All GPUs of the machine and, when there are none, the reason in words (else an empty string)."""
    try:
        import pynvml
    except ImportError:
        return [], "NVML is not readable: nvidia-ml-py is not installed (pip install 'r1_megatron[gpu]')"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return [], f"NVML does not start: {error} (no NVIDIA driver on this machine?)"
    try:
        gpus = [_describe(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError as error:
        return [], f"NVML cannot read the devices: {error}"
    finally:
        pynvml.nvmlShutdown()
    return gpus, "" if gpus else "the NVIDIA driver reports no device"


def num_visible_gpus() -> int:
    """GPUs that CUDA would let this process use: NVML's list cut down by ``CUDA_VISIBLE_DEVICES``."""
    gpus, _ = list_gpus()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return len(gpus)
    num_named = 0
    for name in chosen.split(","):
        name = name.strip()
        if not name or name.startswith("-") or (name.isdigit() and int(name) >= len(gpus)):
            break  # CUDA stops at the first device that does not exist
        num_named += 1
    return min(num_named, len(gpus)) if not chosen.startswith("MIG") else num_named


def _describe(nvml: Any, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)

    def ask(function: str, *arguments: Any) -> Any:
        try:
            return getattr(nvml, function)(handle, *arguments)
        except nvml.NVMLError:
            return None  # e.g. no ECC on consumer cards

    name = nvml.nvmlDeviceGetName(handle)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    power = ask("nvmlDeviceGetPowerManagementLimit")
    return Gpu(
        index=index,
        name=name.decode() if isinstance(name, bytes) else name,
        memory_total=int(memory.total),
        memory_used=int(memory.used),
        sm_clock=ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
        sm_clock_max=ask("nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_SM),
        power_limit_watts=None if power is None else power / 1000,
        ecc_errors=ask("nvmlDeviceGetTotalEccErrors", nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC),
        throttle_reasons=ask("nvmlDeviceGetCurrentClocksThrottleReasons"),
    )
