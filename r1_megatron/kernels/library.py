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
    capability = ("baseline", "avx2", "avx512")[ops.cpu_capability()]
    return Library(True, cpu_capability=capability, with_cuda=ops.compiled_with_cuda())
