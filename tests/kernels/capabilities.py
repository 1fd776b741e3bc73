"""The same computation on an older processor: in a process whose CPU capability is lowered."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from r1_megatron.kernels import library

OLDER = library.CPU_CAPABILITIES[:-1]


def results_on(capability: str, script: str, folder: Path) -> Any:
    """Run ``script``, which leaves its ``results``, on ``capability``; skips where this process is not above that."""
    own = library.load().cpu_capability
    if capability not in OLDER[: library.CPU_CAPABILITIES.index(own)]:
        pytest.skip(f"this process runs on {own}, which {capability} is not below")
    root, path = Path(__file__).parents[2], folder / "results"
    script += (
        "\nimport torch; from r1_megatron.kernels import library"
        f"\ntorch.save((library.load().cpu_capability, results), {str(path)!r})"
    )
    environment = {**os.environ, "PYTHONPATH": str(root), "R1_MEGATRON_CPU_CAPABILITY": capability}
    subprocess.run([sys.executable, "-c", script], cwd=root, env=environment, check=True, timeout=300)
    found, results = torch.load(path)
    assert found == capability
    return results
