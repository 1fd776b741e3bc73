"""What a converter does to bytes that stay as they are: find NaN and infinity, hash. Rows in, rows out; no torch.

Rows are uint8 arrays ``[rows, bytes of a row]``, contiguous; their dtype goes by safetensors' name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np

from r1_megatron.checkpoint.files.dtypes import item_size
from r1_megatron.checkpoint.files.safetensors import CALL_BYTES, StoredTensor, TensorFiles

# The bits of infinity; of e4m3, which has none, of NaN. Without the sign, whatever is as large or larger is no number.
_INFINITY = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80, "F8_E4M3": 0x7F}


def all_finite(rows: np.ndarray, dtype: str) -> bool:
    """No NaN and no infinity in it."""
    if rows.size == 0:
        return True
    size, infinity = item_size(dtype), _INFINITY[dtype]
    flat = rows.reshape(-1)
    # As whole numbers, positive values are in order, and so are negative ones behind the sign bit.
    return flat.view(f"i{size}").max() < infinity and flat.view(f"u{size}").max() < infinity | 1 << 8 * size - 1


def first_problem(rows: np.ndarray, dtype: str, first_row: int) -> str:
    """Where the first NaN or infinity is and how many there are, in words."""
    size, infinity = item_size(dtype), _INFINITY[dtype]
    bits = rows.view(f"u{size}")
    places = np.argwhere((bits & ((1 << 8 * size - 1) - 1)) >= infinity)
    row, column = (int(index) for index in places[0])
    index = [first_row + row, column] if bits.shape[1] > 1 else [first_row + row]
    return f"{len(places)} of these values are NaN or infinite, the first at {index}"


def bytes_of(rows: np.ndarray) -> memoryview:
    """A contiguous array's own bytes."""
    return rows.reshape(-1).data.cast("B")


class TensorHash:
    """sha256 of one tensor whose bytes come slice by slice, in order."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.num_bytes = 0

    def update(self, data: memoryview) -> None:
        self._hash.update(data)
        self.num_bytes += len(data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


class Buffer:
    """Memory that is used again for every slice: fresh pages cost more than the copy into them."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def rows(self, count: int, row_bytes: int) -> np.ndarray:
        """Uint8 ``[count, row_bytes]`` in this memory, valid until the next call."""
        if count * row_bytes > len(self._bytes):
            self._bytes = np.empty(count * row_bytes, np.uint8)
        return self._bytes[: count * row_bytes].reshape(count, row_bytes)


def hash_tensor(files: TensorFiles, tensor: StoredTensor, buffer: Buffer, progress: Callable[[int], None]) -> str:
    """sha256 of a stored tensor's bytes."""
    digest = TensorHash()
    for start in range(0, tensor.num_bytes, CALL_BYTES):
        part = bytes_of(buffer.rows(1, min(CALL_BYTES, tensor.num_bytes - start)))
        files.read(tensor, start, part)
        digest.update(part)
        progress(len(part))
    return digest.hexdigest()
