"""Bytes that a converter looks at without torch, against torch's own idea of their values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from r1_megatron.checkpoint.convert.values import all_finite, first_problem
from r1_megatron.checkpoint.files.dtypes import TORCH_NAMES, WEIGHTS, item_size


@pytest.mark.parametrize("dtype", WEIGHTS)
def test_every_bit_pattern_is_judged_as_torch_does(dtype: str) -> None:
    """All patterns of the narrow dtypes; of fp32 those around infinity and zero, and a million of any kind."""
    size = item_size(dtype)
    if size < 4:
        bits = np.arange(1 << 8 * size, dtype=np.uint32)
    else:
        edges = [base + step for base in (0, 0x7F800000, 0x80000000, 0xFF800000) for step in range(-2, 3)]
        bits = np.array([edge % (1 << 32) for edge in edges], dtype=np.uint32)
        bits = np.concatenate([bits, np.random.default_rng(0).integers(0, 1 << 32, 1 << 20, dtype=np.uint32)])
    rows = bits.astype(f"u{size}").reshape(-1, 1).view(np.uint8)
    values = torch.from_numpy(rows).view(getattr(torch, TORCH_NAMES[dtype])).view(-1).float()
    finite = torch.isfinite(values).numpy()
    few = np.arange(len(rows)) if len(rows) <= 1 << 16 else np.arange(20)
    assert all(all_finite(rows[i : i + 1], dtype) == finite[i] for i in few)
    assert all_finite(rows[finite], dtype) and not all_finite(rows, dtype)
    assert first_problem(rows, dtype, 7) == (
        f"{int((~finite).sum())} of these values are NaN or infinite, the first at [{7 + int(np.argmin(finite))}]"
    )


def test_the_first_problem_of_a_matrix() -> None:
    values = np.zeros((4, 6), np.float32)
    values[2, 5], values[3, 0] = np.nan, -np.inf
    rows = values.view(np.uint8)
    assert first_problem(rows, "F32", 10) == "2 of these values are NaN or infinite, the first at [12, 5]"
    assert all_finite(rows[:2], "F32") and all_finite(rows[:0], "F32")
