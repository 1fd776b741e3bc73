"""What a converter computes: casts and block scales. The one part of it that needs torch, imported when it is needed.

Rows are uint8 arrays ``[rows, bytes of a row]``, as in ``values.py``; scales fp32 ``[block rows, block columns]``.
"""

from __future__ import annotations

import numpy as np
import torch

from r1_megatron.checkpoint.files.dtypes import TORCH_NAMES
from r1_megatron.checkpoint.fp8 import dequantize, quantize


def cast(rows: np.ndarray, there: str, here: str, scales: np.ndarray | None, first_row: int) -> np.ndarray:
    """Values of dtype ``there`` in dtype ``here``, rounded once. ``scales``: of their whole matrix, for e4m3 codes."""
    values, dtype = _tensor(rows, there), getattr(torch, TORCH_NAMES[here])
    if scales is not None:
        return _rows(dequantize(values, torch.from_numpy(scales), dtype, first_row))
    return _rows(values.to(dtype))


def quantize_rows(rows: np.ndarray, there: str, scales: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of values; ``scales``: the old ones of these rows. See :func:`fp8.quantize`."""
    codes, new = quantize(_tensor(rows, there), None if scales is None else torch.from_numpy(scales))
    return _rows(codes), new.numpy()


def _tensor(rows: np.ndarray, dtype: str) -> torch.Tensor:
    return torch.from_numpy(rows).view(getattr(torch, TORCH_NAMES[dtype]))


def _rows(values: torch.Tensor) -> np.ndarray:
    return values.contiguous().view(torch.uint8).numpy()
