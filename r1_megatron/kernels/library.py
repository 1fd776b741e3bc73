"""The compiled half of the operators: finding it, loading it, and saying what it can do.

``R1_MEGATRON_LIBRARY=off`` in the environment leaves it out, to see whether a result depends on it.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path

import torch

PATH = Path(__file__).with_name("libr1_megatron.so")
# What the CPU kernels are compiled for, in the order of csrc/common/cpu.h: each has the instructions of those before.
CPU_CAPABILITIES = ("baseline", "avx2", "avx512", "avx512_bf16")


@dataclass(frozen=True)
class Library:
    """What was found. ``problem`` is empty where the library is loaded; otherwise every operator runs in PyTorch."""

    loaded: bool
    problem: str = ""
    cpu_capability: str = "none"
    with_cuda: bool = False


@functools.cache
def load() -> Library:
    """Load ``libr1_megatron.so`` once; its implementations attach to the schemas of ``ops.py``. Never raises."""
    if os.environ.get("R1_MEGATRON_LIBRARY") == "off":
        return Library(False, "R1_MEGATRON_LIBRARY=off")
    if not PATH.exists():
        return Library(False, f"{PATH.name} was not built (no C++ compiler at installation, or R1_MEGATRON_BUILD=off)")
    try:
        torch.ops.load_library(str(PATH))
    except OSError as error:
        return Library(False, f"{PATH} cannot be loaded: {error}")
    ops = torch.ops.r1_megatron
    capability = CPU_CAPABILITIES[ops.cpu_capability()]
    return Library(True, cpu_capability=capability, with_cuda=ops.compiled_with_cuda())
